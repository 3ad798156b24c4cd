"""Rows of CSV files become readings or texts (RFC 4180, but for line ends within quotes: a row is a line).

The header is the first line of each file. Where reading goes on in the middle of a file it is read again from
its start, so a restart needs nothing that was not committed.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from pipeline.events import MAX_EVENT_BYTES, Line, Origin
from pipeline.sources.formats import (
    RowError,
    checked_id,
    checked_source,
    event_json,
    lines_of,
    number,
    texts_of,
    time_reader,
)

if TYPE_CHECKING:
    from pipeline.format_settings import CsvFormat

__all__ = ["CsvPlan", "CsvRows"]

MAX_TAG = 64  # characters, as in an event
MAX_HEADER_BYTES = 16 << 10  # less than what is read again of a file's start
_BOM = "\ufeff"


class CsvPlan:
    """The settings, ready to be used; shared by all files of a source.

    Attributes:
        settings: As they are.
        time: Seconds since 1970 from a cell of the time column.
        missing: Cells that are no value.
    """

    def __init__(self, settings: CsvFormat) -> None:
        self.settings = settings
        self.time: Callable[[str], float] = time_reader(settings.time_format, settings.time_zone)
        self.missing = frozenset(("", *settings.missing))
        self.taken = {settings.time, settings.source, settings.id, settings.text} - {""}

    def rows(self, texts: Sequence[str]) -> Iterator[list[str] | RowError]:
        """Split lines into cells, one row a line."""
        quote = self.settings.quote
        if quote and any(quote in text for text in texts):
            for text in texts:
                yield self._row(text) if quote in text else text.split(self.settings.delimiter)
        else:  # without quotes that is all there is to CSV
            delimiter = self.settings.delimiter
            for text in texts:
                yield text.split(delimiter)

    def _row(self, text: str) -> list[str] | RowError:
        rows = csv.reader(
            [text], delimiter=self.settings.delimiter, quotechar=self.settings.quote, strict=True
        )
        try:
            return next(rows)
        except csv.Error as error:
            why = "a quote is not closed on its line" if "end of data" in str(error) else str(error)
            return RowError(f"not CSV: {why}; a row must be one line")


class _Columns:
    """Where in the rows of one file what stands, by its header."""

    def __init__(self, names: Sequence[str], plan: CsvPlan) -> None:
        settings = plan.settings
        self.count = len(names)
        self.names = list(names)
        self.cells = list(names)  # of the header itself, should it come again
        wanted = settings.map or {
            name: name for name in names if name and name not in plan.taken and not settings.text
        }
        if not settings.columns and all(_is_number(name) for name in names):
            raise RowError("the first line holds numbers, no names: set columns for files without a header")
        for name in (*plan.taken, *wanted):
            if names.count(name) != 1:
                many = "names it more than once" if name in names else "does not name it"
                raise RowError(f"column {name[:70]!r}: the header {many}; see {_where(settings)}")
        for tag in wanted.values():
            if len(tag) > MAX_TAG:
                raise RowError(f"column {tag[:70]!r} is too long for a tag: give it a shorter one in map")
        if not wanted and not settings.text:
            raise RowError("no column is left for values")
        self.values = [(names.index(name), tag) for name, tag in wanted.items()]
        places = [at for at, _ in self.values]
        self.pick = itemgetter(*places, places[0]) if places else None  # at least two, so that it is a tuple
        self.time, self.source, self.id, self.text = (
            names.index(name) if name else -1
            for name in (settings.time, settings.source, settings.id, settings.text)
        )


class CsvRows:
    """Makes events of the lines of one CSV file."""

    def __init__(self, plan: CsvPlan) -> None:
        self._plan = plan
        self._settings = plan.settings
        self._columns: _Columns | RowError | None = None
        if self._settings.columns:
            self._columns = self._columns_of(list(self._settings.columns))

    def shape(
        self, lines: Sequence[tuple[int, bytes]], origin: Origin, first_line: bytes
    ) -> tuple[list[Line], int]:
        """Make an event of each row; the header is none."""
        if self._columns is None and first_line:
            self._learn(first_line)
        head: list[Line] = []
        if self._columns is None:
            self._learn(lines[0][1])
            refused = str(self._columns) if isinstance(self._columns, RowError) else ""
            head = [Line(lines[0][1], lines[0][0], origin, "", refused)] if refused else []
            lines = lines[1:]
        texts = texts_of(lines, self._settings.encoding, replace=self._settings.invalid == "replace")
        rows = self._plan.rows([text or "" for text in texts])
        made, skipped = lines_of(lines, origin, self._event, rows, texts)
        return head + made, skipped

    def is_whole(self, line: bytes) -> bool:
        """Whether it has all its cells; one that was cut within the last cell looks whole too."""
        (text,) = texts_of([(0, line)], self._settings.encoding, replace=True)
        (row,) = self._plan.rows([text or ""])
        columns = self._columns
        return isinstance(columns, _Columns) and isinstance(row, list) and len(row) == columns.count

    def _learn(self, line: bytes) -> None:
        (text,) = texts_of([(0, line)], self._settings.encoding, replace=False)
        (row,) = self._plan.rows([(text or "").removeprefix(_BOM)])
        if len(line) > MAX_HEADER_BYTES:
            self._columns = RowError(f"the header is longer than {MAX_HEADER_BYTES} bytes")
        elif text is None:
            self._columns = RowError(f"the header is not {self._settings.encoding}: set encoding")
        elif isinstance(row, RowError):
            self._columns = RowError(f"the header is {row}")
        else:
            self._columns = self._columns_of([name.strip() for name in row])

    def _columns_of(self, names: list[str]) -> _Columns | RowError:
        try:
            return _Columns(names, self._plan)
        except RowError as error:
            return error

    def _event(self, row: list[str] | RowError, text: str | None, data: bytes) -> bytes | None:
        """Write the event of a row, None for a header that comes again. Raises: RowError."""
        columns = self._columns
        if isinstance(columns, RowError):
            raise columns
        assert columns is not None, "learned before"
        if len(data) > MAX_EVENT_BYTES:
            raise RowError(f"a row of more than {MAX_EVENT_BYTES} bytes")
        if text is None:
            raise RowError(f"not {self._settings.encoding} text: set encoding")
        if isinstance(row, RowError):
            raise row
        if len(row) != columns.count:
            raise RowError(f"{len(row)} cells where {_where(self._settings)} has {columns.count}")
        if row[0] == columns.cells[0] and row == columns.cells:
            return None
        return event_json(self._fields(columns, row))

    def _fields(self, columns: _Columns, row: list[str]) -> dict[str, object]:
        event: dict[str, object] = {"kind": "reading"}
        if columns.time >= 0:
            event["ts"] = self._plan.time(row[columns.time])
        if columns.source >= 0:
            event["source"] = checked_source(row[columns.source].strip())
        if columns.id >= 0 and (identity := row[columns.id].strip()):
            event["id"] = checked_id(identity)
        if columns.text >= 0:
            event["kind"] = "text"
            event["text"] = row[columns.text]
            if not row[columns.text].strip():
                raise RowError(f"the cell of {self._settings.text!r} is empty: there is no text")
        else:
            event["values"] = self._values(columns, row)
        return event

    def _values(self, columns: _Columns, row: list[str]) -> dict[str, float]:
        missing = self._plan.missing
        if self._settings.decimal == "." and columns.pick is not None:
            try:  # all but odd rows
                values = {tag: float(row[at]) for at, tag in columns.values if row[at] not in missing}
            except ValueError:
                values = {}
            # float() takes 1_000 for a number.
            if values and math.isfinite(sum(values.values())) and "_" not in "".join(columns.pick(row)):
                return values
        return self._odd_values(columns, row)

    def _odd_values(self, columns: _Columns, row: list[str]) -> dict[str, float]:
        values: dict[str, float] = {}
        for at, tag in columns.values:
            cell = row[at].strip()
            if cell in self._plan.missing:
                continue
            try:
                values[tag] = number(cell, self._settings.decimal)
            except RowError as error:
                if self._settings.not_numeric == "refuse":
                    hint = 'leave the column out of map, or set not_numeric = "ignore"'
                    raise RowError(f"column {columns.names[at]!r}: {error} ({hint})") from None
        if not values:
            raise RowError("no value in this row")
        return values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text
    return True


def _where(settings: CsvFormat) -> str:
    return "columns" if settings.columns else "the header"
