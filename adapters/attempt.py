"""One update from the window's file to the gate's decision; `adapters.update` is the process around it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from adapters import checkpoint
from adapters.adapter_files import ADAPTER_FILE, LoraState, save_adapter
from adapters.batches import RowRef, deal_steps, take_tokens
from adapters.bench import Bench, anchor_rows, open_bench, state_digest
from adapters.examination import Examination, Measured
from adapters.frozen import Activations
from adapters.gate import Criterion, Decision, decide
from adapters.host import PeakMemory, host_class, peak_resident_bytes, set_up_torch
from adapters.lora import adapter_parameters, init_state, interpolate, lora_state
from adapters.scoring import EmptyScoreError, RowLosses, Score, kl_bits, rare_spans, score_rows, total
from adapters.training import TrainingRows, make_optimizer, train
from adapters.update import RESULT_FILE, SourceScore, Stopped, StopSignal, UpdateResult, UpdateTask, tell
from adapters.window_rows import RowMaker, StoredWindow, WindowRows
from storage.durable import make_private_folder, write_file_durably

__all__ = ["run_update"]

CHECKPOINT_STEPS = 20
KL_TOKENS = 1024


class _Phases:
    """Tells each phase as it starts, and times it."""

    def __init__(self, started: float) -> None:
        self.seconds: dict[str, float] = {}
        self.name, self.since = "load", started

    def enter(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[self.name] = round(self.seconds.get(self.name, 0.0) + now - self.since, 2)
        self.name, self.since = name, now
        tell(phase=name)


def run_update(task: UpdateTask, stop: StopSignal, started: float) -> UpdateResult:
    """Train, examine and decide one update; write its files.

    Args:
        task: What to do.
        stop: Asked to stop while training: a checkpoint is written and Stopped raised.
        started: time.monotonic() when the process began.
    Raises: Stopped, BaseModelError, AdapterError, CorruptBlockError, OSError.
    """
    set_up_torch(task.threads)
    memory, phases = PeakMemory(), _Phases(started)
    make_private_folder(Path(task.out_dir))
    bench = open_bench(task, lambda: tell(phase=phases.name))
    phases.enter("score")
    work = _Work(task, bench)
    base = bench.losses(work.window, None)
    parent = base if bench.parent is None else bench.losses(work.window, bench.parent)
    scores = [score_rows(work.window.rows, losses, bench.byte_lengths) for losses in (base, parent)]
    held_before = total(scores[1][work.first_held_out :])
    phases.enter("rows")
    steps = work.deal()
    candidate, measured, kl = None, Measured(), None
    if steps and held_before.bytes:
        data = work.training_rows(steps)
        phases.enter("train")
        candidate = _train(task, bench, data, steps, stop)
        phases.enter("examine")
        exam = work.examination(candidate, held_before, base)
        decision = decide(exam.criteria, task.gate)
        measured, kl = exam.measured[decision.scale], _kl(bench, work, candidate, decision)
    else:
        decision = _nothing_to_learn(bool(steps))
    phases.enter("write")
    result = UpdateResult(
        window=task.window,
        decision="promoted" if decision.promoted else "rejected",
        reason=decision.reason,
        scale=decision.scale,
        criteria=decision.criteria,
        by_source=_by_source(work.rows, scores[0], scores[1]),
        base_bits_per_byte=_rate(total(scores[0])),
        active_bits_per_byte=_rate(total(scores[1])),
        held_out_before_bits_per_byte=_rate(held_before),
        held_out_after_bits_per_byte=measured.held_out_after,
        anchor_delta_bits_per_token=measured.anchor_delta,
        kl_new_bits=kl,
        samples=sum(work.rows.samples.values()),
        skipped=work.rows.skipped,
        trained_tokens=work.dealt_tokens(steps) if candidate is not None else 0,
        steps=len(steps) if candidate is not None else 0,
        seconds=round(time.monotonic() - started, 2),
        phases=phases.seconds,
        peak_rss_bytes=memory.stop(),
        max_rss_bytes=peak_resident_bytes(),
        adapter_sha256="",
        host_class=host_class(),
    )
    return _publish(task, bench, candidate, decision, result)


class _Work:
    """The rows of one update, as they are needed."""

    def __init__(self, task: UpdateTask, bench: Bench) -> None:
        self.task, self.bench = task, bench
        self.maker = RowMaker(bench.manifest, bench.bytes_of, task.recipe, task.seed)
        self.new = self.maker.read(Path(task.window_file))
        self._files: dict[str, StoredWindow] = {}  # most past windows are rehearsed too: read once
        self.earlier = [self._read(file) for file in self.maker.choose_windows(task.rehearsal_files)]
        self.past = [(past.window, self._read(past.file)) for past in task.past_files]
        others = self.earlier + [window for _, window in self.past]
        self.rows: WindowRows = self.maker.window(self.new, others)
        self.window = bench.activate(self.rows.all)
        self.first_held_out = len(self.rows.train) + len(self.rows.scored_only)
        self.n_new = len(self.rows.train)

    def _read(self, file: str) -> StoredWindow:
        if file not in self._files:
            self._files[file] = self.maker.read(Path(file))
        return self._files[file]

    def deal(self) -> list[list[RowRef]]:
        """Deal the steps; none if no sample is left to train on."""
        if not self.rows.train:
            return []
        new_tokens = sum(map(len, self.rows.train))
        self.rehearsal = self.maker.rehearsal(self.new, self.earlier, new_tokens)
        self.anchors = anchor_rows(self.bench.anchors.train_ids.tolist())
        kinds = {"new": self.rows.train, "rehearsal": self.rehearsal, "anchor": self.anchors}
        self.lengths = {kind: [len(row) for row in rows] for kind, rows in kinds.items()}
        return deal_steps(self.lengths, self.task.recipe, self.task.seed)

    def dealt_tokens(self, steps: Sequence[Sequence[RowRef]]) -> int:
        """Tokens of all rows of all steps."""
        return sum(self.lengths[ref.kind][ref.row] for step in steps for ref in step)

    def training_rows(self, steps: list[list[RowRef]]) -> TrainingRows:
        """Lower activations of every row that a step uses, the window's own as scored before.

        Renumbers the anchors in `steps` to the ones used: an update needs a few of hundreds.
        """
        used = sorted({ref.row for step in steps for ref in step if ref.kind == "anchor"})
        place = {row: i for i, row in enumerate(used)}
        for step in steps:
            step[:] = [RowRef("anchor", place[ref.row]) if ref.kind == "anchor" else ref for ref in step]
        self.lengths["anchor"] = [self.lengths["anchor"][row] for row in used]
        kinds = {
            "new": self.window.part(range(self.n_new)),
            "rehearsal": self.bench.activate(self.rehearsal),
            "anchor": self.bench.activate([self.anchors[row] for row in used]),
        }
        return TrainingRows(kinds)

    def held_out(self) -> Activations:
        """Held-out rows of the window."""
        return self.window.part(range(self.first_held_out, len(self.window.rows)))

    def examination(self, candidate: LoraState, before: Score, base: Sequence[RowLosses]) -> Examination:
        """Everything that the gate compares the candidate with."""
        probes = rare_spans(self.rows.train, base[: self.n_new], self.bench.manifest.bos_id)
        past = [(number, self.maker.retention(window, number)) for number, window in self.past]
        return Examination(
            bench=self.bench,
            limits=self.task.gate,
            candidate=candidate,
            held_out=self.held_out(),
            held_out_before=before,
            probes=self.bench.activate(probes),
            past=[self.bench.cached(rows) for _, rows in past if rows],
            tell=lambda what: tell(phase="examine", what=what),
        )


def _identity(task: UpdateTask, bench: Bench) -> str:
    """Hash of all that decides the adapter's bytes: a checkpoint of anything else is not ours."""
    files = [task.window_file, *task.rehearsal_files, *(past.file for past in task.past_files)]
    parts: list[object] = [
        task.shard,
        task.window,
        task.seed,
        task.recipe,
        bench.manifest.base_sha256,
        bench.manifest.anchors.sha256,
        state_digest(bench.parent),
        host_class(),
        [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files],
    ]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _train(
    task: UpdateTask, bench: Bench, data: TrainingRows, steps: list[list[RowRef]], stop: StopSignal
) -> LoraState:
    """Train from the parent, or from the newest checkpoint of this very update."""
    out_dir, identity = Path(task.out_dir), _identity(task, bench)
    bench.use(bench.parent or init_state(bench.split.model, task.seed))
    named = adapter_parameters(bench.split.model)
    names, optimizer = list(named), make_optimizer(list(named.values()))
    saved = checkpoint.load_newest(out_dir, identity)
    if saved is not None:
        checkpoint.restore(saved, optimizer, names)

    def after_step(done: int, loss: float) -> None:
        tell(phase="train", step=done, steps=len(steps), loss=round(loss, 4) if math.isfinite(loss) else None)
        if stop.asked or (done % CHECKPOINT_STEPS == 0 and done < len(steps)):
            checkpoint.save_checkpoint(out_dir, identity, done, optimizer, names)
        if stop.asked:
            raise Stopped

    with stop.deferred():
        train(bench.split, data, steps, task.recipe, optimizer, saved.step if saved else 0, after_step)
    return lora_state(bench.split.model)


