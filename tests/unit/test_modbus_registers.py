"""Registers: the requests that read them cover them, and their bits mean what pymodbus says they mean."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pymodbus.client.mixin import ModbusClientMixin

from pipeline.source_settings import WORDS, ModbusRegister
from pipeline.sources.modbus_registers import Block, decode, plan, split

TYPES = [name for name in WORDS if name != "bool"]
words = st.integers(0, 0xFFFF)


@st.composite
def stored(draw: st.DrawFn) -> tuple[ModbusRegister, list[int]]:
    """A register and what a device holds there."""
    register = ModbusRegister(
        tag="v",
        address=0,
        type=draw(st.sampled_from(TYPES)),
        word_order=draw(st.sampled_from(["big", "little"])),
        byte_order=draw(st.sampled_from(["big", "little"])),
    )
    count = WORDS[register.holds]
    return register, draw(st.lists(words, min_size=count, max_size=count))


@given(stored())
def test_a_value_is_what_pymodbus_reads(held: tuple[ModbusRegister, list[int]]) -> None:
    register, registers = held
    if register.byte_order == "little":
        registers = [struct.unpack("<H", struct.pack(">H", word))[0] for word in registers]
    kind = ModbusClientMixin.DATATYPE[register.holds.upper()]
    expected = ModbusClientMixin.convert_from_registers(registers, kind, register.word_order)
    assert isinstance(expected, int | float)
    value = decode(register, held[1])
    if math.isfinite(expected):
        assert value == float(expected)
    else:
        assert value is None


@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.sampled_from(["big", "little"]))
def test_a_float_that_pymodbus_wrote_is_read_back(number: float, order: str) -> None:
    kind = ModbusClientMixin.DATATYPE.FLOAT32
    registers = ModbusClientMixin.convert_to_registers(number, kind, order)  # type: ignore[arg-type]
    register = ModbusRegister(tag="v", address=0, type="float32", word_order=order)  # type: ignore[arg-type]
    assert decode(register, registers) == number


@pytest.mark.parametrize(
    ("word_order", "byte_order", "registers"),
    [
        ("big", "big", [0x0A0B, 0x0C0D]),
        ("little", "big", [0x0C0D, 0x0A0B]),
        ("big", "little", [0x0B0A, 0x0D0C]),
        ("little", "little", [0x0D0C, 0x0B0A]),
    ],
)
def test_all_four_orders_in_the_field_are_understood(
    word_order: str, byte_order: str, registers: list[int]
) -> None:
    register = ModbusRegister(
        tag="v", address=0, type="uint32", word_order=word_order, byte_order=byte_order  # type: ignore[arg-type]
    )  # fmt: skip
    assert decode(register, registers) == 0x0A0B0C0D


@given(words, st.integers(0, 15))
def test_a_bit_of_a_register_is_counted_from_the_lowest(word: int, bit: int) -> None:
    register = ModbusRegister(tag="v", address=0, type="bool", bit=bit)
    assert decode(register, [word]) == int(f"{word:016b}"[15 - bit])
    swapped = ModbusRegister(tag="v", address=0, type="bool", bit=bit, byte_order="little")
    assert decode(swapped, [word]) == int(f"{word:016b}"[(15 - bit + 8) % 16])


def test_a_value_is_scaled_and_then_moved() -> None:
    register = ModbusRegister(tag="t", address=0, type="int16", scale=0.5, offset=-40.0)
    assert decode(register, [0xFFFE]) == -41.0
    coil = ModbusRegister(tag="open", address=0, table="coil", scale=100.0)
    assert (decode(coil, [1]), decode(coil, [0])) == (100.0, 0.0)


def test_what_overflows_when_scaled_is_no_number() -> None:
    register = ModbusRegister(tag="v", address=0, type="float64", scale=1e10)
    assert decode(register, list(struct.unpack(">4H", struct.pack(">d", 1e300)))) is None


registers = st.lists(
    st.builds(
        ModbusRegister,
        tag=st.just("v"),
        address=st.integers(0, 400),
        table=st.sampled_from(["holding", "input"]),
        type=st.sampled_from(sorted(WORDS)),
        device=st.sampled_from([None, 1, 2]),
    )
    | st.builds(
        ModbusRegister,
        tag=st.just("v"),
        address=st.integers(0, 5_000),
        table=st.sampled_from(["coil", "discrete"]),
    ),
    max_size=40,
)


@given(registers, st.integers(0, 30), st.integers(4, 125))
@example([ModbusRegister(tag="v", address=n, type="float64") for n in (0, 1, 2, 122, 123)], 8, 125)
def test_a_plan_reads_every_register_whole_within_the_limits(
    asked: list[ModbusRegister], max_gap: int, max_registers: int
) -> None:
    blocks = plan(asked, device=1, max_gap=max_gap, max_registers=max_registers)
    assert sorted(id(r) for block in blocks for r in block.registers) == sorted(map(id, asked))
    for block in blocks:
        assert 0 < block.count <= (2_000 if block.table in ("coil", "discrete") else max_registers)
        read = set(range(block.address, block.address + block.count))
        wanted = [span(register) for register in block.registers]
        assert all(need <= read for need in wanted)
        assert {block.address, block.address + block.count - 1} <= set().union(*wanted), "no idle ends"
        assert longest_gap(read - set().union(*wanted)) <= (128 if block.registers[0].is_bit else max_gap)
        for part in split(block):
            assert set(range(part.address, part.address + part.count)) == set().union(
                *map(span, part.registers)
            )
        assert sum(len(part.registers) for part in split(block)) == len(block.registers)


def span(register: ModbusRegister) -> set[int]:
    count = 1 if register.is_bit else WORDS[register.holds]
    return set(range(register.address, register.address + count))


def longest_gap(idle: set[int]) -> int:
    longest = run = 0
    for address in sorted(idle):
        run = run + 1 if address - 1 in idle else 1
        longest = max(longest, run)
    return longest


def test_neighbours_share_a_request_and_far_ones_do_not() -> None:
    asked = [ModbusRegister(tag=f"r{n}", address=n) for n in [*range(200), 207, 300]]
    blocks = plan(asked, device=7, max_gap=8, max_registers=125)
    assert [(b.device, b.address, b.count) for b in blocks] == [(7, 0, 125), (7, 125, 83), (7, 300, 1)]


def test_a_block_is_named_as_people_look_for_it() -> None:
    assert str(Block(3, "holding", 40, 2, ())) == "device 3 holding 40-41"
    assert str(Block(3, "coil", 40, 1, ())) == "device 3 coil 40"
