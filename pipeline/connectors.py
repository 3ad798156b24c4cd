"""From the configured sources to connectors; a connector's library is loaded only where a source needs it."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.settings import Source
from pipeline.sources.inbox import Connector, QueueLimits
from storage.errors import StorageError

__all__ = ["make_connector", "make_connectors", "queue_limits"]

_EXTRAS = {"opcua": "opcua", "modbus": "modbus"}  # kind -> the extra of pyproject.toml that it needs


def make_connectors(sources: Sequence[Source], *, finite: bool) -> list[Connector]:
    """The connectors of some sources. Raises: StorageError where a library is not installed."""
    return [make_connector(source, finite=finite) for source in sources]


def make_connector(source: Source, *, finite: bool) -> Connector:
    """The connector of a source; its name is "<kind>:<source>".

    Args:
        finite: Whether it ends where its input does; what has no end never does.
    Raises: StorageError where its library is not installed.
    """
    try:
        return _make(source, finite)
    except ModuleNotFoundError as error:
        if source.kind not in _EXTRAS or (error.name or "").startswith("pipeline"):
            raise
        hint = f"install it: pip install 'edgewater[{_EXTRAS[source.kind]}]'"
        raise StorageError(
            f'source {source.name}: kind "{source.kind}" needs {error.name}', hint=hint
        ) from None


def queue_limits(source: Source) -> QueueLimits:
    """How much of a source may wait, and how fast it may go."""
    return QueueLimits(
        lines=source.queue, when_full=source.when_full, rate=source.rate, burst=source.burst
    )  # fmt: skip


def _make(source: Source, finite: bool) -> Connector:
    match source.kind:
        case "files":
            from pipeline.sources.files import FilesConnector
            from pipeline.sources.formats import shaper_for

            return FilesConnector(source.name, source.path, shaper_for(source), finite=finite)
        case "stdin":
            from pipeline.sources.stdin import StdinConnector

            return StdinConnector(source.name)
        case "mqtt":
            from pipeline.sources.mqtt import MqttConnector

            assert source.mqtt is not None, "config check"
            return MqttConnector(source.name, source.mqtt)
        case "http":
            from pipeline.sources.http import HttpConnector

            assert source.http is not None, "config check"
            return HttpConnector(source.name, source.http)
        case "opcua":
            from pipeline.sources.opcua import OpcuaConnector

            assert source.opcua is not None, "config check"
            return OpcuaConnector(source.name, source.opcua)
        case "modbus":
            from pipeline.sources.modbus import ModbusConnector

            assert source.modbus is not None, "config check"
            return ModbusConnector(source.name, source.modbus)
        case "journal":
            from pipeline.sources.journal import JournalConnector

            assert source.journal is not None, "config check"
            return JournalConnector(source.name, source.journal)
