"""OPC UA against asyncua's own server: values and their times, status, missing nodes, log-in, security."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from asyncua import ua
from asyncua.ua.status_codes import StatusCodes

from pipeline.config_decode import Secret
from pipeline.decode import decode_event
from pipeline.events import Event, Reading, Text
from pipeline.source_settings import OpcuaNode, OpcuaSource
from pipeline.sources.inbox import Backoff, Inbox, QueueLimits, SourceState
from pipeline.sources.opcua import OpcuaConnector
from pipeline.units import Duration
from tests.certificates import Pair, make_pair
from tests.opcua_server import FIRST, NAMESPACE, OpcuaServer
from tests.relay import Relay
from tests.sources import Reader, reading

T = 1_790_000_000.0
UNCERTAIN = int(StatusCodes.UncertainLastUsableValue)
BAD = int(StatusCodes.BadSensorFailure)
OVERFLOW = 0x480  # good, with the bits for a queue that ran over


@pytest.fixture(scope="module")
def shared() -> Iterator[OpcuaServer]:
    """A server that takes 1.4 s to start: tests use variables of their own, by name."""
    server = OpcuaServer({"a": 0.0, "b": 0.0})
    yield server
    server.close()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("certificates")
    uris = {"server": "urn:freeopcua:python:server", "client": "urn:plant:gateway-7", "other": "urn:other"}
    return {name: make_pair(folder, name, uri) for name, uri in uris.items()}


@pytest.fixture
def variable(shared: OpcuaServer, request: pytest.FixtureRequest) -> Callable[[str, Any], str]:
    """Make a variable of this test. Returns: its node id."""

    def make(name: str, value: Any) -> str:
        name = f"{request.node.name}.{name}"
        shared.add(name, value)
        return f"ns=2;s={name}"

    return make


def connector(url: str, nodes: dict[str, OpcuaNode], **more: object) -> OpcuaConnector:
    settings = OpcuaSource(url=url, nodes=nodes, security="none", publishing_interval=Duration(0.02))
    settings = msgspec.structs.replace(settings, timeout=Duration(1))
    return OpcuaConnector("plant", msgspec.structs.replace(settings, **more), Backoff(0.05, 0.2))


def named(node: str) -> str:
    return node.removeprefix("ns=2;s=")


def events(reader: Reader) -> list[Event]:
    return [decode_event(line.data) for line in reader.lines if not line.refused]


def values(reader: Reader) -> list[dict[str, float]]:
    return [event.values for event in events(reader) if isinstance(event, Reading)]


def state_of(reader: Reader) -> SourceState:
    return reader.inbox.state(reader.connector)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"url": "http://10.0.0.5:4840"}, "url"),
        ({"url": "opc.tcp://10.0.0.5:99999"}, "url"),
        ({"url": "opc.tcp://user:secret@10.0.0.5"}, "url"),
        ({"security": "sign"}, "cert_file"),
        ({"cert_file": "gateway.pem"}, "cert_file"),
        ({"password": Secret("x", "${cred:plc}")}, "password"),
        ({"username": "edge", "password": "in clear"}, "password"),
        ({"nodes": {}}, "nodes"),
        ({"nodes": {"Pump1": OpcuaNode(tag="v")}}, "nodes"),
        ({"nodes": {"i=1": OpcuaNode(tag="v"), "i=2": OpcuaNode(tag="v")}}, "nodes"),
        ({"nodes": {"i=1": OpcuaNode(tag="v", text=True, deadband=1.0)}}, "nodes"),
        ({"timeout": Duration(0)}, "timeout"),
    ],
)
def test_settings_that_do_not_fit_are_named(more: dict[str, Any], key: str) -> None:
    right = OpcuaSource(url="opc.tcp://10.0.0.5", nodes={"i=1": OpcuaNode(tag="v")}, security="none")
    assert list(right.faults()) == []
    assert key in [fault for fault, _, _ in msgspec.structs.replace(right, **more).faults()]


def test_values_come_with_their_time_and_unit(shared: OpcuaServer, variable: Callable[..., str]) -> None:
    node = variable("v", 0.0)
    nodes = {node: OpcuaNode(tag="pressure", source="pump-1", unit="bar")}
    with reading(connector(shared.url, nodes)) as reader:
        reader.until_lines(1)
        shared.write(named(node), 3.5, ts=T + 0.125)
        reader.until_lines(2)
        assert state_of(reader).connected is True
        assert state_of(reader).detail == shared.url
    made = events(reader)
    assert all(isinstance(event, Reading) and event.units == {"pressure": "bar"} for event in made)
    assert all(event.source == "pump-1" for event in made)
    assert [event.ts for event in made] == [FIRST.timestamp(), T + 0.125]
    assert values(reader) == [{"pressure": 0.0}, {"pressure": 3.5}]


def test_booleans_and_all_numbers_are_values(shared: OpcuaServer, variable: Callable[..., str]) -> None:
    held = {
        "on": True,
        "off": ua.Variant(False, ua.VariantType.Boolean),
        "long": ua.Variant(-7, ua.VariantType.Int64),
        "byte": ua.Variant(255, ua.VariantType.Byte),
        "float": ua.Variant(0.5, ua.VariantType.Float),
    }
    nodes = {variable(name, value): OpcuaNode(tag=name) for name, value in held.items()}
    with reading(connector(shared.url, nodes)) as reader:
        reader.until_lines(1)
        assert values(reader) == [{"on": 1.0, "off": 0.0, "long": -7.0, "byte": 255.0, "float": 0.5}]


def test_values_of_one_source_and_time_are_one_reading(
    shared: OpcuaServer, variable: Callable[..., str]
) -> None:
    a, b, c, d = (variable(name, 0.0) for name in "abcd")
    nodes = {
        a: OpcuaNode(tag="a", unit="bar"),
        b: OpcuaNode(tag="b"),
        c: OpcuaNode(tag="c"),
        d: OpcuaNode(tag="a", source="other"),
    }
    with reading(connector(shared.url, nodes, publishing_interval=Duration(0.3))) as reader:
        reader.until_lines(2)
        reader.settle(0.4)
        del reader.lines[:]
        shared.write_all({named(a): 1.0, named(b): 2.0, named(d): 4.0}, ts=T)
        shared.write_all({named(c): 3.0}, ts=T - 1)
        reader.until_lines(3)
    made = [event for event in events(reader) if isinstance(event, Reading)]
    assert [(event.source, event.ts, event.values) for event in made] == [
        (None, T - 1, {"c": 3.0}),
        (None, T, {"a": 1.0, "b": 2.0}),
        ("other", T, {"a": 4.0}),
    ], "in the order of their time"
    assert [event.units for event in made] == [{}, {"a": "bar"}, {}]


def test_two_values_of_a_node_with_the_same_time_are_both_kept(
    shared: OpcuaServer, variable: Callable[..., str]
) -> None:
    node = variable("v", 0.0)
    with reading(connector(shared.url, {node: OpcuaNode(tag="v")}, publishing_interval=Duration(0.3))) as r:
        r.until_lines(1)
        shared.write(named(node), 1.0, ts=T)
        shared.write(named(node), 2.0, ts=T)
        r.until_lines(3)
        assert values(r) == [{"v": 0.0}, {"v": 1.0}, {"v": 2.0}]


def test_a_node_that_is_not_there_is_named_and_the_others_come(
    shared: OpcuaServer, variable: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sources.opcua.RETRY_S", 0.1)
    node = variable("v", 1.0)
    late = f"{node}.late"
    wrong = "nsu=urn:not-there;s=v"
    nodes = {node: OpcuaNode(tag="v"), late: OpcuaNode(tag="w"), wrong: OpcuaNode(tag="x")}
    with reading(connector(shared.url, nodes)) as reader:
        reader.until(lambda: values(reader) == [{"v": 1.0}])
        state = state_of(reader)
        assert state.connected is True
        reader.until(lambda: f"{late}: BadNodeIdUnknown" in state.detail)
        assert f"{wrong}: the server has no such namespace" in state.detail
        shared.add(named(late), 2.0)
        reader.until(lambda: values(reader) == [{"v": 1.0}, {"w": 2.0}])
        assert late not in state.detail


def test_a_namespace_is_found_by_its_uri(shared: OpcuaServer, variable: Callable[..., str]) -> None:
    node = variable("v", 5.0)
    with reading(connector(shared.url, {f"nsu={NAMESPACE};s={named(node)}": OpcuaNode(tag="v")})) as reader:
        reader.until(lambda: values(reader) == [{"v": 5.0}])


def test_a_bad_value_is_counted_and_never_stored(shared: OpcuaServer, variable: Callable[..., str]) -> None:
    node = variable("v", 0.0)
    with reading(connector(shared.url, {node: OpcuaNode(tag="v")})) as reader:
        reader.until_lines(1)
        shared.write(named(node), 1.0, ts=T, status=BAD)
        shared.write(named(node), math.nan, ts=T + 1)
        shared.write(named(node), 2.0, ts=T + 2, status=UNCERTAIN)
        shared.write(named(node), 3.0, ts=T + 3, status=OVERFLOW)
        reader.until(lambda: values(reader) == [{"v": 0.0}, {"v": 2.0}, {"v": 3.0}])
        counts = state_of(reader).counts
        assert (counts["bad"], counts["uncertain"], counts["gaps"]) == (2, 1, 1)
        assert len(reader.lines) == 3


def test_a_bad_value_becomes_a_dead_letter_where_the_settings_say_so(
    shared: OpcuaServer, variable: Callable[..., str]
) -> None:
    node = variable("v", 0.0)
    with reading(connector(shared.url, {node: OpcuaNode(tag="v")}, bad_values="refuse")) as reader:
        reader.until_lines(1)
        shared.write(named(node), 1.0, ts=T, status=BAD)
        reader.until_lines(2)
        assert reader.lines[1].refused == "the server calls the value bad: BadSensorFailure"
        assert msgspec.json.decode(reader.data[1]) == {"node": node, "value": None, "ts": T}
        assert state_of(reader).counts["bad"] == 1


def test_strings_become_texts_only_where_the_settings_say_so(
    shared: OpcuaServer, variable: Callable[..., str]
) -> None:
    text, words, number = (
        variable("t", "hello"),
        variable("w", ua.LocalizedText("Halt", "de")),
        variable("n", "x"),
    )
    nodes = {text: OpcuaNode(tag="t", text=True, source="panel"), words: OpcuaNode(tag="w", text=True)}
    with reading(connector(shared.url, nodes | {number: OpcuaNode(tag="n")})) as reader:
        reader.until_lines(3)
        shared.write(named(text), "", ts=T)
        reader.until(lambda: state_of(reader).counts.get("empty") == 1)
    texts = {(event.source, event.text) for event in events(reader) if isinstance(event, Text)}
    assert texts == {("panel", "hello"), (None, "Halt")}
    (refused,) = [line.refused for line in reader.lines if line.refused]
    assert refused == "holds str, no number: set text = true"


def test_a_text_that_is_no_unicode_is_stored_with_a_mark_for_what_cannot_be_read(
    shared: OpcuaServer, variable: Callable[..., str]
) -> None:
    text = variable("t", b"Druck \xfc 3".decode(errors="surrogateescape"))  # latin-1, as old devices send it
    words = variable("w", ua.LocalizedText("\udcff"))
    nodes = {text: OpcuaNode(tag="t", text=True), words: OpcuaNode(tag="w", text=True)}
    with reading(connector(shared.url, nodes)) as reader:
        reader.until_lines(2)
        assert {event.text for event in events(reader) if isinstance(event, Text)} == {"Druck ? 3", "?"}
        assert reader.inbox.fault is None


def test_what_is_no_single_value_is_refused(shared: OpcuaServer, variable: Callable[..., str]) -> None:
    node = variable("v", [1.0, 2.0])
    with reading(connector(shared.url, {node: OpcuaNode(tag="v")})) as reader:
        reader.until_lines(1)
        assert reader.lines[0].refused == "holds list, no number: remove the node"


def test_a_deadband_keeps_small_changes_back(shared: OpcuaServer, variable: Callable[..., str]) -> None:
    node = variable("v", 0.0)
    with reading(connector(shared.url, {node: OpcuaNode(tag="v", deadband=1.0)})) as reader:
        reader.until_lines(1)
        for number, value in enumerate((0.5, 5.0, 5.5, 9.0)):
            shared.write(named(node), value, ts=T + number)
        reader.until(lambda: {"v": 9.0} in values(reader))
        assert values(reader) == [{"v": 0.0}, {"v": 5.0}, {"v": 9.0}]


def test_what_the_server_repeats_after_a_new_subscription_is_left_out(
    shared: OpcuaServer, variable: Callable[..., str]
) -> None:
    """Two nodes that came as one reading, and come as two readings later: no dedup after us could tell."""
    a, b = variable("a", 1.0), variable("b", 2.0)
    relay = Relay(shared.port)
    try:
        nodes = {a: OpcuaNode(tag="a"), b: OpcuaNode(tag="b")}
        with reading(connector(f"opc.tcp://127.0.0.1:{relay.port}", nodes)) as reader:
            reader.until(lambda: values(reader) == [{"a": 1.0, "b": 2.0}])
            state = state_of(reader)
            relay.cut()
            reader.until(lambda: state.connected is False)
            shared.write(named(b), 3.0, ts=T)
            relay.mend()
            reader.until(lambda: {"b": 3.0} in values(reader))
            reader.until(lambda: state.counts.get("redelivered") == 1)
            assert values(reader) == [{"a": 1.0, "b": 2.0}, {"b": 3.0}]
            assert state.counts["reconnects"] == 1
    finally:
        relay.close()


def test_a_session_that_the_server_no_longer_knows_is_made_anew() -> None:
    """The library's own look at the server meets a bad status then; ingest ended by it."""
    server = OpcuaServer({"v": 1.0})
    try:
        with reading(connector(server.url, {"ns=2;s=v": OpcuaNode(tag="v")})) as reader:
            reader.until(lambda: values(reader) == [{"v": 1.0}])
            server.refuse_its_state()
            reader.until(lambda: state_of(reader).counts.get("reconnects", 0) > 0)
            server.write("v", 2.0)
            reader.until(lambda: {"v": 2.0} in values(reader))
    finally:
        server.close()


