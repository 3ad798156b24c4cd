"""The sources as Prometheus metrics: connected or not, what waits, what was counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from pipeline.sources.inbox import SourceState

__all__ = ["States", "source_metrics"]

States = Callable[[], Mapping[str, tuple[SourceState, int]]]


def source_metrics(states: States) -> Iterable[Metric]:
    """Metrics of every source, read when they are asked for.

    Args:
        states: Connector's name, "kind:source" -> how it stands, and how many of its lines wait.
    """
    help_text = "Whether a source is connected; only sources that connect to something"
    connected = GaugeMetricFamily("edgewater_source_connected", help_text, labels=["kind", "source"])
    help_text = "Lines of a source that wait in its queue"
    waiting = GaugeMetricFamily("edgewater_source_waiting", help_text, labels=["kind", "source"])
    help_text = "What happened at a source: reconnects, gaps, dropped and the like"
    counts = CounterMetricFamily("edgewater_source_events", help_text, labels=["kind", "source", "event"])
    for name, (state, lines) in states().items():
        kind, _, source = name.partition(":")
        if state.connected is not None:
            connected.add_metric([kind, source], float(state.connected))
        waiting.add_metric([kind, source], lines)
        for event, number in sorted(dict(state.counts).items()):
            counts.add_metric([kind, source, event], number)
    return [connected, waiting, counts]
