"""The demo's streams: what ships is whole, in order, and what its maker makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from pipeline.demo_data import WEATHER, WORK_ORDERS
from pipeline.demo_data.make import weather, work_orders


def _events(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
        return [json.loads(line) for line in reader.read().splitlines()]


@pytest.mark.parametrize(
    ("path", "count", "distinct", "kind"),
    [(WORK_ORDERS, 5485, 4777, "text"), (WEATHER, 1147, 1147, "reading")],
)
def test_a_stream_ships_whole_and_in_time_order(path: Path, count: int, distinct: int, kind: str) -> None:
    """The figures that README and demo quote."""
    events = _events(path)
    assert len(events) == count
    assert {event["kind"] for event in events} == {kind}
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    assert (
        len({event.get("text") or json.dumps(event["values"]) + str(event["ts"]) for event in events})
        == distinct
    )


@pytest.mark.parametrize("path", [WORK_ORDERS, WEATHER])
def test_a_stream_ships_with_its_licence(path: Path) -> None:
    """Neither may be passed on without it."""
    licence = path.with_name(path.name.replace(".jsonl.zst", ".LICENSE.txt")).read_text(encoding="utf-8")
    assert "provided" in licence.lower()
    assert licence.split("\n")[0] in ("License/Terms-of-Use", "MIT License")


def test_work_orders_keep_their_text_and_lose_their_date() -> None:
    """Sorted by day, stable within it; the day is only in ts."""
    table = (
        "BscStartDate,Asset,OriginalShorttext,PMType,Cost\n"
        "2004-07-02,A,BUCKET WON'T OPEN,PM01,183.05\n2004-07-01,B,second,PM01,0\n2004-07-01,C,third,PM01,0\n"
    )
    events = list(work_orders(table))
    assert [event["text"] for event in events] == [
        "excavator B: second",
        "excavator C: third",
        "excavator A: BUCKET WON'T OPEN",
    ]
    assert (events[2]["ts"], events[2]["subject"]) == (1088726400, "asset-a")


def test_weather_is_read_in_mountain_standard_time_without_its_gaps() -> None:
    """Five past midnight in Golden is 07:05 UTC; a row of blanks is no reading."""
    table = (
        ",Ambient Temperature,Barometric Pressure,Relative Humidity,Wind Speed\n"
        "1/1/2022 0:05,-10.5,809.178,97.4,1.9\n1/1/2022 0:10,,,,\n"
    )
    assert list(weather(table)) == [
        {
            "kind": "reading",
            "source": "weather-1",
            "ts": 1641020700,
            "values": {"temperature": -10.5, "pressure": 809.178, "humidity": 97.4, "wind": 1.9},
            "units": {"temperature": "C", "pressure": "hPa", "humidity": "%", "wind": "m/s"},
        }
    ]
