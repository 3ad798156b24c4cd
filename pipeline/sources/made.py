"""Events that a connector makes itself, from registers or nodes: as JSON, like those that are received."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

__all__ = ["encode_reading", "encode_text"]

_encode = msgspec.json.Encoder().encode


def encode_reading(
    values: Mapping[str, float], *, ts: float | None, source: str = "", units: Mapping[str, str] = {}
) -> bytes:
    """Write a reading.

    Args:
        values: Tag -> value, each finite.
        ts: When it was measured, seconds since 1970; None leaves it out.
        source: Left out where empty: the source that it comes through.
        units: Tag -> unit.
    """
    event: dict[str, object] = {"kind": "reading"} | _head(ts, source) | {"values": values}
    return _encode(event | {"units": units} if units else event)


def encode_text(text: str, *, ts: float | None, source: str = "") -> bytes:
    """Write a text."""
    return _encode({"kind": "text"} | _head(ts, source) | {"text": text})


def _head(ts: float | None, source: str) -> dict[str, object]:
    head: dict[str, object] = {"source": source} if source else {}
    return head | ({} if ts is None else {"ts": ts})
