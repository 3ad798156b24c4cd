"""Files that are not JSON: rows of CSV and log lines, with every setting that says how they are read."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load
from pipeline.decode import decode_event
from pipeline.events import MAX_EVENT_BYTES, Line, Origin
from pipeline.format_settings import CsvFormat, PatternFormat
from pipeline.sources.csv_rows import CsvPlan, CsvRows
from pipeline.sources.files import FilesConnector
from pipeline.sources.formats import Shaper, shaper_for
from pipeline.sources.patterns import LinePlan, PatternLines
from pipeline.units import Size
from tests.sources import reading

ORIGIN = Origin("site", "files:site:x", 0.0)
NOON = 1_763_985_600.0  # 2025-11-24T12:00:00Z


def lines_of(shaper: Shaper, text: str | bytes, first_line: bytes = b"") -> tuple[list[Line], int]:
    data = text if isinstance(text, bytes) else text.encode()
    return shaper.shape([(10 * n, line) for n, line in enumerate(data.split(b"\n"))], ORIGIN, first_line)


def rows(text: str | bytes, settings: CsvFormat | None = None) -> list[dict[str, object] | str]:
    """What becomes of rows: events, or why they are none."""
    return results(lines_of(CsvRows(CsvPlan(settings or CsvFormat())), text)[0])


def logged(text: str | bytes, settings: PatternFormat | None = None) -> list[dict[str, object] | str]:
    """What becomes of log lines."""
    return results(lines_of(PatternLines(LinePlan(settings or PatternFormat())), text)[0])


def results(lines: list[Line]) -> list[dict[str, object] | str]:
    out: list[dict[str, object] | str] = []
    for line in lines:
        if not line.refused:
            decode_event(line.data)
        out.append(line.refused or json.loads(line.data))
    return out


def values(text: str | bytes, settings: CsvFormat | None = None) -> list[object]:
    """Only the values of the events."""
    return [row if isinstance(row, str) else row["values"] for row in rows(text, settings)]


def source_of(path: Path, body: str) -> FilesConnector:
    """A finite connector as the configuration makes it."""
    config = path.parent / "edgewater.toml"
    config.write_text(f'[[sources]]\nname = "site"\nkind = "files"\npath = "{path}"\n{body}\n')
    (source,) = load(config).sources
    return FilesConnector("site", source.path, shaper_for(source), finite=True)


def faults_of(tmp_path: Path, body: str) -> list[str]:
    """The keys that are complained about."""
    config = tmp_path / "edgewater.toml"
    config.write_text(f'[[sources]]\nname = "site"\nkind = "files"\npath = "x"\n{body}\n')
    with pytest.raises(ConfigError) as error:
        load(config)
    return [fault.dotted.removeprefix("sources[0].") for fault in error.value.faults]


# -- csv --------------------------------------------------------------------------------------------


def test_the_header_names_the_values() -> None:
    assert rows("a,b\n1,2.5\n-3e2,4") == [
        {"kind": "reading", "values": {"a": 1.0, "b": 2.5}},
        {"kind": "reading", "values": {"a": -300.0, "b": 4.0}},
    ]


def test_the_header_is_read_again_where_a_restart_begins_in_mid_file(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("a;b\n1;2\n")
    body = 'format = "csv"\n[sources.csv]\ndelimiter = ";"\nmap = { b = "pressure" }'
    with reading(source_of(path, body)) as reader:
        reader.to_end()
    with path.open("a") as file:
        file.write("3;4\n5\n")
    with reading(source_of(path, body), reader.positions) as again:
        again.to_end()
    assert results(reader.lines) == [{"kind": "reading", "values": {"pressure": 2.0}}]
    assert results(again.lines) == [
        {"kind": "reading", "values": {"pressure": 4.0}},
        "1 cells where the header has 2",
    ]
    assert [line.offset for line in (*reader.lines, *again.lines)] == [4, 8, 12]


def test_a_header_may_come_alone() -> None:
    """The file was just begun: its rows follow in a later piece."""
    shaper = CsvRows(CsvPlan(CsvFormat()))
    assert lines_of(shaper, "a,b") == ([], 0)
    assert results(lines_of(shaper, "1,2")[0]) == [{"kind": "reading", "values": {"a": 1.0, "b": 2.0}}]


def test_each_file_has_its_own_header(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("a,b\n1,2\n")
    (tmp_path / "2.csv").write_text("b,a\n1,2\n")
    with reading(source_of(tmp_path / "*.csv", 'format = "csv"')) as reader:
        reader.to_end()
    found = {line.origin.input[-5:]: json.loads(line.data)["values"] for line in reader.lines}
    assert found == {"1.csv": {"a": 1.0, "b": 2.0}, "2.csv": {"b": 1.0, "a": 2.0}}


def test_a_header_that_comes_again_is_no_row() -> None:
    shaped, skipped = lines_of(CsvRows(CsvPlan(CsvFormat())), "a,b\n1,2\na,b\n3,4")
    assert [json.loads(line.data)["values"]["a"] for line in shaped] == [1.0, 3.0]
    assert skipped == 1


def test_columns_can_be_named_for_files_without_a_header() -> None:
    settings = CsvFormat(columns=("a", "b"))
    assert values("1,2\n3,4", settings) == [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}]
    (refused,) = rows("1,2,3", settings)
    assert refused == "3 cells where columns has 2"


def test_numbers_are_no_header() -> None:
    """The usual mistake: a file that has none would lose its first row, and its tags would be numbers."""
    assert all("set columns" in str(row) for row in rows("1,2\n3,4"))


def test_delimiter_quotes_and_decimal_comma() -> None:
    assert values('a;"b;c"\n"1,5";-2,25', CsvFormat(delimiter=";", decimal=",")) == [{"a": 1.5, "b;c": -2.25}]
    assert values("a\tb\n1\t2", CsvFormat(delimiter="\t")) == [{"a": 1.0, "b": 2.0}]
    assert values("a,b\n'1',2", CsvFormat(quote="'")) == [{"a": 1.0, "b": 2.0}]
    texts = rows('a,b\nsay "x",2', CsvFormat(quote="", text="a"))
    assert texts == [{"kind": "text", "text": 'say "x"'}]
    doubled = rows('a,b\n"say ""x"", y",2', CsvFormat(text="a"))
    assert doubled == [{"kind": "text", "text": 'say "x", y'}]


@pytest.mark.parametrize("cell", ["1.234,5", "1.5", "1_000", "1 000", "inf", "nan(1)", "0x10", "1e999"])
def test_what_only_looks_like_a_number_is_refused(cell: str) -> None:
    (row,) = rows(f"a;b\n{cell};2", CsvFormat(delimiter=";", decimal=","))
    assert f"column 'a': '{cell}' is no number" in str(row)


def test_thousands_are_not_guessed_beside_a_decimal_point() -> None:
    assert "is no number" in str(rows("a\n1_000")[0])
    assert values("a\n 1.5 ") == [{"a": 1.5}]


def test_an_open_quote_is_refused_and_the_next_row_is_whole() -> None:
    refused, row = rows('a,b\n"1,2\n3,4')
    assert "a quote is not closed on its line" in str(refused)
    assert row == {"kind": "reading", "values": {"a": 3.0, "b": 4.0}}


def test_a_row_with_more_or_fewer_cells_is_refused_with_both_numbers() -> None:
    assert rows("a,b\n1\n1,2,3\n") == [
        "1 cells where the header has 2",
        "3 cells where the header has 2",
        "1 cells where the header has 2",
    ]


def test_empty_cells_and_those_that_stand_for_nothing_are_left_out() -> None:
    assert values("a,b,c\n1,,NaN\n,-, \n1,2,-") == [{"a": 1.0}, "no value in this row", {"a": 1.0, "b": 2.0}]
    settings = CsvFormat(missing=("-999",))
    assert values("a,b\n1,-999", settings) == [{"a": 1.0}]
    assert "is no number" in str(values("a,b\n1,NaN", settings)[0])


def test_a_cell_that_is_no_number_can_be_left_out() -> None:
    assert "column 'b': 'on' is no number" in str(rows("a,b\n1,on")[0])
    assert values("a,b\n1,on\nx,y", CsvFormat(not_numeric="ignore")) == [{"a": 1.0}, "no value in this row"]


def test_only_mapped_columns_are_values() -> None:
    settings = CsvFormat(map={"P [bar]": "pressure"}, time="t", time_format="unix")
    assert rows(f"t,P [bar],note\n{NOON},3.5,hello", settings) == [
        {"kind": "reading", "ts": NOON, "values": {"pressure": 3.5}}
    ]


def test_source_and_id_come_from_columns() -> None:
    settings = CsvFormat(source="machine", id="row")
    good, bad, long, none = rows(
        f"machine,row,v\npump-1,7,1\n../x,8,1\npump-1,{'9' * 129},1\npump-1,,1", settings
    )
    assert good == {"kind": "reading", "source": "pump-1", "id": "7", "values": {"v": 1.0}}
    assert "'../x' is no name of a source" in str(bad)
    assert "an id of 129 characters" in str(long)
    assert "id" not in none


def test_a_column_can_be_the_text() -> None:
    settings = CsvFormat(text="what", time="when", time_zone="UTC")
    event, empty = rows(
        'when,what,who\n2025-11-24T12:00:00,"leak, at pump",x\n2025-11-24T12:00:00, ,x', settings
    )
    assert event == {"kind": "text", "ts": NOON, "text": "leak, at pump"}
    assert "'what' is empty" in str(empty)


@pytest.mark.parametrize(
    ("form", "zone", "cell"),
    [
        ("iso", "", "2025-11-24T12:00:00Z"),
        ("iso", "UTC", "2025-11-24T13:00:00+01:00"),  # its own goes before the set one
        ("iso", "+02:00", "2025-11-24 14:00"),
        ("unix", "", "1763985600"),
        ("unix_ms", "", "1763985600000"),
        ("%d.%m.%Y %H:%M:%S", "Europe/Berlin", "24.11.2025 13:00:00"),
        ("%d/%b/%Y:%H:%M:%S %z", "", "24/Nov/2025:12:00:00 +0000"),
    ],
)
def test_times_are_read_as_set(form: str, zone: str, cell: str) -> None:
    settings = CsvFormat(time="t", time_format=form, time_zone=zone)
    assert rows(f"t,v\n{cell},1", settings) == [{"kind": "reading", "ts": NOON, "values": {"v": 1.0}}]


@pytest.mark.parametrize(
    ("form", "zone", "cell", "why"),
    [
        ("iso", "", "2025-11-24T12:00:00", "set time_zone"),
        ("iso", "UTC", "yesterday", "no time of the form iso"),
        ("unix", "", "1763985600000", "another unit"),
        ("unix", "", "", "is no number"),
        ("%d.%m.%Y", "UTC", "31.02.2025", "no time of the form"),
        ("iso", "UTC", "9" * 4_000, "no time"),
    ],
)
def test_times_that_are_none_are_refused(form: str, zone: str, cell: str, why: str) -> None:
    (row,) = rows(f"t,v\n{cell},1", CsvFormat(time="t", time_format=form, time_zone=zone))
    assert why in str(row)


def test_of_an_hour_that_comes_twice_the_first_is_meant_and_summer_is_known() -> None:
    settings = CsvFormat(time="t", time_zone="Europe/Berlin")
    cells = ["2025-10-26T02:30:00", "2025-07-01T12:00:00"]
    times = [row["ts"] for row in rows("\n".join(["t,v", *(f"{c},1" for c in cells)]), settings)]  # type: ignore[index]
    assert [datetime.datetime.fromtimestamp(float(str(t)), datetime.UTC).hour for t in times] == [0, 10]


def test_encodings_and_a_byte_order_mark() -> None:
    cp1252 = "Öl °C\n20".encode("cp1252")
    assert values(cp1252, CsvFormat(encoding="cp1252")) == [{"Öl °C": 20.0}]
    assert all("set encoding" in str(row) for row in rows(cp1252))
    assert values("\ufeffa,b\n1,2") == [{"a": 1.0, "b": 2.0}]
    refused, good = rows(b"a,b\n1,\xff\n1,2", CsvFormat(text="b"))
    assert "set encoding" in str(refused)
    assert good == {"kind": "text", "text": "2"}
    replaced = rows(b"a,b\n1,\xff", CsvFormat(text="b", invalid="replace"))
    assert replaced == [{"kind": "text", "text": "\ufffd"}]


@pytest.mark.parametrize(
    ("header", "settings", "why"),
    [
        ("a,b", CsvFormat(map={"c": "x"}), "column 'c': the header does not name it"),
        ("a,a", CsvFormat(), "names it more than once"),
        ("t", CsvFormat(time="t", time_zone="UTC"), "no column is left for values"),
        ("a" * 65, CsvFormat(), "too long for a tag"),
        ('"a', CsvFormat(), "a quote is not closed"),
        ("a" * 20_000, CsvFormat(), "longer than"),
    ],
)
def test_a_header_that_does_not_fit_refuses_every_row(header: str, settings: CsvFormat, why: str) -> None:
    found = rows(f"{header}\n1,2\n3,4", settings)
    assert len(found) == 3, "nothing is lost"
    assert all(why in str(row) for row in found)


def test_a_row_or_its_event_may_not_be_too_large() -> None:
    found = rows(
        "a,b\n" + "x" * (MAX_EVENT_BYTES + 1) + ",1\n" + "\\" * (MAX_EVENT_BYTES - 10) + ",1",
        CsvFormat(text="a"),
    )
    assert "a row of more than" in str(found[0])
    assert "becomes an event of" in str(found[1])


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ('delimiter = ",,"', "delimiter"),
        ('quote = ","', "quote"),
        ('decimal = ","', "decimal"),
        ('map = { a = "x" }\ntext = "b"', "map"),
        ('map = { a = "x", b = "x" }', "map"),
        ('columns = ["a", "a"]', "columns"),
        ('columns = ["a"]\ntime = "t"', "columns"),
        ('time_format = "hh:mm"', "time_format"),
        ('time_format = "%H:%M"', "time_zone"),
        ('time_zone = "Mars/Base"', "time_zone"),
    ],
)
def test_settings_of_csv_that_do_not_fit_are_named(tmp_path: Path, body: str, key: str) -> None:
    assert faults_of(tmp_path, f'format = "csv"\n[sources.csv]\n{body}') == [f"csv.{key}"]


# -- lines ------------------------------------------------------------------------------------------


def test_without_a_pattern_each_line_is_a_text() -> None:
    assert logged("one\n\n  \ntwo ") == [{"kind": "text", "text": "one"}, {"kind": "text", "text": "two "}]


def test_groups_make_text_time_source_and_id() -> None:
    settings = PatternFormat(regex=r"(?P<ts>\S+) <(?P<source>[^>]*)> #(?P<id>\d+) (?P<text>.*)")
    good, bad = logged(
        "2025-11-24T12:00:00Z <pump-1> #7 seal leaks\n2025-11-24T12:00:00Z <../x> #8 y", settings
    )
    assert good == {"kind": "text", "ts": NOON, "source": "pump-1", "id": "7", "text": "seal leaks"}
    assert "is no name of a source" in str(bad)


def test_other_groups_are_values_under_their_tags() -> None:
    settings = PatternFormat(regex=r"p=(?P<p>\S+)(?: t=(?P<t>\S+))?", map={"p": "pressure (bar)"})
    assert logged("p=1.5 t=20\np=2\np=x", settings) == [
        {"kind": "reading", "values": {"pressure (bar)": 1.5, "t": 20.0}},
        {"kind": "reading", "values": {"pressure (bar)": 2.0}},
        "group 'p': 'x' is no number",
    ]
    (none,) = logged("-", PatternFormat(regex=r"-(?P<p>\d+)?"))
    assert "no group with a value" in str(none)


def test_the_pattern_fits_from_the_beginning_of_the_line() -> None:
    settings = PatternFormat(regex=r"ERROR (?P<text>.*)")
    assert logged("ERROR x\nINFO ERROR y", settings) == [
        {"kind": "text", "text": "x"},
        "does not fit the pattern",
    ]


def test_without_a_text_group_the_whole_line_is_the_text() -> None:
    settings = PatternFormat(regex=r"(?P<ts>\S+) .*")
    assert logged("2025-11-24T12:00:00Z up", settings) == [
        {"kind": "text", "ts": NOON, "text": "2025-11-24T12:00:00Z up"}
    ]


def test_what_does_not_fit_is_refused_taken_or_skipped() -> None:
    regex = r"E (?P<text>.*)"
    assert logged("E x\nnoise", PatternFormat(regex=regex))[1] == "does not fit the pattern"
    assert logged("noise", PatternFormat(regex=regex, unmatched="text")) == [
        {"kind": "text", "text": "noise"}
    ]
    shaper = PatternLines(LinePlan(PatternFormat(regex=regex, unmatched="skip")))
    shaped, skipped = lines_of(shaper, "noise\nE x\nnoise")
    assert (len(shaped), skipped) == (1, 2)


def test_skipped_lines_are_counted_and_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "app.log"
    path.write_text("noise\n" * 5)
    body = 'format = "lines"\n[sources.pattern]\nregex = \'E (?P<text>.*)\'\nunmatched = "skip"'
    with reading(source_of(path, body)) as reader:
        reader.to_end()
        assert reader.lines == []
        assert reader.inbox.state(reader.connector).counts == {"skipped": 5}
    with reading(source_of(path, body), reader.positions) as again:
        again.to_end()
        assert "skipped" not in again.inbox.state(again.connector).counts


def test_terminal_escapes_are_removed_unless_they_shall_stay() -> None:
    data = "\x1b[1;31mred\x1b[0m \x1b]0;title\x07bell\x07 \x9b\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \ttab"
    assert logged(data) == [{"kind": "text", "text": "red bell link \ttab"}]
    assert logged("\x1b[31mred", PatternFormat(strip_control=False)) == [
        {"kind": "text", "text": "\x1b[31mred"}
    ]


def test_an_escape_that_never_ends_takes_only_its_own_line() -> None:
    assert logged("a\x1b]0;never ends\nb\n\x1b[\nc") == [
        {"kind": "text", "text": "a"},
        {"kind": "text", "text": "b"},
        {"kind": "text", "text": "["},
        {"kind": "text", "text": "c"},
    ]


def test_a_line_may_be_as_long_as_is_set() -> None:
    settings = PatternFormat(max_line=Size.parse("10B"))
    short, long = logged("x" * 10 + "\n" + "x" * 11, settings)
    assert short == {"kind": "text", "text": "x" * 10}
    assert "raise max_line" in str(long)


def test_log_lines_have_encodings_too() -> None:
    latin = "Öl".encode("latin-1")
    assert logged(latin, PatternFormat(encoding="latin-1")) == [{"kind": "text", "text": "Öl"}]
    refused, good = logged(latin + b"\nb")
    assert "set encoding" in str(refused)
    assert good == {"kind": "text", "text": "b"}
    assert logged(latin, PatternFormat(invalid="replace")) == [{"kind": "text", "text": "\ufffdl"}]


def test_a_time_without_a_year_is_the_last_such_day() -> None:
    settings = PatternFormat(
        regex=r"(?P<ts>\w{3} [ \d]\d [\d:]{8}) (?P<text>.*)", time_format="%b %d %H:%M:%S", time_zone="UTC"
    )
    now = datetime.datetime.now(datetime.UTC)
    for days in (0, 5, 200, 360):
        then = (now - datetime.timedelta(days=days)).replace(microsecond=0)
        if (then.month, then.day) == (2, 29):
            continue
        (event,) = logged(f"{then:%b %d %H:%M:%S} x", settings)
        assert event == {"kind": "text", "ts": then.timestamp(), "text": "x"}
    assert "no time of the form" in str(logged("Feb 30 00:00:00 x", settings)[0])


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ("regex = '('", "regex"),
        ("regex = 'no group'", "regex"),
        ("regex = '(?P<text>(a+)+)'", "regex"),
        ("regex = '(?P<text>.*) (?P<v>1)'", "regex"),
        ("regex = '(?P<text>.*)'\nmap = { text = \"x\" }", "map"),
        ("regex = '(?P<a>1)(?P<b>2)'\nmap = { a = \"b\" }", "map"),
        ("regex = '(?P<ts>.*)'\ntime_format = \"noon\"", "time_format"),
        ('max_line = "1MiB"', "max_line"),
    ],
)
def test_settings_of_a_pattern_that_do_not_fit_are_named(tmp_path: Path, body: str, key: str) -> None:
    assert faults_of(tmp_path, f'format = "lines"\n[sources.pattern]\n{body}') == [f"pattern.{key}"]


def test_settings_of_another_format_are_named(tmp_path: Path) -> None:
    assert faults_of(tmp_path, 'format = "lines"\n[sources.csv]\ndelimiter = ";"') == ["csv"]
    assert faults_of(tmp_path, '[sources.pattern]\nunmatched = "text"') == ["pattern"]
