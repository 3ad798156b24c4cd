"""Render: readings become text a model can learn; and which readings say something new."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping

import msgspec

from pipeline.events import Reading

__all__ = ["Deadband", "ReadingText", "TemplateError", "compile_template", "format_value"]


MAX_FORMS, MAX_FORM_NAMES = 256, 32_768  # of a source; the names of all together, about 3 MB of them


class TemplateError(ValueError):
    """A template that cannot be used; the message says what is wrong in it."""


class Deadband(msgspec.Struct, frozen=True):
    """Report by exception: a reading is kept when a value moved, or when it was silent for too long.

    Attributes:
        bands: Tag -> how far it may move unreported; None in `everywhere`'s place looks only at these.
        everywhere: Band of all other tags, None if they are not looked at; below 0 every value has moved.
        max_silence_s: Report at least this often, seconds of stream time; 0 never for silence alone.
        on_change: Tags that are written only when their value is another one, or was not written for
            `max_silence_s`; the bands say nothing about them.
    """

    bands: dict[str, float] = {}
    everywhere: float | None = None
    max_silence_s: float = 0.0
    on_change: frozenset[str] = frozenset()

    def silent(self, last: Mapping[str, float], values: Mapping[str, float], age_s: float) -> bool:
        """Whether a reading differs too little from the last reported one to be reported.

        Those of `on_change` are left out of it: see `unchanged`.
        """
        if self.max_silence_s and age_s >= self.max_silence_s:
            return False
        for tag, value in values.items():
            if tag in self.on_change:
                continue
            band = self.bands.get(tag, self.everywhere)
            if band is None:
                continue
            before = last.get(tag)
            if before is None or abs(value - before) > band:
                return False
        return True

    def unchanged(
        self, last: Mapping[str, float], written: Mapping[str, float], values: Mapping[str, float], now: float
    ) -> set[str]:
        """The tags of `on_change` in a reading that have nothing to say.

        Args:
            last: Tag -> value when it was last reported.
            written: Tag -> stream time of that, seconds.
            values: The reading's.
            now: Its stream time, seconds.
        """
        return {
            tag
            for tag in self.on_change & values.keys()
            if tag in last
            and last[tag] == values[tag]
            and not (self.max_silence_s and now - written.get(tag, -math.inf) >= self.max_silence_s)
        }


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


class _Form(msgspec.Struct, frozen=True):
    """How readings with the same tags, units and order are written.

    Attributes:
        numbers: The text with "%.3g" where a value goes.
        texts: The same with "%s".
        tags: Whose value goes where; None for all, in the reading's order.
        e_count: How often "e" stands in the text without the values.
    """

    numbers: str
    texts: str
    tags: tuple[str, ...] | None
    e_count: int


class ReadingText:
    """Writes the readings of one source as text.

    Without a template: "pump-1 pressure=3.42bar flow=123", the values in the event's order or in that of
    `tags`. A tag that the reading lacks is left out; in a template it becomes "?".

    What depends on the names of the tags alone is done once for each set of them: a device sends few.

    Args:
        source: Its name.
        template: Text with {tag} where a value goes, "" for none.
        tags: Which values to write, in this order; empty writes all.
        units: Tag -> what to write behind its value, in place of the event's own.
        digits: Significant digits.
        grown: Called with the number of names of each set of tags that is remembered.
    """

    def __init__(
        self, source: str, *, template: str, tags: tuple[str, ...], units: Mapping[str, str], digits: int,
        grown: Callable[[int], None] = lambda count: None,
    ) -> None:  # fmt: skip
        self._grown = grown
        self._source, self._tags, self._units, self._digits = source, tags, units, digits
        self._template = compile_template(template) if template else []
        self._forms: dict[object, _Form] = {}
        self._form_names = 0

    def __call__(self, event: Reading) -> str:
        """A reading as text."""
        values = event.values
        names: object = (*values,) if not event.units else (*values, None, *event.units.items())
        form = self._forms.get(names) or self._form_of(names, event)
        tags = form.tags
        numbers = (*values.values(),) if tags is None else tuple([values[tag] for tag in tags])
        if 0.0 in numbers:
            numbers = tuple([number + 0.0 for number in numbers])  # a zero has no sign here
        text = form.numbers % numbers
        if text.count("e") == form.e_count:
            return text
        # A value was written with an exponent, which people do not write.
        return form.texts % tuple([format_value(number, self._digits) for number in numbers])

    def _form_of(self, names: object, event: Reading) -> _Form:
        pieces = self._pieces(event)
        numbers, texts, literals = [], [], []
        for literal, tag in pieces:
            if tag is not None and tag not in event.values:
                literal, tag = literal + "?", None
            literals.append(literal)
            unit = "" if tag is None else self._units.get(tag, event.units.get(tag, ""))
            literals.append(unit)
            literal, unit = literal.replace("%", "%%"), unit.replace("%", "%%")
            numbers.append(literal if tag is None else f"{literal}%.{self._digits}g{unit}")
            texts.append(literal if tag is None else f"{literal}%s{unit}")
        tags = tuple(tag for _, tag in pieces if tag in event.values)
        whole = None if tags == (*event.values,) else tags
        form = _Form("".join(numbers), "".join(texts), whole, "".join(literals).count("e"))
        count = len(event.values) + len(event.units)
        # A source may invent tags without end, and an event may hold tens of thousands.
        if len(self._forms) >= MAX_FORMS or self._form_names + count > MAX_FORM_NAMES:
            self._forms.clear()
            self._form_names = 0
        self._form_names += count
        self._grown(count)
        self._forms[names] = form
        return form

    def _pieces(self, event: Reading) -> list[tuple[str, str | None]]:
        """Pairs of a literal text and the tag whose value follows it, None for none."""
        if self._template:
            return [(literal, tag or None) for literal, tag in self._template]
        tags = [tag for tag in self._tags if tag in event.values] if self._tags else [*event.values]
        return [(self._source, None), *((f" {tag}=", tag) for tag in tags)]
