"""The two real streams that the demo learns from; README.md beside this file says whose they are."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["WEATHER", "WORK_ORDERS"]

WORK_ORDERS: Final = Path(__file__).parent / "work-orders.jsonl.zst"
"""5,485 maintenance work orders of five excavators, 2001 to 2012: texts from the source "cmms"."""
WEATHER: Final = Path(__file__).parent / "weather.jsonl.zst"
"""1,147 five-minute readings of a weather station, 2022: readings from the source "weather-1"."""
