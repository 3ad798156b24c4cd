"""Which ingest process reads which source, and what is each one's own."""

from __future__ import annotations

import pytest

from pipeline.settings import Config, HealthSettings, IngestSettings, Source
from pipeline.shards import listen_of, numbers, parse_shard, shard_name, shard_number, sources_of


def config(processes: int, *shards: int, listen: str = "127.0.0.1:9464") -> Config:
    """A configuration with a source for each of `shards`: 0 where it names none."""
    sources = tuple(Source(name=f"s{n}", kind="http", shard=shard) for n, shard in enumerate(shards))
    return Config(
        sources=sources, ingest=IngestSettings(processes=processes), health=HealthSettings(listen=listen)
    )


def read_by(config: Config) -> list[list[str]]:
    return [
        [source.name for source in sources_of(config, number)]
        for number in range(1, config.ingest.processes + 1)
    ]


def test_sources_go_to_processes_in_turn() -> None:
    assert read_by(config(1, 0, 0, 0)) == [["s0", "s1", "s2"]]
    assert read_by(config(2, 0, 0, 0, 0, 0)) == [["s0", "s2", "s4"], ["s1", "s3"]]


def test_a_source_that_names_its_process_moves_no_other() -> None:
    assert read_by(config(2, 0, 0, 0, 0)) == [["s0", "s2"], ["s1", "s3"]]
    assert read_by(config(2, 2, 0, 0, 0)) == [["s2"], ["s0", "s1", "s3"]]


def test_a_process_without_a_source_is_none() -> None:
    """It would allocate a ring for nothing."""
    assert numbers(config(3, 0, 0)) == [1, 2]
    assert numbers(config(2, 2, 2)) == [2]
    assert numbers(config(1)) == []


@pytest.mark.parametrize(
    ("written", "shard"),
    [("1", "main"), ("main", "main"), ("shard-1", "main"), ("2", "shard-2"), ("shard-12", "shard-12")],
)
def test_a_shard_is_written_as_its_name_or_number(written: str, shard: str) -> None:
    assert parse_shard(written) == shard
    assert shard_name(shard_number(shard)) == shard


@pytest.mark.parametrize("written", ["", "0", "02", "-1", "shard-", "shard-0", "main.v1", "../x", "²", "1\n"])
def test_anything_else_is_no_shard(written: str) -> None:
    """It becomes the name of a folder."""
    with pytest.raises(ValueError, match="expected the number"):
        parse_shard(written)


@pytest.mark.parametrize(
    ("listen", "third"), [("127.0.0.1:9464", "127.0.0.1:9466"), ("[::1]:80", "[::1]:82"), ("", "")]
)
def test_each_process_answers_on_the_next_port(listen: str, third: str) -> None:
    assert listen_of(config(3, listen=listen), 1) == listen
    assert listen_of(config(3, listen=listen), 3) == third
