"""`edgewater demo`: the whole loop on a real stream, with the embedded model, and what it learned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import msgspec

from pipeline.config import Config, load
from pipeline.progress import Progress
from pipeline.report import Report, format_report
from pipeline.running import ReplayRecord, ensure_model, run_replay
from pipeline.sources.lines import LineSplitter, open_stream
from storage.durable import make_private_folder, remove_folder, write_file_durably
from storage.errors import ForeignFolderError
from storage.folder import DataFolder

__all__ = ["demo_lines", "run_demo"]

WORK_ORDERS, SHORT_WORK_ORDERS = "work-orders.jsonl.zst", 1_800
WEATHER = "weather.jsonl.zst"
READINGS_A_WORK_ORDER = 1 / 3
BURST = 150  # readings that come together: the site reports its weather in blocks, work orders between
PROMPTS = ("excavator A:", "excavator D: REPLACE R/H", "weather-1 temperature=-5.21C pressure=")
NEW_TOKENS, SEED, TEMPERATURE = 24, 4, 0.5
_STREAM, _CONTINUATIONS = "stream.jsonl", "continuations.json"


def run_demo(
    data_dir: Path, *, everything: bool, fresh: bool, as_json: bool, overrides: Sequence[str]
) -> None:
    """Run the demo, go on with it after a kill, or show its report again."""
    progress = Progress()
    state = data_dir / "state"
    own = (*overrides, f"data_dir={json.dumps(str(state))}", 'health.listen=""')
    config = load(None, own, require_sources=False)
    if fresh:
        _remove(data_dir)
    make_private_folder(data_dir)
    stream = data_dir / _STREAM
    content = b"".join(demo_lines(everything=everything))
    if stream.exists() and stream.stat().st_size != len(content):
        raise click.UsageError(f"{data_dir} holds a demo of another length: add --fresh, or --data-dir")
    if not stream.exists():
        write_file_durably(stream, content)
    again = _finished(state)
    arguments = [part for item in own for part in ("--set", item)]
    report = run_replay(config, arguments, stream, resume=True, progress=progress)
    texts = _continuations(config, data_dir, report, progress)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
        return
    if again:
        click.echo(
            "this demo is finished: nothing is trained, the report is shown again (--fresh starts over)\n"
        )
    click.echo(format_report(report))
    _print_continuations(texts)
    click.echo(f"\nreport: {state / 'report.json'}\nlook on with: edgewater status --set data_dir={state}")


def demo_lines(*, everything: bool) -> Iterator[bytes]:
    """The demo's stream: real work orders in date order, blocks of real weather readings between them."""
    orders = _lines(WORK_ORDERS)
    orders = orders if everything else orders[:SHORT_WORK_ORDERS]
    readings = _lines(WEATHER)
    readings = readings[: round(len(orders) * READINGS_A_WORK_ORDER)]
    between = round(BURST / READINGS_A_WORK_ORDER)
    for start in range(0, len(orders), between):
        yield from orders[start : start + between]
        first = start // between * BURST
        yield from readings[first : first + BURST]


def _lines(name: str) -> list[bytes]:
    splitter = LineSplitter()
    with open_stream(Path(str(files("pipeline") / "demo_data" / name))) as stream:
        out = splitter.feed(stream.read())
    return [line + b"\n" for _, line in [*out, *splitter.finish()]]


def _finished(state: Path) -> bool:
    try:
        return msgspec.json.decode((state / "replay.json").read_bytes(), type=ReplayRecord).finished
    except OSError:
        return False


def _remove(data_dir: Path) -> None:
    """Delete an earlier demo, and nothing that is none."""
    if not data_dir.exists():
        return
    strangers = {path.name for path in data_dir.iterdir()} - {"state", _STREAM, _CONTINUATIONS}
    if strangers or not (data_dir / _STREAM).exists() or (data_dir / "state").is_symlink():
        hint = "--fresh deletes only a folder that the demo made"
        raise ForeignFolderError("is not a demo's folder", path=data_dir, hint=hint)
    if (data_dir / "state" / "edgewater.json").exists():
        with DataFolder.open(data_dir / "state", create=False).lock("supervisor"):  # or a demo runs on it
            remove_folder(data_dir)
    remove_folder(data_dir)


def _continuations(
    config: Config, data_dir: Path, report: Report, progress: Progress
) -> list[dict[str, Any]]:
    """What base and active version make of the same prompts; kept, so that a second call is instant."""
    active = next((version for version in report.versions if version.active), None)
    if active is None:
        return []
    kept = data_dir / _CONTINUATIONS
    if kept.exists():
        found = json.loads(kept.read_bytes())
        if found["sha256"] == active.sha256:
            return list(found["texts"])
    progress.show("writing continuations", -1.0)
    from adapters.lora import generate

    model = ensure_model(config, progress)
    folder = DataFolder(config.data_dir).versions / active.folder
    base, adapted = (
        generate(model, version, list(PROMPTS), NEW_TOKENS, seed=SEED, temperature=TEMPERATURE)
        for version in (None, folder)
    )
    texts = [
        {"prompt": prompt, "base": one, "adapted": other}
        for prompt, one, other in zip(PROMPTS, base, adapted, strict=True)
    ]
    write_file_durably(kept, json.dumps({"sha256": active.sha256, "texts": texts}, indent=1).encode())
    progress.clear()
    return texts


def _print_continuations(texts: list[dict[str, Any]]) -> None:
    if not texts:
        return
    click.echo("\nthe same prompts, continued by the base and by the adapted model")
    for text in texts:
        click.echo(f"  {text['prompt']!r}")
        click.echo(f"    base     {text['base']!r}")
        click.echo(f"    adapted  {text['adapted']!r}")
