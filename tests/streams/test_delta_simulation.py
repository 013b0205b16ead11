"""Whatever happens to relays and connections, SDKs end up with exactly what the relay has.

Replicas of one environment lag, get changes in another order, take everything anew, are led back to
FDv1 and return, and restart from any older snapshot, with its journal or without. SDKs are cut off at
any byte and come back to any replica. Journal, encoders, file format, streams and polls are those of
the product; only sockets and disks are not.

A relay that says that nothing is new is believed only if the SDK has all that this relay has. The defects
that it finds are planted in `test_planted_defects.py`. It has also found, within some hundred histories:
no barriers for those who come back, or none for those who stay; changes sent to clients that wait;
openings, or pending changes kept over a change; a slow client that is not started over. And, within
some thousands: deltas for polls of Node's SDK.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from relay.environment import Environment
from relay.model import journal as journal_module
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.item import Item, Kind
from relay.model.journal import Journal, SavedJournal
from relay.model.payload import ChangeSet, Payload, Selector
from relay.protocol import snapshot
from relay.registry import Grant
from relay.stores import Stored
from relay.streams import channel
from relay.streams.deltas import STREAM, DeltaChannel
from relay.streams.hub import Hub
from relay.streams.transport import decode_chunks
from relay.web.access import Access
from relay.web.endpoints.polling import PollingHandler
from relay.web.responses import PreparedResponse
from relay.web.routes import ROUTES
from tests.support import virtual
from tests.support.admission import patient, small_sizes
from tests.support.contracts import ScriptedSource
from tests.support.fdv2 import Client, Content, Keeper, NodeClient

EXAMPLES = int(os.environ.get("EXAMPLES", "400"))
REPLICAS = 3
Key = tuple[Kind, str]
KEYS = [(Kind.FLAG, "a"), (Kind.FLAG, "b"), (Kind.SEGMENT, "a")]
LARGE = Kind.FLAG, "large"
PADDING = "x" * 1500
"""Of an item that seldom changes: beside it, deltas are small."""

NONE = b'"intentCode":"none"'

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


def selector_of(number: int) -> Selector:
    """Return LaunchDarkly's name of its data of a number."""
    return Selector(f"(p:LD:{number})", "LD", number)


class LaunchDarkly:
    """The truth, and the messages that have yet to reach each replica."""

    def __init__(self) -> None:
        self._count = 0
        self.items = {LARGE: item(*LARGE, 1, 0, PADDING)}
        self.history: list[tuple[Item, ...]] = []
        """All data that there have been; the number of the first ones is 1."""
        self._touched: list[set[Key]] = []
        """Keys that each of these differs in from the one before."""
        self._remember(*self.items)
        self.queues: list[list[ChangeSet]] = [[] for _ in range(REPLICAS)]
        """Messages of FDv1 on their way to each replica."""

    @property
    def newest(self) -> int:
        """Number of the present data."""
        return len(self.history)

    @property
    def content(self) -> Content:
        return content(Payload.of(self.history[-1]))

    def everything(self, number: int, *, fdv2: bool) -> ChangeSet:
        """Return the message with all data of a number."""
        items = self.history[number - 1]
        return ChangeSet(items, full=True, selector=selector_of(number) if fdv2 else None)

    def changes(self, basis: str, number: int) -> ChangeSet:
        """Return the message of FDv2 for one who has the data of a state.

        Args:
            basis: the state.
            number: of the data that it leads to.
        """
        before = int(basis.rpartition(":")[2].removesuffix(")"))
        assert before <= number
        live = {(each.kind, each.key): each for each in self.history[number - 1]}
        touched = set().union(*self._touched[before:number])
        items = (live.get(key) or Item(*key, 0, None) for key in (*KEYS, LARGE) if key in touched)
        return ChangeSet(tuple(items), selector=selector_of(number), since=basis)

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
            self._remember(KEYS[number])

    def grow(self) -> None:
        """Change what most of the bytes are of, so that nothing less than everything is sent."""
        large = self.items[LARGE]
        self._issue(item(*LARGE, large.version + 1, 0, f"{PADDING}{self._next()}"))

    def reset(self) -> None:
        """Begin all versions anew."""
        for kind, key in KEYS:
            if (kind, key) in self.items:
                self._issue(item(kind, key, 1, self._next(), self._count))

    def _issue(self, *items: Item) -> None:
        for each in items:
            self.items[each.kind, each.key] = each
        self._remember(*((each.kind, each.key) for each in items))
        for queue in self.queues:
            queue.append(ChangeSet(items))

    def _remember(self, *touched: Key) -> None:
        self._touched.append(set(touched))
        self.history.append(tuple(each for each in self.items.values() if not each.deleted))

    def _next(self) -> int:
        self._count += 1
        return self._count


