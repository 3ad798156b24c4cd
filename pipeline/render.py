"""Render: readings become text a model can learn; and which readings say something new."""

from __future__ import annotations

import string
from collections.abc import Mapping

import msgspec

from pipeline.events import Reading

__all__ = ["Deadband", "TemplateError", "compile_template", "format_value", "render_reading"]


class TemplateError(ValueError):
    """A template that cannot be used; the message says what is wrong in it."""


class Deadband(msgspec.Struct, frozen=True):
    """Report by exception: a reading is kept when a value moved, or when it was silent for too long.

    Attributes:
        bands: Tag -> how far it may move unreported; None in `everywhere`'s place looks only at these.
        everywhere: Band of all other tags, None if they are not looked at.
        max_silence_s: Report at least this often, seconds of stream time; 0 never for silence alone.
    """

    bands: dict[str, float] = {}
    everywhere: float | None = None
    max_silence_s: float = 0.0

    def silent(self, last: Mapping[str, float], values: Mapping[str, float], age_s: float) -> bool:
        """Whether a reading differs too little from the last reported one to be reported."""
        if self.max_silence_s and age_s >= self.max_silence_s:
            return False
        for tag, value in values.items():
            band = self.bands.get(tag, self.everywhere)
            if band is None:
                continue
            before = last.get(tag)
            if before is None or abs(value - before) > band:
                return False
        return True


def format_value(value: float, digits: int) -> str:
    """Write a number with so many significant digits, without an exponent where people write none.

    >>> format_value(233.062, 3), format_value(1234.5, 3), format_value(0.0265878, 3), format_value(32.0, 3)
    ('233', '1230', '0.0266', '32')
    """
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return "0" if text == "-0" else text
    exponent = int(text.partition("e")[2])
    if not -7 < exponent < 16:
        return text
    if exponent > 0:
        return f"{float(text):.0f}"
    return f"{float(text):.{digits - 1 - exponent}f}".rstrip("0").rstrip(".")


def compile_template(template: str) -> list[tuple[str, str]]:
    """Split a template into (literal text, tag) pairs; the last tag may be "".

    Only {tag} and {{ }} are understood: no attribute, index, conversion or format can be asked for, so
    that no template reaches anything but a reading's own values.
    Raises: TemplateError.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise TemplateError(f"{error}; write {{tag}} for a value and {{{{ }}}} for braces") from None
    out = []
    for literal, field, spec, conversion in parts:
        if field is not None and (spec or conversion or not field):
            raise TemplateError(f"only a bare {{tag}} is understood, not {{{field}...}}; use `digits`")
        out.append((literal, field or ""))
    return out


def render_reading(
    event: Reading,
    source: str,
    *,
    template: str,
    tags: tuple[str, ...],
    units: Mapping[str, str],
    digits: int,
) -> str:
    """Write a reading as text.

    Without a template: "pump-1 pressure=3.42bar flow=123", the values in the event's order or in that of
    `tags`. A tag that the reading lacks is left out; in a template it becomes "?".
    """

    def value(tag: str) -> str:
        found = event.values.get(tag)
        if found is None:
            return "?"
        return format_value(found, digits) + units.get(tag, event.units.get(tag, ""))

    if template:
        return "".join(
            literal + (value(field) if field else "") for literal, field in compile_template(template)
        )
    written = [tag for tag in tags if tag in event.values] if tags else event.values
    return " ".join([source, *(f"{tag}={value(tag)}" for tag in written)])
