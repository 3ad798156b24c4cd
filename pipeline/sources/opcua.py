"""OPC UA: nodes are subscribed to, and what the server reports becomes readings and texts.

A subscription has no position: what changes while nobody is connected is not seen, but for the value that a
node holds afterwards, and a message that was not committed is not repeated: each value is stored at most
once.

| what fails | what follows |
|---|---|
| the connection, the session or the subscription | made anew after a wait that doubles up to 15 s |
| a node is not there, or cannot be subscribed to | named in `status`, tried again every 30 s |
| the queue is full | no more is asked for: the server keeps `queue_size` values of each node, and tells which
  nodes lost some, counted as "gaps" |
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Final

from asyncua import ua
from asyncua.client.client import Client
from asyncua.ua.attribute_ids import AttributeIds
from asyncua.ua.uaerrors import UaError

from pipeline.events import Origin
from pipeline.source_settings import OpcuaNode, OpcuaSource
from pipeline.sources.inbox import Backoff, Chunk, Inbox, Settled, SourceState, in_few_words
from pipeline.sources.loop_thread import LoopThread
from pipeline.sources.opcua_client import in_words, leave, make_client
from pipeline.sources.opcua_values import Change, Shaper, status_name

__all__ = ["OpcuaConnector"]

NODES_AT_ONCE: Final = 200  # in one request
RETRY_S: Final = 30.0  # nodes that were missing are looked for so often
LOOK_S: Final = 1.0  # so often somebody looks whether the server is silent, or a retry is due
KEEP_ALIVE_S: Final = 10.0  # a subscription without changes says so often that it is alive
LIFETIME_S: Final = 600.0  # a subscription that nobody asks for its messages lives so long
PER_MESSAGE: Final = 1_000  # values
ROOM_S: Final = 0.05  # while the queue is full it is tried so often
SEQUENCE: Final = 1 << 32


class OpcuaConnector:
    """Subscribes to the nodes of a source's table.

    Args:
        source: Name of the configured source.
        settings: Its table.
        backoff: How long to wait before connecting again.
    """

    def __init__(self, source: str, settings: OpcuaSource, backoff: Backoff | None = None) -> None:
        self.name = f"opcua:{source}"
        self._source = source
        self._settings = settings
        self._backoff = backoff or Backoff()
        self._thread = LoopThread()
        self._state = SourceState()
        self._shaper = Shaper(settings, self._state)

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to connect; a subscription has no position."""
        self._state = inbox.state(self)
        self._shaper = Shaper(self._settings, self._state)
        self._thread.start(self, inbox, partial(self._main, inbox))

    def acknowledge(self, settled: list[Settled]) -> None:
        """A server was told when its message came: it does not keep it until a commit."""

    def stop(self) -> None:
        """Say goodbye to the server."""
        self._thread.stop()

    async def _main(self, inbox: Inbox) -> None:
        state, was_connected = self._state, False
        while True:
            client: Client | None = None
            try:
                with in_words(self._settings):
                    client = await make_client(self._settings)
                    subscription = _Subscription(client, self._settings)
                    await client.connect()
                    await subscription.begin()
                if was_connected:
                    state.count("reconnects")
                was_connected = state.connected = True
                self._backoff.reset()
                await self._read(subscription, inbox)
            except ConnectionError as error:
                state.connected, state.detail = False, f"{self._settings.url}: {error}"
            finally:
                if client is not None:
                    await leave(client)
            await asyncio.sleep(self._backoff.next_s())

    async def _read(self, subscription: _Subscription, inbox: Inbox) -> None:
        """Hand over what the server reports. Raises: ConnectionError when it does no more."""
        while True:
            failures = subscription.failures
            self._state.detail = "; ".join(filter(None, [self._settings.url, in_few_words(failures)]))
            changes, lost = await subscription.next()
            if lost:
                self._state.count("gaps", lost)
            origin = Origin(self._source, self.name, time.time())
            lines = self._shaper.lines(changes, origin)
            while lines and not inbox.offer(Chunk(self, lines)):
                await asyncio.sleep(ROOM_S)