def test_it_comes_back_after_the_server_was_started_anew() -> None:
    server = OpcuaServer({"v": 1.0})
    try:
        with reading(connector(server.url, {"ns=2;s=v": OpcuaNode(tag="v")})) as reader:
            reader.until(lambda: values(reader) == [{"v": 1.0}])
            server.close()
            reader.until(lambda: state_of(reader).connected is False)
            assert state_of(reader).detail.startswith(f"{server.url}: ")
            server = OpcuaServer({"v": 2.0}, port=server.port)
            reader.until(lambda: {"v": 2.0} in values(reader))
            assert state_of(reader).counts["reconnects"] == 1
    finally:
        server.close()


def test_a_wrong_password_is_said_in_words_and_the_right_one_works() -> None:
    server = OpcuaServer({"v": 1.0}, passwords={"edge": "s3cret"})
    nodes = {"ns=2;s=v": OpcuaNode(tag="v")}
    try:
        for more in ({"username": "edge", "password": "wrong"}, {}):
            with reading(connector(server.url, nodes, plain_password=True, **more)) as reader:
                reader.until(lambda: bool(state_of(reader).detail))
                assert state_of(reader).connected is False
                assert state_of(reader).detail == f"{server.url}: the server refuses this user or password"
                assert reader.lines == []
        right = {"username": "edge", "password": "s3cret"}
        with reading(connector(server.url, nodes, plain_password=True, **right)) as reader:
            reader.until(lambda: values(reader) == [{"v": 1.0}])
        with reading(connector(server.url, nodes, **right)) as reader:
            reader.until(lambda: bool(state_of(reader).detail))
            assert "only in clear text" in state_of(reader).detail
            assert "s3cret" not in state_of(reader).detail
    finally:
        server.close()


