"""What an ingest process answers and shows of itself while its dataflow runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.commit import Committed
from pipeline.config import Config
from pipeline.control import Answers, ControlServer, Request
from pipeline.dead_letters import NAME, LetterDesk, RefusalLog, allowed_sources, with_letters
from pipeline.events import Batch
from pipeline.flow import Step
from pipeline.rules import SourceRules
from pipeline.sources.inbox import Inbox
from pipeline.tap import Tap
from pipeline.tap_text import Redactor
from pipeline.tokenization import BatchTokenizer
from storage.ring import Ring

__all__ = ["Desk"]

log = logging.getLogger("edgewater.desk")


class Desk:
    """Serves `tap`, `sources`, `retry` and `purge` on the control socket; the dataflow calls the rest.

    Args:
        config: The configuration.
        tokenizer: Of the base model.
        ring: The shard's.
        run_folder: The data folder's `run`.
        shard: Its name.
    """

    def __init__(
        self, config: Config, tokenizer: BatchTokenizer, ring: Ring, run_folder: Path, shard: str
    ) -> None:
        self._ring, self._run_folder, self._shard = ring, run_folder, shard
        self._allowed = allowed_sources(config)
        self._tap = Tap(Redactor(SourceRules(config)), tokenizer.decode)
        self._refusals = RefusalLog(shard)

    def watching(self, steps: dict[str, Step]) -> dict[str, Step]:
        """The same steps, under the eyes of who taps."""
        return self._tap.watching(steps)

    def prepared(self, batch: Batch) -> Batch:
        """A Batch as it is to be committed."""
        return with_letters(batch)

    def committed(self, batch: Batch, committed: Committed) -> None:
        """What a Batch became."""
        self._tap.committed(batch, committed)
        self._refusals.note(committed.outcome.dead_letters)

    @contextmanager
    def serving(self, inbox: Inbox) -> Iterator[None]:
        """Answer requests meanwhile."""
        letters = LetterDesk(self._ring, inbox, self._allowed)

        def sources(request: Request) -> Answers:
            yield {"sources": _states(inbox)}

        verbs = {
            "sources": sources, "tap": self._tap.follow, "retry": letters.retry, "purge": letters.purge,
        }  # fmt: skip
        try:
            server = ControlServer(self._run_folder, self._shard, verbs)
        except OSError as error:  # a file system without sockets: nothing is worth less for it
            log.warning("no control socket, so no `tap` and no live `status`: %s", error)
            yield
            return
        try:
            yield
        finally:
            server.close()


def _states(inbox: Inbox) -> dict[str, dict[str, object]]:
    """How each source stands."""
    return {
        name: {
            "connected": state.connected,
            "detail": state.detail,
            "counts": dict(state.counts),
            "waiting": waiting,
        }
        for name, (state, waiting) in inbox.states().items()
        if name != NAME
    }
