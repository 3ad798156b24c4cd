"""A stream of any length whose every event follows from its number, and the connector that sends it.

Of each 500 inputs one comes twice and one is no event; so duplicates and dead letters are fed too, and the
event behind each seq of the ring is known without keeping any.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.events import Line, Origin
from pipeline.sources.inbox import Chunk, Inbox, ReaderThread, Settled

__all__ = ["PERIOD", "GeneratedConnector", "input_of", "line"]

PERIOD = 500
_TWICE, _BROKEN = 250, 499  # places in a period: the input before it again, no event
_STORED = PERIOD - 2
_LINES_A_CHUNK = 250
_BEGAN_S = 1.7e9
_A_SECOND = 10


def line(number: int) -> bytes:
    """Input `number` of the stream, from 0: nine readings, then a text, and what the module says."""
    place = number % PERIOD
    if place == _BROKEN:
        return b'{"kind":"reading","source":"pump-1","values":{"pressure":NaN},"number":%d}' % number
    if place == _TWICE:
        number -= 1
    ts = f"{_BEGAN_S + number / _A_SECOND:.1f}"
    a, b, c = number * 7_919 % 9_973, number * 104_729 % 9_967, number * 1_299_709 % 9_949
    if number % 10 == 0:
        return (
            f'{{"kind":"text","source":"cmms","ts":{ts},"text":"ORDER {number} REPLACE BEARING {a}'
            f' OF PUMP {b % 12}, {c} HOURS"}}'
        ).encode()
    return (
        f'{{"kind":"reading","source":"pump-{number % 3}","ts":{ts},"values":{{"pressure":{a / 1_000},'
        f'"flow":{b / 80},"temperature":{60 + c / 500},"current":{(a + b) / 9_000}}}}}'
    ).encode()


def input_of(seq: int) -> int:
    """Number of the input that became the sample with this seq."""
    place = seq % _STORED
    return seq // _STORED * PERIOD + place + (place >= _TWICE)


class GeneratedConnector:
    """Sends the first `count` inputs as fast as they are taken; its position is how many it sent."""

    name = "generated"
    _input = "generated:stream"

    def __init__(self, count: int) -> None:
        self._count = count
        self._thread = ReaderThread()

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to send."""
        first = int(positions.get(self._input, b"0"))
        self._thread.start(self, inbox, lambda: self._send(inbox, first))

    def acknowledge(self, settled: list[Settled]) -> None:
        """Nobody waits for it."""

    def stop(self) -> None:
        """Stop sending."""
        self._thread.stop()

    def _send(self, inbox: Inbox, first: int) -> None:
        for start in range(first, self._count, _LINES_A_CHUNK):
            end = min(start + _LINES_A_CHUNK, self._count)
            origin = Origin("generated", self._input, _BEGAN_S + end / _A_SECOND)
            lines = [Line(line(i), i, origin) for i in range(start, end)]
            if not inbox.put(Chunk(self, lines, {self._input: b"%d" % end})):
                return
