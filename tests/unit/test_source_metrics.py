"""What /metrics says of the sources."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from pipeline.source_metrics import source_metrics
from pipeline.sources.inbox import SourceState


class Collector:
    """Two sources: a broker that was lost once, and a file, which is never connected."""

    def __init__(self) -> None:
        self.broker, self.file = SourceState(), SourceState()

    def collect(self):
        return source_metrics(lambda: {"mqtt:plant": (self.broker, 7), "files:cmms": (self.file, 0)})


def test_each_source_says_whether_it_is_connected_and_what_was_counted() -> None:
    made = Collector()
    made.broker.connected = False
    made.broker.count("reconnects")
    made.broker.count("gaps", 3)
    registry = CollectorRegistry()
    registry.register(made)
    lines = set(generate_latest(registry).decode().splitlines())
    assert lines >= {
        'edgewater_source_connected{kind="mqtt",source="plant"} 0.0',
        'edgewater_source_waiting{kind="mqtt",source="plant"} 7.0',
        'edgewater_source_waiting{kind="files",source="cmms"} 0.0',
        'edgewater_source_events_total{event="reconnects",kind="mqtt",source="plant"} 1.0',
        'edgewater_source_events_total{event="gaps",kind="mqtt",source="plant"} 3.0',
    }
    assert not any(line.startswith("edgewater_source_connected{") and "cmms" in line for line in lines)
