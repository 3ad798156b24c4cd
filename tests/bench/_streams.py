"""Streams for the benches: the pump readings (not shipped) or the weather of the demo, as long as needed."""

from __future__ import annotations

import io
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import zstandard

__all__ = ["PUMP_VARIABLE", "chunks", "endless", "readings"]

PUMP_VARIABLE = "EDGEWATER_BENCH_PUMP"
_SPREAD = 0.02  # the next pump of its kind measures a few per cent more or less


def readings(pump: Path | None) -> tuple[str, list[bytes]]:
    """Lines of readings: the named file's, that of $EDGEWATER_BENCH_PUMP, else the demo's weather.

    Returns: what they are, and the lines without their line ends.
    """
    named = pump or (Path(os.environ[PUMP_VARIABLE]) if os.environ.get(PUMP_VARIABLE) else None)
    if named is not None:
        return named.name, _unpacked(named.read_bytes())
    shipped = files("pipeline.demo_data").joinpath("weather.jsonl.zst")
    return "weather.jsonl.zst (no --pump given)", _unpacked(shipped.read_bytes())


def endless(lines: Sequence[bytes], seed: int = 0) -> Iterator[bytes]:
    """The lines as they are, then again and again as another device of the same kind would send them.

    Each repetition goes on in time, and multiplies each tag by a factor of its own near 1, rounded to the
    decimals that the reading had. So the stream moves as the real one does and lines are as long, but no
    repetition holds the texts of another: a codec that remembers would look better than it is.
    """
    yield from lines
    events = [msgspec.json.decode(line) for line in lines]
    decimals = [{tag: _decimals(value) for tag, value in event["values"].items()} for event in events]
    span = events[-1]["ts"] - events[0]["ts"] + 1.0
    rng = random.Random(seed)
    for turn in itertools.count(1):
        gains: dict[str, float] = {}
        for event, places in zip(events, decimals, strict=True):
            yield _moved(event, places, turn * span, gains, rng)


def chunks(lines: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    """Lists of `size` lines; a shorter rest is left out."""
    while len(chunk := list(itertools.islice(lines, size))) == size:
        yield chunk


def _unpacked(data: bytes) -> list[bytes]:
    text = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    return text.splitlines()


def _decimals(value: float) -> int:
    text = repr(value)
    return 8 if "e" in text else len(text.partition(".")[2])


def _moved(
    event: dict[str, Any], places: dict[str, int], later: float, gains: dict[str, float], rng: random.Random
) -> bytes:
    values = {}
    for tag, value in event["values"].items():
        if tag not in gains:
            gains[tag] = 1.0 + rng.uniform(-_SPREAD, _SPREAD)
        values[tag] = round(value * gains[tag], places[tag])
    return msgspec.json.encode({**event, "ts": event["ts"] + later, "values": values})
