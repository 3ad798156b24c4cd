"""asyncua's own server in a thread: variables that tests write, users, certificates."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asyncua import ua
from asyncua.common.node import Node
from asyncua.crypto.permission_rules import User, UserRole
from asyncua.server.server import Server
from asyncua.ua.attribute_ids import AttributeIds
from asyncua.ua.status_codes import StatusCodes

from tests.loops import LoopInThread

__all__ = ["NAMESPACE", "OpcuaServer"]

NAMESPACE = "urn:edgewater:test"
FIRST = datetime(2026, 1, 1, tzinfo=UTC)


class _Users:
    """Anybody, or only those who have a password."""

    def __init__(self, passwords: Mapping[str, str]) -> None:
        self._passwords = passwords

    def get_user(
        self,
        iserver: object,
        username: str | None = None,
        password: str | None = None,
        certificate: object = None,
    ) -> User | None:
        if self._passwords and (not username or self._passwords.get(username) != password):
            return None
        return User(role=UserRole.User)


class OpcuaServer:
    """A server with variables ns=2;s=NAME.

    Args:
        variables: Name -> first value.
        passwords: User -> password; none lets everybody in.
        cert, key: Its certificate (DER) and key (PEM): it takes nothing but encrypted then.
        port: 0 is a free one.

    Attributes:
        port, url: Where it listens.
    """

    def __init__(
        self,
        variables: Mapping[str, Any],
        *,
        passwords: Mapping[str, str] = {},
        cert: Path | None = None,
        key: Path | None = None,
        port: int = 0,
    ) -> None:
        logging.getLogger("asyncua").setLevel(logging.CRITICAL + 1)
        self.port = port or _free_port()
        self.url = f"opc.tcp://127.0.0.1:{self.port}"
        self._nodes: dict[str, Node] = {}
        self._loop = LoopInThread()
        self._loop.run(self._start(variables, passwords, cert, key))

    def write(self, name: str, value: Any, *, ts: float | None = None, status: int = 0) -> float:
        """Set a variable. Returns: its timestamp."""
        ts = time.time() if ts is None else ts
        self._loop.run(self._write({name: value}, ts, status))
        return ts

    def write_all(self, values: Mapping[str, Any], *, ts: float) -> None:
        """Set variables at once."""
        self._loop.run(self._write(values, ts, 0))

    def add(self, name: str, value: Any) -> None:
        """Make one more variable."""
        self._loop.run(self._add(name, value))

    def refuse_its_state(self) -> None:
        """Answer with a bad status whenever a client asks how the server is."""
        self._loop.run(self._refuse_its_state())

    def watched(self) -> int:
        """How many nodes are subscribed to."""
        return self._loop.run(self._watched())

    def close(self) -> None:
        """End it."""
        self._loop.run(self._server.stop())
        self._loop.close()

    async def _start(
        self, variables: Mapping[str, Any], passwords: Mapping[str, str], cert: Path | None, key: Path | None
    ) -> None:
        self._server = Server(user_manager=_Users(passwords))  # type: ignore[arg-type]
        await self._server.init()
        self._server.set_endpoint(self.url)
        policies = [ua.SecurityPolicyType.NoSecurity]
        if cert is not None and key is not None:
            policies = [
                ua.SecurityPolicyType.Basic256Sha256_SignAndEncrypt,
                ua.SecurityPolicyType.Basic256Sha256_Sign,
            ]
            await self._server.load_certificate(cert)
            await self._server.load_private_key(key, None, "pem")
        self._server.set_security_policy(policies)
        assert await self._server.register_namespace(NAMESPACE) == 2
        for name, value in variables.items():
            await self._add(name, value)
        await self._server.start()

    async def _refuse_its_state(self) -> None:
        bad = ua.DataValue(StatusCode=ua.StatusCode(ua.UInt32(StatusCodes.BadSessionIdInvalid)))
        state = self._server.get_node("i=2259").nodeid  # Server_ServerStatus_State
        aspace = self._server.iserver.aspace
        aspace.set_attribute_value_callback(state, AttributeIds.Value, lambda node, attribute: bad)

    async def _watched(self) -> int:
        subscriptions = self._server.iserver.subscription_service.subscriptions.values()
        return sum(len(each.monitored_item_srv._monitored_items) for each in subscriptions)

    async def _add(self, name: str, value: Any) -> None:
        node = await self._server.nodes.objects.add_variable(
            ua.NodeId.from_string(f"ns=2;s={name}"), f"2:{name}", value
        )
        self._nodes[name] = node
        await self._write({name: value}, FIRST.timestamp(), 0)

    async def _write(self, values: Mapping[str, Any], ts: float, status: int) -> None:
        for name, value in values.items():
            data = ua.DataValue(
                Value=value if isinstance(value, ua.Variant) else ua.Variant(value),
                StatusCode=ua.StatusCode(ua.UInt32(status)),
                SourceTimestamp=ua.DateTime.fromtimestamp(ts, UTC),
            )
            await self._server.iserver.aspace.write_attribute_value(
                self._nodes[name].nodeid, AttributeIds.Value, data
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