def test_an_encrypted_session_with_a_pinned_certificate(pairs: dict[str, Pair]) -> None:
    """And a password in it; then another certificate than the pinned, and files that are none."""
    mine, its, other = pairs["client"], pairs["server"], pairs["other"]
    server = OpcuaServer({"v": 1.0}, passwords={"edge": "s3cret"}, cert=its.der, key=its.key)
    nodes = {"ns=2;s=v": OpcuaNode(tag="v")}
    right = {
        "security": "sign_and_encrypt",
        "cert_file": str(mine.pem),
        "key_file": str(mine.key),
        "server_cert_file": str(its.der),
        "username": "edge",
        "password": "s3cret",
    }
    try:
        for more in ({}, {"cert_file": str(mine.der), "server_cert_file": ""}, {"security": "sign"}):
            with reading(connector(server.url, nodes, **right | more)) as reader:
                reader.until(lambda: values(reader) == [{"v": 1.0}])
        for more, why in (
            ({"server_cert_file": str(other.pem)}, "no answer: is server_cert_file right"),
            ({"server_cert_file": "/none/server.pem"}, "cannot read /none/server.pem: No such file"),
            ({"key_file": str(mine.pem)}, f"cannot use {mine.pem}: "),
            ({"cert_file": str(mine.key)}, f"{mine.key} holds no certificate"),
            ({"key_file": str(other.key)}, "no answer: is server_cert_file right"),
            ({"security": "none"}, 'the server does not offer security "none"'),
        ):
            with reading(connector(server.url, nodes, **right | more)) as reader:
                reader.until(lambda: bool(state_of(reader).detail))
                reader.settle(0.2)
                assert state_of(reader).connected is False, more
                assert state_of(reader).detail.startswith(f"{server.url}: {why}"), state_of(reader).detail
                assert reader.lines == []
                assert reader.inbox.fault is None
    finally:
        server.close()


