"""Durations and sizes as the configuration writes them: "10s", "256MiB", never without a unit."""

from __future__ import annotations

import math
import re
from typing import Final

__all__ = ["Duration", "Size"]

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_BYTES: Final = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|min|s|m|h|d|w)", re.ASCII)
_DURATION: Final = re.compile(rf"(?:{_DURATION_PART.pattern}\s*)+", re.ASCII)
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(B|[kMGT]B|[KMGT]iB)", re.ASCII)


class Duration(float):
    """A length of time in seconds that prints itself with a unit; 0 means off where a key says so."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Read "10s", "1h30m", "500ms", "7d".

        Raises: ValueError whose message says what is accepted.
        """
        stripped = text.strip()
        if not _DURATION.fullmatch(stripped):
            raise ValueError('a duration is a number with ms, s, m, h, d or w, as in "10s" or "1h30m"')
        seconds = math.fsum(float(count) * _SECONDS[unit] for count, unit in _DURATION_PART.findall(stripped))
        if seconds > 100 * 366 * 86400:
            raise ValueError("a duration is at most 100 years")
        return cls(seconds)

    def __str__(self) -> str:
        """Give the shortest text that parses to the same duration, in one unit."""
        if not self:
            return "0s"
        for unit in ("w", "d", "h", "m"):
            if self % _SECONDS[unit] == 0:
                return f"{self / _SECONDS[unit]:.0f}{unit}"
        milliseconds = round(self * 1000, 6)
        if self < 1 and milliseconds.is_integer():
            return f"{milliseconds:.0f}ms"
        # Fixed point: an exponent would not parse.
        return f"{float(self):.6f}".rstrip("0").rstrip(".") + "s"

    def __repr__(self) -> str:
        """Show the unit in tracebacks and logs too."""
        return f"Duration({str(self)!r})"


class Size(int):
    """A number of bytes that remembers to print itself with a unit."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read "256MiB", "1.5GB", "512 B"; KiB is 1,024 bytes and kB is 1,000.

        Raises: ValueError whose message says what is accepted.
        """
        match = _SIZE.fullmatch(text.strip())
        if not match:
            raise ValueError(
                'a size is a number with B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, as in "256MiB"'
            )
        value = float(match[1]) * _BYTES[match[2]]
        if value > 2**50:
            raise ValueError("a size is at most 1024TiB")
        # Whole numbers stay exact; a fraction of a unit is cut to whole bytes.
        return cls(int(match[1]) * _BYTES[match[2]] if match[1].isdigit() else int(value))

    def __str__(self) -> str:
        """Give the shortest text that parses to the same size, in a binary unit."""
        for unit in ("TiB", "GiB", "MiB", "KiB"):
            if self and self % _BYTES[unit] == 0:
                return f"{self // _BYTES[unit]}{unit}"
        return f"{int(self)}B"

    def __repr__(self) -> str:
        """Show the unit in tracebacks and logs too."""
        return f"Size({str(self)!r})"
