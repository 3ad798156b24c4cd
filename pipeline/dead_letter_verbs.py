"""`edgewater dlq`: list and show refused inputs, feed them again, delete them, whether or not ingest runs."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from pipeline.config import Config
from pipeline.control import ControlError, NoIngestError, stream
from pipeline.dead_letters import LetterOutcome, LetterRun, allowed_sources, why_not
from pipeline.tap_text import format_time, printable
from storage.errors import LockHeldError, StorageError
from storage.folder import DataFolder
from storage.opening import open_ring_reader
from storage.windows import DeadLetter

__all__ = ["change_letters", "list_letters", "show_letter"]

EVERY = 1 << 40
REQUEST_LETTERS = 1_000
ANSWER_S = 60.0  # a commit waits where a disk is slow; in lockstep a stream waits for a whole update
_WORDS = {
    "stored": "stored", "dropped": "dropped: a duplicate, or within the deadband",
    "refused": "refused again: {reason}", "purged": "deleted", "kept": "kept: {reason}", "gone": "not there",
}  # fmt: skip
Place = tuple[str, int]  # shard and number


def list_letters(config: Config, source: str, newest: int) -> tuple[list[dict[str, Any]], str]:
    """The newest dead letters, oldest first.

    Args:
        source: Only of this source, "" for all.
        newest: At most so many; 0 for all.
    """
    folder = DataFolder.open(config.data_dir, create=False)
    shards = folder.shards()
    letters = [
        (letter.arrival, _row(shards, shard, number, letter))
        for shard in shards
        for number, letter in _letters(folder, shard)
        if source in ("", letter.source)
    ]
    if len(shards) > 1:
        letters.sort(key=lambda row: row[0])
    rows = [row for _, row in letters]
    older = max(0, len(rows) - newest) if newest else 0
    rows = rows[older:]
    lines = [
        f"{row['letter']:>8}  {format_time(row['arrival'])}  {printable(row['source'])}  "
        f"{printable(row['position'])}: {printable(row['reason'])}"
        for row in rows
    ]
    if older:
        lines.insert(0, f"{older:,} older ones are not shown: --newest 0 shows all")
    return rows, "\n".join(lines) or "no dead letters"


def show_letter(config: Config, name: str) -> tuple[dict[str, Any], str]:
    """One dead letter with its data, which was redacted before it was stored.

    Raises: StorageError if there is none of this name.
    """
    folder = DataFolder.open(config.data_dir, create=False)
    shards = folder.shards()
    ((shard, number),) = _places(shards, [name])
    with open_ring_reader(folder.ring / shard) as ring:
        letter = ring.dead_letter(number)
    if letter is None:
        raise StorageError(f"there is no dead letter {name}", hint="see `edgewater dlq list`")
    row = _row(shards, shard, number, letter)
    try:
        row["data"] = letter.data.decode()
    except UnicodeDecodeError:
        row["data_base64"] = base64.b64encode(letter.data).decode()
    reason = why_not(letter)
    row["retry"] = not reason
    retry = f"not possible: {reason}" if reason else f"edgewater dlq retry {row['letter']}"
    lines = [
        f"letter    {row['letter']}",
        f"came      {format_time(letter.arrival)} through {printable(letter.source)}",
        f"from      {printable(letter.position)}",
        f"refused   {printable(letter.reason)}",
        f"retry     {retry}",
        f"data      {len(letter.data):,} bytes",
        "",
        printable(letter.data.decode(errors="backslashreplace")),
    ]
    return row, "\n".join(lines)


def change_letters(
    config: Config, do: Literal["retry", "purge"], names: Sequence[str], *, every: bool
) -> tuple[dict[str, Any], str, bool]:
    """Feed dead letters again, or delete them; through ingest where it runs, else in its place.

    Args:
        names: As `dlq list` shows them.
        every: All that are there.
    Returns: data and text to print, and whether all of it was done.
    Raises: StorageError if ingest holds the ring and does not answer; ControlError if it refused.
    """
    folder = DataFolder.open(config.data_dir, create=False)
    shards = folder.shards()
    places = (
        [(shard, number) for shard in shards for number, _ in _letters(folder, shard)]
        if every
        else list(dict.fromkeys(_places(shards, names)))
    )
    rows: list[dict[str, Any]] = []
    problem = ""
    for shard in shards:
        numbers = [number for where, number in places if where == shard]
        if not numbers:
            continue
        outcomes: list[LetterOutcome] = []
        try:
            for outcome in _change(config, folder, shard, do, numbers):
                outcomes.append(outcome)
        except ControlError as error:
            problem = f"{error}: see `edgewater dlq list` for what is left, and try again"
        rows += [
            {"letter": _name(shards, shard, one.number), "became": one.became, "reason": one.reason}
            for one in outcomes
        ]
    good = ("stored", "dropped", "purged")
    done = not problem and len(rows) == len(places) and all(row["became"] in good for row in rows)
    told = rows if do == "retry" else [row for row in rows if row["became"] not in good]
    lines = [
        f"{row['letter']:>8}  {_WORDS[row['became']].format(reason=printable(row['reason']))}" for row in told
    ]
    counts = {word: sum(row["became"] == word for row in rows) for word in _WORDS}
    words = ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)
    lines.append(f"{len(places):,} dead letters: {words}" if words else "no dead letters: nothing to do")
    if problem:
        lines.append(problem)
    return {"letters": rows, "problem": problem}, "\n".join(lines), done


def _change(
    config: Config, folder: DataFolder, shard: str, do: Literal["retry", "purge"], numbers: list[int]
) -> Iterator[LetterOutcome]:
    for first in range(0, len(numbers), REQUEST_LETTERS):
        try:
            yield from _asked(folder, shard, do, numbers[first : first + REQUEST_LETTERS])
        except NoIngestError:
            yield from _in_its_place(config, folder, shard, do, numbers[first:])
            return


def _asked(folder: DataFolder, shard: str, do: str, numbers: list[int]) -> Iterator[LetterOutcome]:
    done = False
    for answer in stream(folder, shard, do, ANSWER_S, letters=numbers):
        yield from msgspec.convert(answer.get("letters", []), list[LetterOutcome])
        done = done or bool(answer.get("done"))
    if not done:
        raise ControlError("ingest ended meanwhile")


def _in_its_place(
    config: Config, folder: DataFolder, shard: str, do: Literal["retry", "purge"], numbers: list[int]
) -> list[LetterOutcome]:
    """Be the ingest process of the shard for a moment, with these letters as its only source."""
    from pipeline.elsewhere import starting
    from pipeline.ingest import IngestOptions, ingest
    from pipeline.roles import model_folder, stop_on_signals

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        begun = stack.enter_context(starting(folder, stop))
        try:
            stack.enter_context(folder.lock(f"ingest-{shard}"))
        except LockHeldError as error:
            hint = "it starts or ends: try again in a moment"
            raise StorageError(
                f"an ingest process holds shard {shard}, and does not answer", hint=hint
            ) from error
        with open_ring_reader(folder.ring / shard) as ring:
            letters = [(number, ring.dead_letter(number)) for number in numbers]
        run = LetterRun(letters, do, allowed_sources(config))
        if not run.idle:
            options = IngestOptions(finite=True, shard=shard)
            ingest(config, folder, model_folder(config), [run], options, stop, opened=begun.close)
        return run.outcomes()


def _letters(folder: DataFolder, shard: str) -> list[tuple[int, DeadLetter]]:
    with open_ring_reader(folder.ring / shard) as ring:
        return ring.dead_letters(EVERY)


def _places(shards: Sequence[str], names: Sequence[str]) -> list[Place]:
    places: list[Place] = []
    for name in names:
        shard, colon, digits = name.rpartition(":")
        if not colon and len(shards) == 1:
            shard = shards[0]
        if shard not in shards or not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
            words = f"there is no dead letter {name}"
            if not colon and len(shards) > 1:
                words = f"of which shard: {', '.join(f'{shard}:{name}' for shard in shards)}?"
            raise StorageError(words, hint="see `edgewater dlq list`")
        places.append((shard, int(digits)))
    return places


def _name(shards: Sequence[str], shard: str, number: int) -> str:
    return f"{shard}:{number}" if len(shards) > 1 else str(number)


def _row(shards: Sequence[str], shard: str, number: int, letter: DeadLetter) -> dict[str, Any]:
    return {
        "letter": _name(shards, shard, number),
        "shard": shard,
        "number": number,
        "source": letter.source,
        "position": letter.position,
        "arrival": letter.arrival,
        "reason": letter.reason,
        "bytes": len(letter.data),
    }
