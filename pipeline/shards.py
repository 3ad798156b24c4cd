"""Shards: which ingest process reads which source, and what each calls its own.

Process 1 is the shard "main", whose ring a data folder has always had; process n is "shard-n". A source is
read whole by one of them: by the one that its `shard` names, else by its place in the configuration, the
first by process 1, the second by process 2, and so on, then from the beginning. So a source that is added at
the end, or that is given a `shard`, moves no other.
"""

from __future__ import annotations

import re

from pipeline.config import Config
from pipeline.settings import Source

__all__ = ["MAIN", "listen_of", "numbers", "parse_shard", "shard_name", "shard_number", "sources_of"]

MAIN = "main"


def shard_name(number: int) -> str:
    """The shard of an ingest process, by its number from 1."""
    return MAIN if number == 1 else f"shard-{number}"


def shard_number(shard: str) -> int:
    """The number of the ingest process whose shard this is."""
    return 1 if shard == MAIN else int(shard.removeprefix("shard-"))


def parse_shard(text: str) -> str:
    """A shard as people write it: its name, or the number of its process.

    Raises: ValueError.
    """
    found = re.fullmatch(r"(?:shard-)?([1-9][0-9]{0,3})", text, re.ASCII)
    if found is None and text != MAIN:
        raise ValueError('expected the number of an ingest process, or its shard, as in "shard-2"')
    return shard_name(int(found[1])) if found else MAIN


def sources_of(config: Config, number: int) -> list[Source]:
    """The sources that an ingest process reads, by its number from 1."""
    processes = config.ingest.processes
    return [
        source
        for place, source in enumerate(config.sources)
        if (source.shard or place % processes + 1) == number
    ]


def numbers(config: Config) -> list[int]:
    """The ingest processes that have something to read."""
    return [number for number in range(1, config.ingest.processes + 1) if sources_of(config, number)]


def listen_of(config: Config, number: int) -> str:
    """Where an ingest process answers on its health: each has the port after the one before it."""
    host, colon, port = config.health.listen.rpartition(":")
    return f"{host}:{int(port) + number - 1}" if colon else ""
