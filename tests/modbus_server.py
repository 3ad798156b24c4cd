"""pymodbus' own server, over TCP or a serial port, in a thread; it counts what it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

from pymodbus import FramerType
from pymodbus.constants import ExcCodes
from pymodbus.server import ModbusSerialServer, ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from tests.loops import LoopInThread

__all__ = ["ModbusServer"]

WRITE = {"coil": 15, "holding": 16}  # function that writes a table


class ModbusServer:
    """Devices with 100 holding registers (but for 50 to 59), input registers that hold their address, and
    100 coils and discrete inputs, every third set.

    Args:
        devices: Their unit ids.
        serial: Serial port; by default TCP.
        framer: Of TCP.

    Attributes:
        port: Of TCP.
        requests: (device, function, address, count) of each request for memory that is there.
        delays_s: Device -> how long it takes to answer.
    """

    def __init__(
        self, devices: Iterable[int] = (1,), *, serial: str = "", framer: FramerType = FramerType.SOCKET
    ) -> None:
        self.requests: list[tuple[int, int, int, int]] = []
        self.delays_s: dict[int, float] = {}
        self.port = 0
        self._loop = LoopInThread()
        self._loop.run(self._start(list(devices), serial, framer))

    def write(self, address: int, registers: list[int], *, device: int = 1) -> None:
        """Set holding registers."""
        self._loop.run(self._server.async_setValues(device, WRITE["holding"], address, registers))

    def close(self) -> None:
        """End it."""
        self._loop.run(self._server.shutdown())  # type: ignore[no-untyped-call]
        self._loop.close()

    async def _start(self, devices: list[int], serial: str, framer: FramerType) -> None:
        made = [self._device(number) for number in devices]
        self._server: ModbusSerialServer | ModbusTcpServer
        if serial:
            self._server = ModbusSerialServer(made, port=serial, ignore_missing_devices=True)
        else:
            self._server = ModbusTcpServer(
                made, framer=framer, address=("127.0.0.1", 0), ignore_missing_devices=True
            )
        await self._server.serve_forever(background=True)
        if not serial:
            self.port = self._server.transport.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    def _device(self, number: int) -> SimDevice:
        bits = [n % 3 == 0 for n in range(100)]
        return SimDevice(
            number,
            simdata=(
                [SimData(0, values=bits, datatype=DataType.BITS)],
                [SimData(0, values=bits, datatype=DataType.BITS)],
                [
                    SimData(0, count=50, datatype=DataType.REGISTERS),
                    SimData(60, count=40, datatype=DataType.REGISTERS),
                ],
                [SimData(0, values=list(range(100)), datatype=DataType.REGISTERS)],
            ),
            action=partial(self._asked, number),
        )

    async def _asked(
        self,
        device: int,
        function: int,
        start: int,
        address: int,
        count: int,
        current: list[int],
        written: list[int] | list[bool] | None,
    ) -> ExcCodes | None:
        if written is None:
            self.requests.append((device, function, address, count))
            await asyncio.sleep(self.delays_s.get(device, 0))
        return None
