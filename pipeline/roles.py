"""The processes of one gateway as functions: ingest and trainer, each under its own lock."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from pipeline.config import EMBEDDED_MODEL, Config, gate_limits, recipe
from pipeline.shards import MAIN, listen_of, shard_name, sources_of
from pipeline.supervise import STOPPED_EARLY
from storage.errors import LockHeldError, StorageError
from storage.folder import DataFolder, RoleLock

__all__ = [
    "StartupError",
    "foreign_packages",
    "model_folder",
    "refuse_foreign_packages",
    "run_ingest",
    "run_trainer",
    "stop_on_signals",
    "trainer_settings",
]

SUPERVISED = "EDGEWATER_SUPERVISOR"
LOCK_WAIT_S = 25.0  # an orphan of a killed supervisor needs up to 20 s to write its checkpoint and go
log = logging.getLogger("edgewater")


def model_folder(config: Config) -> Path:
    """The prepared base model's folder, whether or not it is there yet."""
    from adapters.model_folder import default_model_dir

    return default_model_dir() if config.model.path == EMBEDDED_MODEL else Path(config.model.path)


class StartupError(Exception):
    """This installation must not run; the message says what to do."""


def foreign_packages() -> list[str]:
    """Other distributions that own one of our package names, and may have overwritten ours."""
    owners = packages_distributions()
    names = ("pipeline", "adapters", "storage")
    return sorted({owner for name in names for owner in owners.get(name, []) if owner != "edgewater"})


def refuse_foreign_packages() -> None:
    """Raises: StartupError where another distribution shares our package names (AdapterHub's does)."""
    if strangers := foreign_packages():
        names = ", ".join(strangers)
        raise StartupError(
            f"{names} installs files over Edgewater's own (uninstall it, then install Edgewater again)"
        )


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, and the end of the supervisor that started this process.

    A second signal of the same kind acts as it would without us.
    """
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    if supervisor := os.environ.get(SUPERVISED):
        threading.Thread(target=_leave_with, args=(int(supervisor), stop), daemon=True).start()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_ingest(
    config: Config,
    *,
    finite: bool,
    lockstep: bool,
    max_events: int,
    capture: Path | None,
    replay: Path | None,
    speed: float,
    number: int = 1,
) -> None:
    """Be an ingest process until its sources end or a signal comes.

    Args:
        number: Which one, from 1. A replay is always the first's.
    Raises: StartupError if it has nothing to read; LockHeldError if it, or a source of its, is another's.
    """
    from pipeline.connectors import make_connectors
    from pipeline.elsewhere import starting
    from pipeline.health import HealthServer, IngestMetrics
    from pipeline.ingest import IngestOptions, ingest
    from pipeline.sources.inbox import Connector
    from pipeline.sources.replay import ReplayConnector

    if SUPERVISED not in os.environ:
        refuse_foreign_packages()
    sources = [] if replay else sources_of(config, number)
    shard = MAIN if replay else shard_name(number)
    if not (sources or replay):
        raise StartupError(f"ingest process {number} has no source (see `shard` and ingest.processes)")
    folder = DataFolder.open(config.data_dir, create=True)
    with stop_on_signals() as stop, contextlib.ExitStack() as stack:
        started = stack.enter_context(starting(folder, stop))
        # Its sources' own locks too: a source whose last owner still reads it must not move yet.
        for role in (f"ingest-{shard}", *(f"source-{source.name}" for source in sources)):
            stack.enter_context(_locked(folder, role))
        connectors: list[Connector] = (
            [ReplayConnector(replay, speed)] if replay else make_connectors(sources, finite=finite)
        )
        metrics = IngestMetrics(shard)
        if listen := listen_of(config, number):
            try:
                stack.callback(HealthServer(listen, metrics).close)
            except OSError as error:
                hint = 'set health.listen to a free port, or to "" for none'
                raise StorageError(f"health.listen {listen}: {error.strerror}", hint=hint) from None
        options = IngestOptions(
            finite=finite, lockstep=lockstep, max_events=max_events, capture=capture, shard=shard
        )
        ingest(config, folder, model_folder(config), connectors, options, stop, metrics, started.close)
        stopped = stop.is_set()
    if stopped and SUPERVISED in os.environ:
        # Told to end before its sources did, by somebody else than the supervisor, which does not look.
        sys.exit(STOPPED_EARLY)


def run_trainer(config: Config, *, lockstep: bool, reports: bool) -> None:
    """Be the trainer until a signal comes.

    Args:
        lockstep: The stream waits for each decision: nothing is merged and nothing cools down.
        reports: Print progress as JSON lines on standard output, for the supervisor.
    """
    from adapters.model_folder import verify
    from adapters.trainer import Trainer
    from storage.opening import open_registry
    from storage.registry import UpdateRow
    from storage.wake import Waker

    def report(row: UpdateRow, told: dict[str, Any]) -> None:
        if reports:
            print(json.dumps({"window": row.window, **told}), flush=True)

    if SUPERVISED not in os.environ:
        refuse_foreign_packages()
    folder = DataFolder.open(config.data_dir, create=True)
    with stop_on_signals() as stop, _locked(folder, "trainer"), contextlib.ExitStack() as stack:
        model = model_folder(config)
        manifest = verify(model, weights=True)
        registry = stack.enter_context(open_registry(folder))
        waker = Waker(folder.run)
        stack.callback(waker.close)
        trainer = Trainer(
            folder, registry, model, manifest, trainer_settings(config, lockstep=lockstep), report
        )
        stack.callback(trainer.close)
        for name in trainer.recover():
            log.info("removed %s, left by a crash", name)
        trainer.check_parent()
        while not stop.is_set():
            if not trainer.step(stop):
                waker.wait(1.0)


def trainer_settings(config: Config, *, lockstep: bool) -> Any:
    """The trainer's settings as the configuration has them."""
    from adapters.trainer import TrainerSettings

    return TrainerSettings(
        gateway=config.gateway.name,
        recipe=recipe(config),
        limits=gate_limits(config),
        seed=config.update.seed,
        threads=config.update.threads,
        max_due=0 if lockstep else config.trigger.max_due,
        cooldown_s=0.0 if lockstep else float(config.trigger.cooldown),
    )


@contextlib.contextmanager
def _locked(folder: DataFolder, role: str) -> Iterator[RoleLock]:
    """Hold a role; under a supervisor, wait for the last holder to go."""
    deadline = time.monotonic() + (LOCK_WAIT_S if SUPERVISED in os.environ else 0.0)
    while True:
        try:
            lock = folder.lock(role)
            break
        except LockHeldError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    with lock:
        yield lock


def _leave_with(supervisor: int, stop: threading.Event) -> None:
    while os.getppid() == supervisor:
        if stop.wait(0.5):
            return
    stop.set()
    with contextlib.suppress(OSError):  # its end of our standard error may be gone with it
        print("the supervisor is gone: stopping", file=sys.stderr)