def test_while_the_queue_is_full_the_server_keeps_what_comes(
    shared: OpcuaServer, variable: Callable[..., str]
) -> None:
    node = variable("v", -1.0)
    made = connector(shared.url, {node: OpcuaNode(tag="v")}, queue_size=1_000)
    inbox = Inbox({made.name: QueueLimits(lines=2)})
    made.start(inbox, {})
    try:
        got: list[bytes] = []
        chunk = inbox.get(10)
        assert chunk is not None
        for number in range(200):
            shared.write(named(node), float(number), ts=T + number)
            time.sleep(0.002)
        assert inbox.states()[made.name][1] < 200, "held back"
        deadline = time.monotonic() + 10
        while len(got) < 200 and time.monotonic() < deadline:
            chunk = inbox.get(0.1)
            got += [line.data for line in chunk.lines] if chunk is not None else []
        times = [decode_event(data).ts for data in got]
        assert times == [T + number for number in range(200)]
        assert "gaps" not in inbox.state(made).counts
    finally:
        inbox.closed.set()
        made.stop()


def test_it_stops_within_a_second_before_a_black_hole(shared: OpcuaServer) -> None:
    """Connections open, and nothing comes back, for longer than anybody would wait."""
    relay = Relay(shared.port)
    relay.silence()
    try:
        nodes = {"ns=2;s=a": OpcuaNode(tag="a")}
        reader = Reader(connector(f"opc.tcp://127.0.0.1:{relay.port}", nodes, timeout=Duration(60)))
        time.sleep(0.3)
        started = time.monotonic()
        reader.stop()
        assert time.monotonic() - started < 1.0
        assert reader.connector.name not in {thread.name for thread in threading.enumerate()}
    finally:
        relay.close()