def _kl(bench: Bench, work: _Work, candidate: LoraState, decision: Decision) -> float | None:
    """KL(base, version) on at most 1,024 held-out tokens of the window."""
    bench.use(interpolate(bench.parent, candidate, decision.scale))
    chosen = set(map(id, take_tokens(work.rows.held_out, KL_TOKENS, "kl")))
    held = work.held_out()
    try:
        value = kl_bits(bench.split, held.part([i for i, row in enumerate(held.rows) if id(row) in chosen]))
    except EmptyScoreError:
        return None
    return value if math.isfinite(value) else None


def _nothing_to_learn(trainable: bool) -> Decision:
    what = "no held-out sample" if trainable else "no sample to train on"
    rule = "samples of which none equals a held-out one, and a held-out fifth with bytes"
    return Decision(False, 1.0, [Criterion("samples", 0.0, 1.0, "failed", rule)], f"{what} in the window")


def _by_source(rows: WindowRows, base: Sequence[Score], active: Sequence[Score]) -> dict[str, SourceScore]:
    out = {}
    for source, samples in rows.samples.items():
        mine = [i for i, row in enumerate(rows.all) if row.source == source]
        own_base, own_active = (_rate(total(scores[i] for i in mine)) for scores in (base, active))
        out[source] = SourceScore(samples, own_base, own_active)
    return out


def _rate(score: Score) -> float | None:
    return score.bits / score.bytes if score.bytes and math.isfinite(score.bits) else None


def _publish(
    task: UpdateTask, bench: Bench, candidate: LoraState | None, decision: Decision, result: UpdateResult
) -> UpdateResult:
    """Write the outcome, the result last: it is what makes the update finished (table in adapters.update)."""
    out_dir = Path(task.out_dir)
    (out_dir / ADAPTER_FILE).unlink(missing_ok=True)
    if decision.promoted and candidate is not None:
        state = interpolate(bench.parent, candidate, decision.scale)
        result = msgspec.structs.replace(result, adapter_sha256=save_adapter(out_dir, state, bench.config))
    write_file_durably(out_dir / RESULT_FILE, msgspec.json.format(msgspec.json.encode(result)))
    checkpoint.remove_all(out_dir)
    tell(phase="done", decision=result.decision, reason=result.reason, seconds=result.seconds)
    return result
