"""Whatever happens to relays and connections, SDKs end up with exactly what the relay has.

Replicas of one environment lag, get changes in another order, take everything anew, and restart from
any older snapshot. SDKs are cut off at any byte and come back to any replica. Journal, encoders,
streams and polls are those of the product; only sockets are not.

It finds each of these within 400 histories: a state that counts from its newest occurrence; a state
that is a number of steps, or an address of keys and versions alone; a delta that leaves out one step,
or what vanished from upstream's data; no barriers, or none for those who come back, or none for those
who stay; tombstones that are forgotten; Node's stale states taken at their word; changes sent to
clients that wait; deltas, openings, or pending changes kept over a change; a slow client that is not
started over. And, within some thousands: deltas for polls of Node's SDK.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from relay.environment import Environment
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.item import Item, Kind
from relay.model.journal import Journal
from relay.model.payload import ChangeSet, Payload
from relay.registry import Grant
from relay.streams import channel
from relay.streams.deltas import STREAM, DeltaChannel
from relay.streams.hub import Hub
from relay.streams.transport import decode_chunks
from relay.web.access import Access
from relay.web.endpoints.polling import PollingHandler
from relay.web.routes import ROUTES
from tests.support import virtual
from tests.support.contracts import ScriptedSource
from tests.support.fdv2 import Client, Content, Keeper, NodeClient

EXAMPLES = int(os.environ.get("EXAMPLES", "400"))
REPLICAS = 3
KEYS = [(Kind.FLAG, "a"), (Kind.FLAG, "b"), (Kind.SEGMENT, "a")]
PADDING = "x" * 1500
"""Of an item that never changes: beside it, deltas are small."""

MIN_RECONNECT_DELAY = 0.5
"""Seconds: one, of which SDKs take off up to a half by chance."""

SPEC = EnvironmentSpec("main", SDKKey("sdk-1"))
POLL = next(route for route in ROUTES if route.template == "/sdk/poll")
LOG = logging.getLogger("simulation")
LOG.disabled = True


def item(kind: Kind, key: str, version: int, salt: int, text: object) -> Item:
    value = {"key": key, "version": version, "salt": str(salt), "text": text}
    return Item(kind, key, version, orjson.dumps(value))


def content(payload: Payload | None) -> Content:
    return {
        (kind.noun, each.key): orjson.loads(each.json or b"")
        for kind in Kind
        for each in (payload.live(kind) if payload else ())
    }


class LaunchDarkly:
    """The truth, and the messages that have yet to reach each replica."""

    def __init__(self) -> None:
        self._count = 0
        large = item(Kind.FLAG, "large", 1, 0, PADDING)
        self.items = {(Kind.FLAG, "large"): large}
        self.history: list[tuple[Item, ...]] = []
        self._remember()
        self.queues: list[list[ChangeSet]] = [[] for _ in range(REPLICAS)]

    def put(self, number: int) -> None:
        """Change an item, or create it."""
        kind, key = KEYS[number]
        known = self.items.get((kind, key))
        salt = orjson.loads(known.json)["salt"] if known and known.json else self._count
        self._issue(item(kind, key, (known.version if known else 0) + 1, salt, self._next()))

    def delete(self, number: int) -> None:
        kind, key = KEYS[number]
        known = self.items.get((kind, key))
        if known and not known.deleted:
            self._issue(Item(kind, key, known.version + 1, None))

    def create(self, number: int, advance: int) -> None:
        """Create an item anew, at a version that need not be greater."""
        kind, key = KEYS[number]
        known = self.items.get((kind, key))
        version = max(1, (known.version if known else 0) + advance)
        self._issue(item(kind, key, version, self._next(), self._count))

    def touch(self, number: int) -> None:
        """Let an item be another one of the same version and salt, as in a restored database."""
        kind, key = KEYS[number]
        known = self.items.get((kind, key))
        if known and known.json:
            value = {**orjson.loads(known.json), "text": self._next()}
            self._issue(Item(kind, key, known.version, orjson.dumps(value)))

    def purge(self, number: int) -> None:
        """Forget an item, its tombstone included: only the next full transfer shows it."""
        if self.items.pop(KEYS[number], None):
            self._remember()

    def reset(self) -> None:
        """Begin all versions anew."""
        for kind, key in KEYS:
            if (kind, key) in self.items:
                self._issue(item(kind, key, 1, self._next(), self._count))

    def _issue(self, *items: Item) -> None:
        for each in items:
            self.items[each.kind, each.key] = each
        self._remember()
        for queue in self.queues:
            queue.append(ChangeSet(items))

    def _remember(self) -> None:
        self.history.append(tuple(each for each in self.items.values() if not each.deleted))

    def _next(self) -> int:
        self._count += 1
        return self._count


class Process:
    """One process of a replica."""

    def __init__(self, stored: Payload | None = None) -> None:
        journal = Journal(SPEC.lineage)
        hub = Hub({}, channels={STREAM: DeltaChannel(journal)})
        self.environment = Environment(SPEC, ScriptedSource(), hub, LOG, journal=journal)
        self.polling = PollingHandler()
        self.access = Access(POLL, Grant(self.environment, SPEC.sdk_key))
        if stored is not None:
            self.environment._apply(ChangeSet(tuple(stored), full=True))

    @property
    def content(self) -> Content:
        return content(self.environment.payload)


class Wire:
    """Transport whose client reads when the simulation says so."""

    def __init__(self) -> None:
        self.unread = b""
        self.protocol: Any = None
        self.is_paused = False

    def write(self, data: bytes) -> None:
        self.unread += b"".join(decode_chunks(data))

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_write_buffer_size(self) -> int:
        return len(self.unread)

    def pause(self) -> None:
        self.is_paused = True
        self.protocol.pause_writing()

    def resume(self) -> None:
        if self.is_paused:
            self.is_paused = False
            self.protocol.resume_writing()

    def close(self) -> None:
        raise AssertionError("nobody has ended the stream")

    abort = close


class Visitor:
    """An SDK and its connection."""

    def __init__(self, world: World, make: Callable[[str], Client], number: int) -> None:
        self._world = world
        self._make = make
        self._number = number
        self._starts = 0
        self.wire: Wire | None = None
        self._polled: tuple[Process, asyncio.Task[Any]] | None = None
        self.process: Process | None = None
        """Process that the last bytes are from."""
        self.home: Process | None = None
        """Process that a keeper of half payloads has all of its data from."""
        self.start()

    def start(self) -> None:
        """Start the SDK, which knows nothing yet."""
        self.cut()
        self._polled = None
        self._starts += 1
        self.client = self._make(f"{self._number}-{self._starts}")
        self.reconnects = False
        self.home = None
        commit, up_to_date = self.client.commit, self.client.up_to_date

        def committed(items: Any, state: str, *, full: bool) -> None:
            commit(items, state, full=full)
            if full:
                self.home = self.process
            self._check(state)

        def kept() -> None:
            up_to_date()
            self._check(self.client.named)

        self.client.commit = committed  # type: ignore[method-assign]
        self.client.up_to_date = kept  # type: ignore[method-assign]

    @property
    def is_exact(self) -> bool:
        """True where an SDK is promised to have exactly the data of its state (fdv2 13.8.1).

        A keeper of half transfers is, as long as all that it has is from this process.
        """
        return not isinstance(self.client, Keeper) or self.home is not None

    def _check(self, state: str) -> None:
        if self.is_exact:
            assert self.client.items == self._world.states[state], (self.client, state)

    def connect(self, process: Process) -> None:
        self.cut()
        self.reconnects = True
        self._polled = None
        basis = self.client.stream_basis()
        environment, query = process.environment, f"basis={basis}".encode()
        reliable = process.polling.bases.of_stream(environment, self.client.headers, query)
        self.wire = Wire()
        self._come_to(process)
        environment.hub.subscribe(STREAM, self.wire, b"", None, reliable)

    def _come_to(self, process: Process) -> None:
        self.process = process
        if process is not self.home:
            self.home = None

    def cut(self) -> None:
        """Lose the connection, with all that has not been read."""
        if self.wire is not None:
            self.wire.protocol.connection_lost(None)
            self.wire = None

    def take(self, number: int) -> None:
        if self.wire is not None:
            data, self.wire.unread = self.wire.unread[:number], self.wire.unread[number:]
            self.client.feed(data)

    def pause(self) -> None:
        """Let the buffer of the connection be full."""
        if self.wire is not None:
            self.wire.pause()

    def resume(self) -> None:
        if self.wire is not None:
            self.wire.resume()

    def renew(self) -> None:
        """Give the stream up for a while: the next one names the newest state."""
        if isinstance(self.client, NodeClient):
            self.client.renew_stream()

    def poll(self, process: Process) -> None:
        self.cut()
        basis = self.client.poll_basis()
        scope = {
            "type": "http",
            "headers": list(self.client.headers.items()),
            "query_string": f"basis={basis}".encode(),
            "path_params": {},
        }
        answer = process.polling.handle(Request(scope), process.access)
        self._polled = process, asyncio.create_task(answer)

    def take_poll(self) -> None:
        if self._polled is not None and self._polled[1].done():
            (process, task), self._polled = self._polled, None
            self._come_to(process)
            if task.result().status == 200:
                self.client.feed_poll(task.result().body)


class World:
    """LaunchDarkly, replicas, and SDKs."""

    def __init__(self) -> None:
        self.launchdarkly = LaunchDarkly()
        self.states: dict[str, Content] = {}
        """Content that each state names."""
        self.processes = [Process() for _ in range(REPLICAS)]
        self.snapshots: list[list[Payload]] = [[] for _ in range(REPLICAS)]
        makes = [Client, NodeClient, NodeClient, Keeper, Keeper]
        self.visitors = [Visitor(self, make, number) for number, make in enumerate(makes)]

    def handle(self, replica: int, changes: ChangeSet) -> None:
        """Let a replica hear from upstream, and note which content its state names."""
        process = self.processes[replica]
        process.environment._handle(changes)
        self._note(replica)

    def _note(self, replica: int) -> None:
        process = self.processes[replica]
        payload, state = process.environment.payload, process.environment.journal.state
        if payload is not None:
            assert self.states.setdefault(state, process.content) == process.content
            self.snapshots[replica].append(payload)

    def deliver(self, replica: int, at: int) -> None:
        queue = self.launchdarkly.queues[replica]
        if queue:
            self.handle(replica, queue.pop(at % len(queue)))

    def catch_up(self, replica: int) -> None:
        """Let a replica hear all that it has not heard yet."""
        while self.launchdarkly.queues[replica]:
            self.deliver(replica, 0)

    async def blink(self, replica: int, number: int, bytes_: int) -> None:
        """Let a replica hear of an item, and of its deletion: the state before may recur.

        Connections are cut within these messages.
        """
        self.launchdarkly.put(number)
        self.catch_up(replica)
        self.launchdarkly.delete(number)
        self.catch_up(replica)
        await asyncio.sleep(0.001)
        for visitor in self.visitors:
            if visitor.process is self.processes[replica]:
                self.tear(visitor, bytes_)

    def rebirth(self, replica: int, number: int, advance: int) -> None:
        """Let a replica hear that an item is gone, and then that it is there anew."""
        self.launchdarkly.delete(number)
        self.full(replica)
        self.launchdarkly.create(number, advance)
        self.catch_up(replica)

    def tear(self, visitor: Visitor, number: int) -> None:
        """Cut a connection within what is on its way; the SDK comes back to the same relay."""
        if visitor.wire is not None and visitor.process in self.processes:
            visitor.take(number)
            visitor.connect(visitor.process)

    async def boot(self, visitor: Visitor, replica: int, change: tuple[Any, ...]) -> None:
        """Start an SDK that polls, then opens a stream; meanwhile something changes."""
        visitor.start()
        visitor.poll(self.processes[replica])
        await asyncio.sleep(0)
        visitor.take_poll()
        await self.do(change)
        self.full(replica)
        visitor.connect(self.processes[replica])

    def full(self, replica: int, back: int = 0) -> None:
        """Let a replica get all data, or those of an earlier time."""
        history = self.launchdarkly.history
        self.handle(replica, ChangeSet(history[max(0, len(history) - 1 - back)], full=True))
        if not back:
            self.launchdarkly.queues[replica].clear()

    def restart(self, replica: int, back: int) -> None:
        """Start a replica anew, from one of its former states or from nothing."""
        for visitor in self.visitors:
            if visitor.process is self.processes[replica]:
                visitor.cut()
        snapshots = self.snapshots[replica]
        stored = snapshots[-back] if 0 < back <= len(snapshots) else None
        self.processes[replica] = Process(stored)
        self._note(replica)
        if stored is None:
            self.full(replica)

    async def do(self, action: tuple[Any, ...]) -> None:
        """Let something happen: see `WEIGHTS`."""
        name, *arguments = action
        if hasattr(self.launchdarkly, name):
            getattr(self.launchdarkly, name)(*arguments)
        elif hasattr(self, name):
            if name in ("tear", "boot", "visit", "ask"):
                arguments[0] = self.visitors[arguments[0]]
            done = getattr(self, name)(*arguments)
            if done is not None:
                await done
        else:
            await asyncio.sleep(0.001)  # changes before it go out together
            getattr(self.visitors[arguments[0]], name)(*arguments[1:])
        for visitor in self.visitors:
            visitor.take_poll()

    async def visit(self, visitor: Visitor, replica: int, number: int) -> None:
        """Let an SDK connect, and take bytes of what it gets."""
        if visitor.reconnects:
            await asyncio.sleep(MIN_RECONNECT_DELAY)
        visitor.connect(self.processes[replica])
        await asyncio.sleep(0.001)
        visitor.take(number)

    def ask(self, visitor: Visitor, replica: int) -> None:
        """Let an SDK poll."""
        visitor.poll(self.processes[replica])

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""
        await asyncio.sleep(seconds)

    async def settle(self) -> None:
        """Let everything arrive; SDKs that are not connected come back."""
        for replica in range(REPLICAS):
            self.full(replica)
        for number, visitor in enumerate(self.visitors):
            visitor.take_poll()
            if visitor.wire is None:
                visitor.connect(self.processes[number % REPLICAS])
            visitor.wire.resume()
        await asyncio.sleep(5)
        for visitor in self.visitors:
            visitor.take(1 << 30)
            if visitor.is_exact:
                assert visitor.process is not None
                assert visitor.client.items == visitor.process.content, visitor.client


REPLICA, VISITOR = st.integers(0, REPLICAS - 1), st.integers(0, 4)
KEY = st.integers(0, len(KEYS) - 1)
ALL = 1 << 30

CHANGE = st.one_of(
    st.tuples(st.sampled_from(["put", "delete", "purge"]), KEY),
    st.tuples(st.just("create"), KEY, st.integers(-3, 2)),
)

# How often each happens: mostly what happens every day, so that there is something to get wrong.
WEIGHTS: dict[st.SearchStrategy[tuple[Any, ...]], int] = {
    st.tuples(st.just("put"), KEY): 10,
    st.tuples(st.just("delete"), KEY): 4,
    st.tuples(st.just("create"), KEY, st.integers(-3, 2)): 2,
    st.tuples(st.sampled_from(["touch", "purge"]), KEY): 2,
    st.just(("reset",)): 1,
    st.tuples(st.just("deliver"), REPLICA, st.sampled_from([0, 0, 0, 1, 2])): 10,
    st.tuples(st.just("catch_up"), REPLICA): 10,
    st.tuples(st.just("blink"), REPLICA, KEY, st.integers(200, 400)): 3,
    st.tuples(st.just("rebirth"), REPLICA, KEY, st.integers(-3, 2)): 1,
    st.tuples(st.just("full"), REPLICA, st.sampled_from([0, 0, 0, 0, 1, 3])): 2,
    st.tuples(st.just("restart"), REPLICA, st.integers(0, 4)): 2,
    st.tuples(st.just("visit"), VISITOR, REPLICA, st.just(ALL)): 15,
    st.tuples(st.just("visit"), VISITOR, REPLICA, st.integers(0, 700)): 4,
    st.tuples(st.just("tear"), VISITOR, st.integers(0, 700)): 5,
    st.tuples(st.just("boot"), VISITOR, REPLICA, CHANGE): 4,
    st.tuples(st.just("ask"), VISITOR, REPLICA): 6,
    st.tuples(st.just("take"), VISITOR, st.just(ALL)): 10,
    st.tuples(st.just("take"), VISITOR, st.integers(0, 700)): 4,
    st.tuples(st.sampled_from(["cut", "pause", "resume"]), VISITOR): 6,
    st.tuples(st.sampled_from(["start", "renew"]), VISITOR): 1,
    st.tuples(st.just("sleep"), st.sampled_from([0.0, 1.0, 4.0, 20.0])): 2,
}
ACTIONS = st.sampled_from(
    [action for action, weight in WEIGHTS.items() for _ in range(weight)]
).flatmap(lambda action: action)


async def simulate(actions: list[tuple[Any, ...]]) -> None:
    world = World()
    for replica in range(REPLICAS - 1):  # the last one has no data yet
        world.full(replica)
    for action in actions:
        await world.do(action)
    await world.settle()


@settings(max_examples=EXAMPLES, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=30, max_size=100))
def test_sdks_end_up_with_exactly_what_the_relay_has(actions):
    """After each transfer with the content of its state, and in the end with the relay's."""
    with patch.object(channel, "MAX_PENDING", 300):
        virtual.run(simulate(actions))