class Process:
    """One process of a replica."""

    limit: int | None = None
    """Bytes that may be unread at a time, if large data have to be admitted."""

    def __init__(self, stored: Stored | None = None, *, fdv2: bool = False) -> None:
        self.speaks_fdv2 = fdv2
        """True if it follows LaunchDarkly by FDv2."""
        journal = Journal(SPEC.lineage)
        admission = None if self.limit is None else patient(self.limit)
        hub = Hub({}, channels={STREAM: DeltaChannel(journal)}, admission=admission)
        self.environment = Environment(SPEC, ScriptedSource(), hub, LOG, journal=journal)
        self.polling = PollingHandler()
        self.access = Access(POLL, Grant(self.environment, SPEC.sdk_key))
        if stored is not None:
            self.environment._serve_stored(stored)

    @property
    def upstream(self) -> str:
        """State that it names to LaunchDarkly; empty if it is to get everything."""
        return self.environment.journal.upstream if self.speaks_fdv2 else ""

    @property
    def content(self) -> Content:
        return content(self.environment.payload)


class Wire:
    """Transport whose client reads when the simulation says so."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.confirmed: Content = {}
        """Data that the process had as it said that the client has them."""
        self.unread = b""
        self.protocol: Any = None
        self.is_paused = False

    def write(self, data: bytes) -> None:
        text = b"".join(decode_chunks(data))
        if NONE in text:
            self.confirmed = self._process.content
        self.unread += text

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_write_buffer_size(self) -> int:
        return len(self.unread)

    def get_extra_info(self, _name: str) -> None:
        return None

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
        self._polled: tuple[Process, asyncio.Task[tuple[PreparedResponse, Content]]] | None = None
        self._confirmed: Content = {}
        """Data that the relay had as it sent what the SDK is about to read, if that is `none`."""
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
            if self.is_exact:
                assert self.client.items == self._confirmed, self.client

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
        self.wire = Wire(process)
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
            self._confirmed = self.wire.confirmed
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

        async def answer() -> tuple[PreparedResponse, Content]:
            return await process.polling.handle(Request(scope), process.access), process.content

        self._polled = process, asyncio.create_task(answer())

    def take_poll(self) -> None:
        if self._polled is not None and self._polled[1].done():
            (process, task), self._polled = self._polled, None
            self._come_to(process)
            response, self._confirmed = task.result()
            if response.status == 200:
                self.client.feed_poll(response.body)


class Snapshot(NamedTuple):
    """File that a replica has written: data, and their journal, if it was of these data."""

    payload: Payload
    journal: SavedJournal | None

    def read(self, *, with_journal: bool) -> Stored:
        """Return its content, as the next process reads it."""
        chunks = list(snapshot.chunks(self.payload))
        size = sum(map(len, chunks))
        line = snapshot.journal_line(self.journal if with_journal else None)
        body = b"".join(chunks) + line
        digest = hashlib.sha256(body).hexdigest()
        header = snapshot.Header("main", "", 0.0, len(self.payload), size, digest, len(line))
        payload = snapshot.payload(header, body)
        return Stored(payload, age=0.0, journal=snapshot.journal(header, body))


class World:
    """LaunchDarkly, replicas, and SDKs.

    Args:
        fdv2: whether the replicas follow LaunchDarkly by FDv2, to begin with.
    """

    def __init__(self, *, fdv2: bool) -> None:
        self.launchdarkly = LaunchDarkly()
        self.states: dict[str, Content] = {}
        """Content that each state names."""
        self.processes = [Process(fdv2=fdv2) for _ in range(REPLICAS)]
        self.payloads: list[list[Payload]] = [[] for _ in range(REPLICAS)]
        self.snapshots: list[list[Snapshot]] = [[] for _ in range(REPLICAS)]
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
            self.payloads[replica].append(payload)

    def save(self, replica: int, lag: int) -> None:
        """Write a snapshot. Data of before have no journal any more."""
        journal = self.processes[replica].environment.journal
        if lag < len(self.payloads[replica]):
            payload = self.payloads[replica][-1 - lag]
            journal.finish_naming()
            self.snapshots[replica].append(Snapshot(payload, journal.saved(payload)))

    def deliver(self, replica: int, at: int) -> None:
        """Let a replica hear one message: by FDv1 in any order, by FDv2 one that leads further."""
        process, queue = self.processes[replica], self.launchdarkly.queues[replica]
        if process.upstream:
            basis, newest = process.upstream, self.launchdarkly.newest
            number = min(newest, int(basis.rpartition(":")[2].removesuffix(")")) + 1 + at)
            self.handle(replica, self.launchdarkly.changes(basis, number))
        elif process.speaks_fdv2 or not process.environment.connection.has_data:
            self.full(replica)
        elif queue:
            self.handle(replica, queue.pop(at % len(queue)))

    def catch_up(self, replica: int) -> None:
        """Let a replica hear all that it has not heard yet."""
        queue = self.launchdarkly.queues[replica]
        if self.processes[replica].speaks_fdv2:
            self.deliver(replica, self.launchdarkly.newest)
            queue.clear()
        while queue:
            self.deliver(replica, 0)

    def switch(self, replica: int) -> None:
        """Lead a replica back to FDv1, or let it return: either begins with everything."""
        process = self.processes[replica]
        process.speaks_fdv2 = not process.speaks_fdv2
        self.full(replica)

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
        number = max(1, self.launchdarkly.newest - back)
        fdv2 = self.processes[replica].speaks_fdv2
        self.handle(replica, self.launchdarkly.everything(number, fdv2=fdv2))
        if not back:
            self.launchdarkly.queues[replica].clear()

    def restart(self, replica: int, back: int, with_journal: bool) -> None:
        """Start a replica anew, from one of its snapshots or from nothing."""
        for visitor in self.visitors:
            if visitor.process is self.processes[replica]:
                visitor.cut()
        snapshots, fdv2 = self.snapshots[replica], self.processes[replica].speaks_fdv2
        stored = None
        if 0 < back <= len(snapshots):
            stored = snapshots[-back].read(with_journal=with_journal)
        self.processes[replica] = Process(stored, fdv2=fdv2)
        self._note(replica)
        if stored is None:
            self.full(replica)

    async def relapse(
        self, visitor: Visitor, replica: int, change: tuple[Any, ...], lost: tuple[Any, ...]
    ) -> None:
        """Start a replica anew from before its last change; an SDK of further before comes back."""
        await self.visit(visitor, replica, ALL)
        await self.do(change)
        self.catch_up(replica)
        self.save(replica, 0)
        await self.do(lost)
        self.catch_up(replica)
        self.restart(replica, 1, with_journal=True)
        await self.visit(visitor, replica, ALL)

    async def do(self, action: tuple[Any, ...]) -> None:
        """Let something happen: see `WEIGHTS`."""
        name, *arguments = action
        if hasattr(self.launchdarkly, name):
            getattr(self.launchdarkly, name)(*arguments)
        elif hasattr(self, name):
            if name in ("tear", "boot", "visit", "ask", "relapse"):
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
        for replica, process in enumerate(self.processes):
            if process.upstream:
                self.catch_up(replica)
            else:
                self.full(replica)
            assert process.content == self.launchdarkly.content
        for number, visitor in enumerate(self.visitors):
            visitor.take_poll()
            if visitor.wire is None:
                visitor.connect(self.processes[number % REPLICAS])
            visitor.wire.resume()
        rounds = 1 if Process.limit is None else 1 + len(self.visitors)
        for _ in range(rounds):  # who waits for admission gets everything after others
            await asyncio.sleep(5)
            for visitor in self.visitors:
                visitor.take(1 << 30)
        for visitor in self.visitors:
            if visitor.is_exact:
                assert visitor.process is not None
                assert visitor.client.items == visitor.process.content, visitor.client


REPLICA, VISITOR = st.integers(0, REPLICAS - 1), st.sampled_from([0, 0, 1, 2, 3, 4])
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
    st.sampled_from([("reset",), ("grow",)]): 1,
    st.tuples(st.just("deliver"), REPLICA, st.sampled_from([0, 0, 0, 1, 2])): 10,
    st.tuples(st.just("catch_up"), REPLICA): 10,
    st.tuples(st.just("blink"), REPLICA, KEY, st.integers(200, 400)): 5,
    st.tuples(st.just("rebirth"), REPLICA, KEY, st.integers(-3, 2)): 1,
    st.tuples(st.just("full"), REPLICA, st.sampled_from([0, 0, 0, 0, 1, 3])): 2,
    st.tuples(st.just("save"), REPLICA, st.sampled_from([0, 0, 0, 1, 2])): 6,
    st.tuples(st.just("restart"), REPLICA, st.integers(0, 6), st.booleans()): 4,
    st.tuples(st.just("relapse"), VISITOR, REPLICA, CHANGE, CHANGE): 2,
    st.tuples(st.just("switch"), REPLICA): 1,
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


async def simulate(actions: list[tuple[Any, ...]], *, fdv2: bool) -> None:
    world = World(fdv2=fdv2)
    for replica in range(REPLICAS - 1):  # the last one has no data yet
        world.full(replica)
    for action in actions:
        await world.do(action)
    await world.settle()


def run(actions: list[tuple[Any, ...]], *, fdv2: bool) -> None:
    with (
        patch.object(channel, "MAX_PENDING", 300),
        patch.object(journal_module, "MAX_SAVED_STATES", 4),
        patch.object(journal_module, "MAX_VANISHED", 2),
    ):
        virtual.run(simulate(actions, fdv2=fdv2))


HISTORIES = st.lists(ACTIONS, min_size=30, max_size=100)


@settings(max_examples=EXAMPLES, deadline=None)
@given(actions=HISTORIES, fdv2=st.booleans())
def test_sdks_end_up_with_exactly_what_the_relay_has(actions, fdv2):
    """After each transfer with the content of its state, and in the end with the relay's."""
    run(actions, fdv2=fdv2)


@settings(max_examples=EXAMPLES, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=30, max_size=100))
def test_sdks_that_wait_for_admission_end_up_with_the_same(actions):
    """Whatever changes until they get their data."""
    with small_sizes(interval=1.0), patch.object(Process, "limit", 2500):
        run(actions, fdv2=False)
