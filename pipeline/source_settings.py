"""The settings of the kinds of sources that have a table of their own, as in [sources.mqtt].

As in settings.py the text below a field is what users read. `faults` of a table names what single values
cannot show: (key within the table, what is wrong, what to do).
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

__all__ = ["HttpSource", "JournalSource", "ModbusSource", "MqttSource", "OpcuaSource", "SourceFault"]

SourceFault = tuple[str, str, str]


class MqttSource(msgspec.Struct, frozen=True, kw_only=True):
    """An MQTT broker that is subscribed to."""

    def faults(self) -> Iterator[SourceFault]:
        """What does not fit."""
        return iter(())


class HttpSource(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP server that takes events."""

    def faults(self) -> Iterator[SourceFault]:
        """What does not fit."""
        return iter(())


class OpcuaSource(msgspec.Struct, frozen=True, kw_only=True):
    """An OPC UA server whose nodes are subscribed to."""

    def faults(self) -> Iterator[SourceFault]:
        """What does not fit."""
        return iter(())


class ModbusSource(msgspec.Struct, frozen=True, kw_only=True):
    """A Modbus device that is polled."""

    def faults(self) -> Iterator[SourceFault]:
        """What does not fit."""
        return iter(())


class JournalSource(msgspec.Struct, frozen=True, kw_only=True):
    """The systemd journal of this machine."""

    def faults(self) -> Iterator[SourceFault]:
        """What does not fit."""
        return iter(())