class _Subscription:
    """One subscription to all nodes.

    Args:
        client: Connected before `begin`.
        settings: The source's table.
    Attributes:
        failures: Node -> why it is not subscribed to.
    """

    def __init__(self, client: Client, settings: OpcuaSource) -> None:
        self.failures: dict[str, str] = {}
        self._client, self._settings = client, settings
        self._loop = asyncio.get_running_loop()
        self._nodes = dict(enumerate(settings.nodes, 1))  # handle, as the server repeats it -> node
        # One message: while it waits here, none is asked for.
        self._messages: asyncio.Queue[ua.PublishResult] = asyncio.Queue(1)
        self._lost: asyncio.Future[Exception] = self._loop.create_future()
        self._expected = 0
        self._id = 0
        self._silence_s = math.inf
        self._heard = self._retry_at = self._loop.time()
        client.connection_lost_callback = self._note_loss

    async def begin(self) -> None:
        """Subscribe."""
        interval = float(self._settings.publishing_interval)
        keep_alive = max(1, math.ceil(KEEP_ALIVE_S / interval))
        result = await self._client.uaclient.session.create_subscription(
            ua.CreateSubscriptionParameters(
                RequestedPublishingInterval=interval * 1_000,
                RequestedLifetimeCount=max(3 * keep_alive, math.ceil(LIFETIME_S / interval)),
                RequestedMaxKeepAliveCount=keep_alive,
                MaxNotificationsPerPublish=PER_MESSAGE,
                PublishingEnabled=True,
            ),
            self._messages.put,
        )
        self._id = result.SubscriptionId
        alive_s = result.RevisedMaxKeepAliveCount * result.RevisedPublishingInterval / 1_000
        self._silence_s = 2 * alive_s + float(self._settings.timeout)
        await self._add(self._nodes)

    async def next(self) -> tuple[list[Change], int]:
        """Wait for the next message.

        Returns: its changes, and how many messages before it were lost.
        Raises: ConnectionError when no more will come.
        """
        message = await self._message()
        lost = self._missing_before(message.NotificationMessage)
        changes: list[Change] = []
        for data in message.NotificationMessage.NotificationData or []:
            if isinstance(data, ua.DataChangeNotification):
                changes += self._changes(data)
            elif isinstance(data, ua.StatusChangeNotification) and not data.Status.is_good():
                if self._lost.done():  # the library's own notice of it
                    with in_words(self._settings):
                        raise self._lost.result()
                raise ConnectionError(f"the server ended the subscription: {status_name(data.Status.value)}")
        return changes, lost

    async def _message(self) -> ua.PublishResult:
        # While the last one was handed over nobody listened: silence counts from here.
        self._heard = self._loop.time()
        get = self._loop.create_task(self._messages.get())
        try:
            while True:
                waited: set[asyncio.Future[ua.PublishResult] | asyncio.Future[Exception]] = {get, self._lost}
                await asyncio.wait(waited, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                if get.done():
                    return get.result()
                with in_words(self._settings):
                    await self._look()
        finally:
            get.cancel()

    async def _look(self) -> None:
        """See to what is no message."""
        if self._lost.done():
            raise self._lost.result()
        now = self._loop.time()
        if now - self._heard > self._silence_s:
            raise ConnectionError(f"the subscription was silent for {self._silence_s:.0f} s")
        if self.failures and now >= self._retry_at:
            await self._add({handle: node for handle, node in self._nodes.items() if node in self.failures})

    async def _add(self, nodes: Mapping[int, str]) -> None:
        """Subscribe to nodes; those that cannot be are failures."""
        self._retry_at = self._loop.time() + RETRY_S
        namespaces: list[str] = []
        if any(node.startswith("nsu=") for node in nodes.values()):
            namespaces = await self._client.get_namespace_array()
        items: list[ua.MonitoredItemCreateRequest] = []
        for handle, node in nodes.items():
            found = _node_id(node, namespaces)
            if isinstance(found, str):
                self.failures[node] = found
            else:
                items.append(self._item(handle, found, self._settings.nodes[node]))
        left = iter(items)
        while some := list(islice(left, NODES_AT_ONCE)):
            await self._create(some)

    async def _create(self, items: Sequence[ua.MonitoredItemCreateRequest]) -> None:
        results = await self._client.uaclient.session.create_monitored_items(
            ua.CreateMonitoredItemsParameters(
                SubscriptionId=self._id,
                TimestampsToReturn=ua.TimestampsToReturn.Both,
                ItemsToCreate=list(items),
            )
        )
        if len(results) != len(items):
            raise ConnectionError("the server answers for another number of nodes than it was asked")
        for item, result in zip(items, results, strict=True):
            node = self._nodes[item.RequestedParameters.ClientHandle]
            if result.StatusCode.is_good():
                self.failures.pop(node, None)
            else:
                self.failures[node] = status_name(result.StatusCode.value)

    def _item(self, handle: int, node: ua.NodeId, settings: OpcuaNode) -> ua.MonitoredItemCreateRequest:
        # -1 is once a publishing interval; 0 would be as fast as the server can.
        sampling_ms = float(self._settings.sampling_interval) * 1_000 or -1.0
        wanted = ua.MonitoringParameters(
            ClientHandle=handle,
            SamplingInterval=sampling_ms,
            QueueSize=self._settings.queue_size,
            DiscardOldest=True,
        )
        if settings.deadband:
            wanted.Filter = ua.DataChangeFilter(
                Trigger=ua.DataChangeTrigger.StatusValue,
                DeadbandType=ua.DeadbandType.Absolute,
                DeadbandValue=settings.deadband,
            )
        return ua.MonitoredItemCreateRequest(
            ItemToMonitor=ua.ReadValueId(NodeId=node, AttributeId=AttributeIds.Value),
            MonitoringMode=ua.MonitoringMode.Reporting,
            RequestedParameters=wanted,
        )

    def _changes(self, data: ua.DataChangeNotification) -> list[Change]:
        changes = []
        for item in data.MonitoredItems or []:
            node = self._nodes.get(item.ClientHandle)
            if node is not None and item.Value is not None:
                changes.append(Change(node, self._settings.nodes[node], item.Value))
        return changes

    def _missing_before(self, message: ua.NotificationMessage) -> int:
        """How many messages were lost, by their numbers; one without data uses none up."""
        expected, number = self._expected, message.SequenceNumber
        if not message.NotificationData:
            return 0
        self._expected = (number + 1) % SEQUENCE or 1
        return (number - expected) % SEQUENCE if expected and number > expected else 0

    async def _note_loss(self, error: Exception) -> None:
        if not self._lost.done():
            self._lost.set_result(ConnectionError("no answer") if isinstance(error, TimeoutError) else error)


def _node_id(node: str, namespaces: Sequence[str]) -> ua.NodeId | str:
    """A node's id, or why there is none."""
    if node.startswith("nsu="):
        uri, _, rest = node.removeprefix("nsu=").partition(";")
        if uri not in namespaces:
            return "the server has no such namespace"
        node = f"ns={namespaces.index(uri)};{rest}"
    try:
        return ua.NodeId.from_string(node)
    except UaError:
        return "no node id"
