"""Modbus registers: which requests read them, and what their bits mean.

| type | registers | bytes on the wire with word_order, byte_order |
|---|---|---|
| 32 bits 0x0A0B0C0D | 2 | big, big: 0A 0B 0C 0D; little, big: 0C 0D 0A 0B |
| the same | 2 | big, little: 0B 0A 0D 0C; little, little: 0D 0C 0B 0A |

Source: MODBUS Application Protocol Specification V1.1b3: 125 registers or 2,000 bits a request.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from pipeline.source_settings import WORDS, ModbusRegister

__all__ = ["Block", "decode", "plan", "split"]

MAX_BITS: Final = 2_000
MAX_BIT_GAP: Final = 128  # 16 bytes more in an answer cost less than a request
_FORMATS: Final = {
    "int16": ">h", "uint16": ">H", "int32": ">i", "uint32": ">I", "int64": ">q", "uint64": ">Q",
    "float32": ">f", "float64": ">d",
}  # fmt: skip


class Block(msgspec.Struct, frozen=True):
    """One request, and the registers that its answer holds.

    Attributes:
        device: Unit id.
        table: "holding", "input", "coil" or "discrete".
        address, count: What is read: registers, or bits.
        registers: In the order of their addresses.
    """

    device: int
    table: str
    address: int
    count: int
    registers: tuple[ModbusRegister, ...]

    def __str__(self) -> str:
        last = self.address + self.count - 1
        place = f"{self.address}" if self.count == 1 else f"{self.address}-{last}"
        return f"device {self.device} {self.table} {place}"


def plan(
    registers: Iterable[ModbusRegister], *, device: int, max_gap: int, max_registers: int
) -> list[Block]:
    """Cover registers with as few requests as these limits allow; a value is never torn.

    Args:
        device: Unit id of the registers that name none.
        max_gap: Read over so many registers that nobody asked for.
        max_registers: At most so many a request.
    """
    places: dict[tuple[int, str], list[ModbusRegister]] = {}
    for register in registers:
        at = (device if register.device is None else register.device, register.table)
        places.setdefault(at, []).append(register)
    blocks = []
    for (unit, table), found in sorted(places.items()):
        bits = found[0].is_bit
        gap, longest = (min(max_gap * 16, MAX_BIT_GAP), MAX_BITS) if bits else (max_gap, max_registers)
        blocks += _cover(unit, table, found, gap, longest)
    return blocks


def split(block: Block) -> list[Block]:
    """Cover the same registers without a gap: for a device that refuses to read over one."""
    return _cover(block.device, block.table, list(block.registers), 0, block.count)


def decode(register: ModbusRegister, words: Sequence[int]) -> float | None:
    """What registers mean, scaled; None where it is no number (a float that is NaN or infinite).

    Args:
        words: The registers, as many as the type takes; of a coil or discrete input its bit.
    """
    if register.holds == "bool":
        word = words[0] if register.is_bit else _swapped(words[0], register) >> register.bit & 1
        return float(word) * register.scale + register.offset
    data = b"".join(_swapped(word, register).to_bytes(2, "big") for word in words)
    if register.word_order == "little":
        data = b"".join(data[at : at + 2] for at in range(len(data) - 2, -1, -2))
    (value,) = struct.unpack(_FORMATS[register.holds], data)
    scaled = float(value) * register.scale + register.offset
    return scaled if math.isfinite(scaled) else None


def _swapped(word: int, register: ModbusRegister) -> int:
    return word if register.byte_order == "big" else (word & 0xFF) << 8 | word >> 8


def _cover(device: int, table: str, registers: list[ModbusRegister], gap: int, longest: int) -> list[Block]:
    blocks: list[Block] = []
    for register in sorted(registers, key=lambda r: (r.address, r.tag)):
        end = register.address + (1 if register.is_bit else WORDS[register.holds])
        last = blocks[-1] if blocks else None
        if last is not None:
            reach = max(last.address + last.count, end)
            near = register.address - (last.address + last.count) <= gap
            if near and reach - last.address <= longest:
                count, members = reach - last.address, (*last.registers, register)
                blocks[-1] = Block(device, table, last.address, count, members)
                continue
        blocks.append(Block(device, table, register.address, end - register.address, (register,)))
    return blocks