def test_a_line_that_falls_silent_is_noticed_and_used_again(shared: OpcuaServer) -> None:
    relay = Relay(shared.port)
    try:
        nodes = {"ns=2;s=b": OpcuaNode(tag="b")}
        with reading(connector(f"opc.tcp://127.0.0.1:{relay.port}", nodes, timeout=Duration(0.3))) as reader:
            reader.until_lines(1)
            relay.silence()
            reader.until(lambda: state_of(reader).connected is False)
            assert "no answer" in state_of(reader).detail
            relay.mend()
            reader.until(lambda: state_of(reader).connected is True)
    finally:
        relay.close()


def test_a_server_that_is_none_breaks_nothing(tmp_path: Path) -> None:
    """Something else listens there: what it says is no OPC UA."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def babble() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 20)

        threading.Thread(target=babble, daemon=True).start()
        url = f"opc.tcp://127.0.0.1:{listener.getsockname()[1]}"
        with reading(connector(url, {"ns=2;s=v": OpcuaNode(tag="v")}, timeout=Duration(0.3))) as reader:
            reader.until(lambda: bool(state_of(reader).detail))
            assert state_of(reader).connected is False
            assert reader.inbox.fault is None
        listener.shutdown(socket.SHUT_RDWR)


def test_sequence_of_the_flood_is_kept(shared: OpcuaServer, variable: Callable[..., str]) -> None:
    node = variable("v", -1.0)
    with reading(connector(shared.url, {node: OpcuaNode(tag="v")}, queue_size=1_000)) as reader:
        reader.until_lines(1)
        for number in range(300):
            shared.write(named(node), float(number), ts=T + number)
        reader.until_lines(301)
        times = [event.ts for event in events(reader)]
        assert all(a < b for a, b in pairwise(times))  # type: ignore[operator]
        assert len(times) == 301
        assert "gaps" not in state_of(reader).counts
