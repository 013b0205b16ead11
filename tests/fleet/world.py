"""Histories of a fleet, drawn from a seed: what happens to its members, and what must hold."""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from hashlib import blake2b
from typing import Any, TypeVar

from msgspec.structs import replace

from relay.aio import wait_for
from relay.environment import Environment
from relay.errors import ErrorKind
from relay.fleet import Command, Role
from relay.fleet.contents import Contents, is_at_least_as_new
from relay.fleet.feed import NAME, Feed, Keys, Outcome, Publication, Snapshot
from relay.fleet.member import Member
from relay.fleet.mirror import FleetMirror
from relay.fleet.source import FleetSource
from relay.fleet.timings import FleetTimings
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.item import Item, Kind
from relay.model.journal import SavedJournal
from relay.model.payload import EMPTY, Change, ChangeSet, Payload, Selector
from relay.protocol.feed import Entry, Head, entry_of
from relay.sources import Interrupted, Update, UpToDate
from relay.steps import finish
from relay.stores import Mirror, Stored
from relay.stores.items import parse_items
from relay.stores.redis.layout import Layout, entries
from relay.streams.hub import Hub
from tests.support.fakeredis import FakeConnection, FakeDatabase, FakeRedis, Link
from tests.support.simulation import Process, SimulatedLoop

T = TypeVar("T")

FAULTS_UNTIL = 20.0
CHANGES_UNTIL = 22.0
END = 38.0
"""Times of the world: long enough at the end for doubts to be settled."""

TIMINGS = FleetTimings(doubt=4.0, patience=13.0)
"""The program's, but for those that would only make histories longer."""

MAX_STEPS = 50_000
"""Ten times as many callbacks as a history has."""

MAX_LAG = 3.0
"""Seconds by which LaunchDarkly's servers may lag."""

TTL = TIMINGS.ttl

LOG = logging.getLogger("relay.env.simulation")
LOG.setLevel(logging.CRITICAL + 1)

KEYS = Keys("p", "an-environment")

DIVIDED_KEYS = Keys("p", "an-environment", in_cluster=True)

UPSTREAMS = "fdv1", "numbered", "addressed", "mixed"
"""Upstream without names; with names that have an order, as LaunchDarkly's; with addresses of the
content, as a relay's; as the second, but for members that fall back to FDv1, and for members of a
release whose feed tells no names."""


class LaunchDarkly:
    """Upstream: a sequence of states, and servers that lag behind it.

    Args:
        loop: of the world.
        forgets: True if complete answers leave deleted items out.
        kind: one of `UPSTREAMS`.
    """

    def __init__(self, loop: SimulatedLoop, *, forgets: bool, kind: str) -> None:
        self.loop = loop
        self.forgets = forgets or kind != "fdv1"
        self.kind = kind
        self.states: list[Payload] = []
        self.names: list[Selector] = []
        self.answers: Counter[str] = Counter()
        """Numbers of answers of FDv2 by kind."""
        self._times: list[float] = []
        self.connected: list[Process] = []
        self.news = asyncio.Event()
        items = [item(name, 1, serial=0) for name in ("a", "b", "c")]
        self._add(Payload.of(items))
        self._plan()

    def _add(self, payload: Payload) -> None:
        self.states.append(payload)
        number = len(self.states)
        payload_id = "U"
        if self.kind == "addressed":
            payload_id = f"r-{blake2b(repr(sorted(visible(payload).items())).encode()).hexdigest()}"
            number = 1
        self.names.append(Selector(f"(p:{payload_id}:{number})", payload_id, number))
        self._times.append(self.loop.now)
        news, self.news = self.news, asyncio.Event()
        news.set()

    def position(self, lag: int) -> int:
        """Return the state that a server has which lags by some changes, but not for too long."""
        newest = len(self.states) - 1
        known = bisect_right(self._times, self.loop.now - MAX_LAG) - 1
        return max(0, newest - lag, known)

    def named(self, state: str, newest: int | None = None) -> int | None:
        """Return the last position with a name, of those up to the newest one."""
        names = self.names if newest is None else self.names[: newest + 1]
        return next((n for n in reversed(range(len(names))) if names[n].state == state), None)

    def position_of(self, payload: Payload, first: int) -> int | None:
        """Return the first state from a position on with the items of a payload."""
        items, later = visible(payload), range(first, len(self.states))
        return next((n for n in later if visible(self.states[n]) == items), None)

    def missing(self, before: int, after: int) -> tuple[Item, ...]:
        """Return what has changed between positions; tombstones as FDv2 has them."""
        earlier, later = (self.states[position].flags for position in (before, after))
        items = (Item(each.kind, each.key, 0, None) if each.deleted else each
                 for key, each in later.items() if earlier.get(key) != each)  # fmt: skip
        return tuple(items)

    def _plan(self) -> None:
        random = self.loop.random
        pause = random.choice((0.02, 0.1, 0.4, 1.5))
        self.loop.after(random.uniform(0, 2 * pause), self._change)

    def _change(self) -> None:
        if self.loop.now > CHANGES_UNTIL:
            return
        random, before = self.loop.random, self.states[-1]
        key = random.choice("abcdef")
        known = before.flags.get(key)
        version = known.version + 1 if known else 1
        is_deleted = bool(known) and not known.deleted and random.random() < 0.15
        if self.kind == "numbered" and known and known.deleted and random.random() < 0.7:
            version = 1  # it is created anew
        serial = len(self.states)
        changed = [item(key, version, deleted=is_deleted, serial=serial)]
        if self.kind != "fdv1" and random.random() < 0.1:
            changed = []  # another name for the same data
        self._add(before.with_items(changed))
        self._plan()


def item(key: str, version: int, *, deleted: bool = False, serial: int) -> Item:
    text = b'{"key":"%b","version":%d,"serial":%d}'
    return Item(
        Kind.FLAG, key, version, None if deleted else text % (key.encode(), version, serial)
    )


class UpstreamSource:
    """A stream of one process from one of LaunchDarkly's servers.

    Args:
        launchdarkly: upstream.
        process: that follows it.
        check: is told the basis from which the process wants to continue.
        knows_names: False if it speaks FDv1 only.
    """

    protocol = "fdv1"

    def __init__(
        self,
        launchdarkly: LaunchDarkly,
        process: Process,
        check: Callable[[str], None],
        *,
        knows_names: bool,
    ) -> None:
        self._knows_names = knows_names
        self._launchdarkly = launchdarkly
        self._process = process
        self._check = check
        self._basis = ""
        self.is_cut = False
        self.has_delivered = False
        self._again = asyncio.Event()

    def resync(self) -> None:
        self._again.set()

    def check(self, *, reconnect: bool = False) -> None:
        pass

    async def updates(self, basis: str = "") -> AsyncGenerator[Update, None]:
        upstream, random = self._launchdarkly, self._launchdarkly.loop.random
        self._check(basis)
        self._basis = basis
        self._again.clear()
        upstream.connected.append(self._process)
        try:
            while True:
                await asyncio.sleep(random.uniform(0.02, 0.3))
                if self.is_cut:
                    yield Interrupted(ErrorKind.NETWORK_ERROR, "cut")
                    await asyncio.sleep(0.5)
                    continue
                if self._again.is_set():
                    self._again.clear()
                    self._basis = ""
                speaks_fdv1 = not self._knows_names
                if upstream.kind == "mixed" and self._knows_names:
                    speaks_fdv1 = random.random() < 0.4
                connection = self._connection if speaks_fdv1 else self._connection_of_fdv2
                async with aclosing(connection()) as updates:
                    async for update in updates:
                        yield update
        finally:
            upstream.connected.remove(self._process)

    async def _connection(self) -> AsyncGenerator[Update, None]:
        upstream, random = self._launchdarkly, self._launchdarkly.loop.random
        lag = random.choice((0, 0, 1, 2, 4))
        position = upstream.position(lag)
        state = upstream.states[position]
        items = [each for each in state if not (upstream.forgets and each.deleted)]
        self._basis = ""
        yield ChangeSet(tuple(items), full=True)
        self.has_delivered = True
        catches_up = upstream.loop.now + random.uniform(0, 3)
        while not (self.is_cut or self._again.is_set()):
            available = upstream.position(lag if upstream.loop.now < catches_up else 0)
            if position < available:
                before, position = upstream.states[position], position + 1
                after = upstream.states[position]
                changed = tuple(each for each in after if before.flags.get(each.key) != each)
                yield ChangeSet(changed)
                continue
            await wait_for(upstream.news, 0.5)
            if upstream.loop.random.random() < 0.1:
                yield UpToDate()

    async def _connection_of_fdv2(self) -> AsyncGenerator[Update, None]:
        upstream, random = self._launchdarkly, self._launchdarkly.loop.random
        lag = random.choice((0, 0, 1, 2, 4))
        position = upstream.position(lag)
        known = upstream.named(self._basis, position) if random.random() < 0.8 else None
        name = upstream.names[position]
        if known is None:
            upstream.answers["full"] += 1
            items = tuple(upstream.states[position].live(Kind.FLAG))
            yield self._told(ChangeSet(items, full=True, selector=name))
        elif name.state == self._basis:
            upstream.answers["none"] += 1
            yield UpToDate(self._basis)
        else:
            upstream.answers["changes"] += 1
            items = upstream.missing(known, position)
            yield self._told(ChangeSet(items, selector=name, since=self._basis))
        self.has_delivered = True
        catches_up = upstream.loop.now + random.uniform(0, 3)
        while not (self.is_cut or self._again.is_set()):
            available = upstream.position(lag if upstream.loop.now < catches_up else 0)
            if position < available:
                before, position = position, min(available, position + random.randint(1, 3))
                items, name = upstream.missing(before, position), upstream.names[position]
                yield self._told(ChangeSet(items, selector=name, since=self._basis))
                continue
            await wait_for(upstream.news, 0.5)
            if random.random() < 0.1:
                yield UpToDate()
            if random.random() < 0.05:
                return  # the connection is lost, and the next one continues

    def _told(self, changes: ChangeSet) -> ChangeSet:
        assert changes.selector is not None
        self._basis = changes.selector.state
        return changes


class FormerFeed(Feed):
    """Redis for a member of a release whose feed tells no names."""

    async def publish(self, keys: Keys, publication: Publication) -> Outcome:
        entry = replace(publication.entry, name=None)
        return await super().publish(keys, replace(publication, entry=entry))

    async def snapshot(self, keys: Keys, selector: str = "") -> Snapshot:
        return replace(await super().snapshot(keys, selector), noted=None)


class FormerDatabase(FakeDatabase):
    """Its access to Redis: it does not write names, but leaves those that are there."""

    async def run(self, key: str, work: Callable[[Any], Awaitable[T]]) -> T:
        return await super().run(key, lambda connection: work(FormerConnection(connection)))


class FormerConnection:
    def __init__(self, connection: FakeConnection) -> None:
        self._connection = connection

    async def execute_all(self, commands: Sequence[Command]) -> list[Any]:
        return await self._connection.execute_all(_without_names(commands))

    async def transaction(self, commands: Iterable[Command]) -> list[Any] | None:
        return await self._connection.transaction(_without_names(commands))


def _without_names(commands: Iterable[Command]) -> list[Command]:
    return [each[: each.index(NAME)] if NAME in each else each for each in commands]


class FormerSource(FleetSource):
    """It takes no notice of names in entries."""

    def read(self, place: str, entry: Entry) -> None:
        super().read(place, replace(entry, name=None))


class Disk:
    """The snapshot of a relay, as a mirror: what one process has left there for the next."""

    has_journal = True
    status = None

    def __init__(self) -> None:
        self.saved: tuple[Payload, SavedJournal] | None = None

    async def load(self) -> Stored | None:
        return Stored(self.saved[0], journal=self.saved[1]) if self.saved else None

    def update(self, payload: Payload, change: Change | None, **_: object) -> None:
        pass

    def suspend(self) -> None:
        pass

    async def flushed(self) -> None:
        pass

    async def run(self) -> None:
        await asyncio.Event().wait()


class Observed:
    """A source that looks at the environment after each update."""

    def __init__(self, source: FleetSource, look: Callable[[], None]) -> None:
        self._source = source
        self._look = look
        self.resync, self.check, self.protocol = source.resync, source.check, source.protocol

    async def updates(self, basis: str = "") -> AsyncGenerator[Update, None]:
        async with aclosing(self._source.updates(basis)) as updates:
            async for update in updates:
                yield update
                self._look()


class Node:
    """A relay of the fleet, in its process."""

    def __init__(self, world: World, name: str, disk: Disk | None = None) -> None:
        loop = world.loop
        self.world = world
        self.disk = disk or Disk()
        self.position = 0
        """The first state of upstream that it may have."""
        self.process = loop.process(name, loop.random.uniform(0.96, 1.04))
        self.link = Link()
        self.held: Payload = EMPTY
        self.is_up = True
        self.process.context.run(self._build)

    def _build(self) -> None:
        loop, server_of = self.world.loop, self.world.server_of
        self.is_former = self.world.launchdarkly.kind == "mixed" and loop.random.random() < 0.3
        database = FormerDatabase if self.is_former else FakeDatabase
        make_feed = FormerFeed if self.is_former else Feed
        wait = TIMINGS.wait if self.world.keys.visible else TIMINGS.poll
        limits = 0.6, 2.0, wait + 0.7
        feed = make_feed(*(database(server_of, self.link, limit) for limit in limits))
        self.member = Member(feed, self.process.name, LOG, TIMINGS)
        self.upstream = self.new_upstream()
        make_source = FormerSource if self.is_former else FleetSource
        self.source = make_source(self.member, self.world.keys, self.upstream, LOG)
        observed = Observed(self.source, self._look)
        spec = EnvironmentSpec("simulation", SDKKey("sdk-simulation"))
        self.environment = Environment(spec, observed, Hub({}), LOG)
        self.source.held = lambda: self.environment.payload
        self.source.selector = lambda: self.environment.journal.upstream_selector
        mirror = FleetMirror(self.member, self.source, lambda: 0, no_mirror, LOG, server="fake")
        self.environment.mirrors = (mirror,)
        if self.world.launchdarkly.kind != "fdv1":
            self.environment.mirrors = (self.disk, mirror)
        self.task = loop.create_task(self._run(), context=self.process.context)

    def new_upstream(self) -> UpstreamSource:
        upstream = self.world.launchdarkly
        knows_names = upstream.kind != "fdv1" and not self.is_former
        check = self._check_basis
        return UpstreamSource(upstream, self.process, check, knows_names=knows_names)

    def _check_basis(self, basis: str) -> None:
        """Look whether the data are those that upstream will take them for."""
        upstream = self.world.launchdarkly
        position = upstream.named(basis)
        if position is None:
            if basis:
                self.world.report(f"{self.process.name} has a name that upstream never gave")
        elif visible(self.environment.payload or EMPTY) != visible(upstream.states[position]):
            self.world.report(f"{self.process.name} has other data than those of its basis")

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.member.run())
            tasks.create_task(self.environment.run())

    def _look(self) -> None:
        payload = self.environment.payload
        journal = self.environment.journal
        self._check_basis(journal.upstream)
        if payload is None or payload is self.held:
            return
        if self.world.launchdarkly.kind != "fdv1" and self.world.loop.random.random() < 0.3:
            journal.finish_naming()
            if saved := journal.saved(payload):
                self.disk.saved = payload, saved
        if self.world.launchdarkly.kind == "numbered":
            self._check_position(payload)
        elif not is_at_least_as_new(payload, self.held):
            self.world.report(f"{self.process.name} went back")
        if not self.world.launchdarkly.forgets and versions(payload) not in self.world.known():
            self.world.report(f"{self.process.name} holds what upstream never had")
        self.held = payload

    def _check_position(self, payload: Payload) -> None:
        """Versions of items may go back, but not the sequence of states."""
        position = self.world.launchdarkly.position_of(payload, self.position)
        if position is None:
            self.world.report(f"{self.process.name} went back, or holds what upstream never had")
        else:
            self.position = position

    @property
    def believes_to_lead(self) -> bool:
        leadership = self.source.leadership
        if leadership is None or leadership.ended.is_set():
            return False
        return self.world.loop.now * self.process.rate < leadership.until

    def crash(self) -> None:
        self.is_up = False
        self.process.is_dead = True
        while self.process in self.world.launchdarkly.connected:
            self.world.launchdarkly.connected.remove(self.process)


def no_mirror() -> Mirror:
    raise AssertionError("there is a fleet")


def versions(payload: Payload) -> frozenset[tuple[str, int, bool]]:
    return frozenset((each.key, each.version, each.deleted) for each in payload)


class World:
    """One history.

    Args:
        seed: of all that happens.
        upstream: one of `UPSTREAMS`; drawn if omitted.
        members: number of relays.
        divided: True if the database is a cluster, and what SDKs read is at another server than
            the fleet's keys.
    """

    def __init__(
        self, seed: int, upstream: str = "", members: int = 3, *, divided: bool = False
    ) -> None:
        upstream = upstream or UPSTREAMS[seed % len(UPSTREAMS)]
        self.loop = SimulatedLoop(seed)
        self.keys = DIVIDED_KEYS if divided else KEYS
        self.findings: list[str] = []
        self.steps = 0
        """Number of callbacks until the end."""
        self._known: set[frozenset[tuple[str, int, bool]]] = set()
        self._lease_lost_at = -TTL
        random = self.loop.random
        self.loses_writes = random.random() < 0.5
        self.redis = FakeRedis(self.loop.after, lambda: self.loop.now, random)
        self.redis.before = self._before
        self.redis.checked = self._check_publication
        self.servers = [self.redis]
        """The one with the fleet's keys; in a cluster, then the one with what SDKs read."""
        if divided:
            other = FakeRedis(self.loop.after, lambda: self.loop.now, random)
            other.checked = self._check_visible
            self.servers.append(other)
        self.visible = EMPTY
        """Data that SDKs read in the cluster; empty after a loss."""
        self.loop.after_each = self._check_leaders
        self.loop.use()
        forgets = random.random() < 0.3
        self.launchdarkly = LaunchDarkly(self.loop, forgets=forgets, kind=upstream)
        self.nodes = [Node(self, f"m{number}") for number in range(members)]
        for _ in range(random.randint(2, 6)):
            self.loop.after(random.uniform(1, FAULTS_UNTIL), self._fault)
        self.loop.after(FAULTS_UNTIL + 0.01, self._heal)

    def report(self, finding: str) -> None:
        self.findings.append(f"{self.loop.now:.3f}: {finding}")

    def server_of(self, key: str) -> FakeRedis:
        """Return the server that has a key."""
        return self.servers[0 if key.startswith(self.keys.data.prefix) else -1]

    def known(self) -> set[frozenset[tuple[str, int, bool]]]:
        """Return the versions of all states that upstream has had."""
        states = self.launchdarkly.states
        for state in states[len(self._known) :]:
            self._known.add(versions(state))
        return self._known

    def run(self) -> list[str]:
        """Let everything happen; return what should not have happened."""
        try:
            self.loop.after(END, self.loop.stop)
            self.loop.run_forever()
            self.steps = self.loop.steps
            self._check_end()
        finally:
            for server in self.servers:
                server.is_closed = True
            self.loop.after_each = lambda: None
            self.loop.release()
        return self.findings

    # Faults

    @property
    def _alive(self) -> list[Node]:
        return [node for node in self.nodes if node.is_up]

    def _fault(self) -> None:
        random = self.loop.random
        faults = [
            self._stop,
            self._stop_at_worst,
            self._cut,
            self._slow,
            self._crash,
            self._cut_upstream,
        ]
        faults += [self._redis_down, self._redis_hangs, self._fade, self._fade, self._detour]
        if self.loses_writes:
            faults += [self._fail_over, self._fail_over, self._wipe]
        if len(self.servers) > 1:
            faults += [self._detour_of_hashes, self._detour_of_hashes]
            faults += [self._lead_twice] * (2 * self.loses_writes)
        random.choice(faults)(random.choice(self._alive))

    def _stop(self, node: Node) -> None:
        node.process.is_stopped = True
        self.loop.after(self.loop.random.uniform(0.3, 8), self._continue, node)

    def _continue(self, node: Node) -> None:
        node.process.is_stopped = False

    def _stop_at_worst(self, node: Node) -> None:
        """Stop it when a command is just sent, or an answer has just come."""

        def stop() -> None:
            node.link.before_send = node.link.before_answer = lambda: None
            self._stop(node)

        countdown = self.loop.random.randint(0, 8)

        def count() -> None:
            nonlocal countdown
            countdown -= 1
            if countdown < 0:
                stop()

        if self.loop.random.random() < 0.5:
            node.link.before_send = count
        else:
            node.link.before_answer = count

    def _cut(self, node: Node) -> None:
        if self.loop.random.random() < 0.5:
            node.link.held = []
        else:
            node.link.is_reset = True
        self.loop.after(self.loop.random.uniform(0.2, 6), self.redis.heal, node.link)

    def _slow(self, node: Node) -> None:
        random = self.loop.random
        slow = (0.0, random.choice((0.1, 0.5, 1.5)))
        if random.random() < 0.6:
            node.link.answer_delay = slow
        else:
            node.link.delay = slow
        self.loop.after(random.uniform(1, 6), self._hurry, node)

    def _detour(self, _: Node) -> None:
        """Let one publication of each arrive long after its sender has given it up."""
        for node in self.nodes:
            node.link.detour = self.loop.random.uniform(2.0, 4.0)

    def _detour_of_hashes(self, _: Node) -> None:
        """Let one write of each of what SDKs read arrive long after its sender has given it up."""
        for node in self.nodes:
            node.link.hash_detour = self.loop.random.uniform(2.0, 4.0)

    def _lead_twice(self, _: Node) -> None:
        """Let a lease be lost while its owner waits for the server that has what SDKs read."""
        random, other = self.loop.random, self.servers[-1]
        other.hang()
        self.loop.after(random.uniform(0.5, 3), other.go_on)
        self.loop.after(random.uniform(0.1, 0.5), self._lose_lease)

    def _lose_lease(self) -> None:
        self.redis.server.values.pop(self.keys.lease.encode(), None)
        self._lease_lost_at = self.loop.now

    def _fade(self, node: Node) -> None:
        """Let answers come late, and then none."""
        node.link.answer_delay = (0.5, 0.59)
        self.loop.after(self.loop.random.uniform(0.5, 3), self._vanish, node)

    def _vanish(self, node: Node) -> None:
        self._hurry(node)
        self.loop.random.choice((self._stop, self._cut))(node)

    def _hurry(self, node: Node) -> None:
        node.link.delay = node.link.answer_delay = (0.0002, 0.002)

    def _crash(self, node: Node) -> None:
        if len(self._alive) > 1:
            node.crash()
            self.loop.after(self.loop.random.uniform(0.2, 4), self._restart, node)

    def _restart(self, node: Node) -> None:
        if node in self.nodes:
            self.nodes.remove(node)
            keeps_disk = node.disk.saved is not None and self.loop.random.random() < 0.7
            disk = node.disk if keeps_disk else None
            self.nodes.append(Node(self, node.process.name + "'", disk))

    def _cut_upstream(self, node: Node) -> None:
        node.upstream.is_cut = True
        self.loop.after(self.loop.random.uniform(0.5, 14), self._mend_upstream, node)

    def _mend_upstream(self, node: Node) -> None:
        node.upstream.is_cut = False

    def _some_server(self) -> FakeRedis:
        return self.loop.random.choice(self.servers) if len(self.servers) > 1 else self.redis

    def _redis_down(self, _: Node) -> None:
        server = self._some_server()
        server.crash()
        self.loop.after(self.loop.random.uniform(0.2, 6), server.start)

    def _redis_hangs(self, _: Node) -> None:
        server = self._some_server()
        server.hang()
        self.loop.after(self.loop.random.uniform(0.2, 6), server.go_on)

    def _fail_over(self, _: Node) -> None:
        server = self._some_server()
        server.crash()
        server.server.lose_writes(self.loop.random.uniform(0, 0.4))
        self._note_loss(server)
        self.loop.after(self.loop.random.uniform(0.05, 3), self._end_failover, server)

    def _end_failover(self, server: FakeRedis) -> None:
        self._note_loss(server)
        server.start()

    def _wipe(self, _: Node) -> None:
        server = self._some_server()
        server.server.wipe()
        self._note_loss(server)

    def _note_loss(self, server: FakeRedis) -> None:
        if server is self.redis:
            self._lease_lost_at = self.loop.now
        self.visible = EMPTY

    def _heal(self) -> None:
        for server in self.servers:
            server.start()
            server.go_on()
        for node in self.nodes[:]:
            node.process.is_stopped = False
            node.link.before_send = node.link.before_answer = lambda: None
            self.redis.heal(node.link)
            self._hurry(node)
            node.link.detour = 0.0
            self._mend_upstream(node)
            if not node.is_up:
                self._restart(node)

    # What must hold

    def _check_leaders(self) -> None:
        assert self.loop.steps < MAX_STEPS, "something runs in a circle"
        leading = [node for node in self.nodes if node.source.leadership is not None]
        if len(leading) < 2 or self.loop.now < self._lease_lost_at + TTL:
            return
        names = [node.process.name for node in leading if node.believes_to_lead and node.is_up]
        if len(names) > 1:
            self.report(f"{' and '.join(names)} lead at once")

    def _before(self) -> tuple[bytes | None, object]:
        values = self.redis.server.values
        return values.get(self.keys.head.encode()), values.get(self.keys.feed.encode())

    def _check_publication(self, before: tuple[bytes | None, object]) -> None:
        values = self.redis.server.values
        stream = values.get(self.keys.feed.encode())
        if stream is None or stream is before[1]:
            return
        pairs = stream.last[1]
        entry = entry_of(dict(zip(pairs[::2], pairs[1::2], strict=True)))
        if entry.resigned:
            return
        head = Head.parse(before[0])
        number, selector = (head.number, head.selector) if head else (0, "")
        if entry.number != number + 1:
            self.report(f"entry {entry.number} follows entry {number}")
        if entry.before != selector:
            self.report(f"entry {entry.number} breaks the chain")
        stored = self._stored(self.redis, self.keys.data)
        if finish(Contents.of(stored)).selector != entry.after:
            self.report(f"the data after entry {entry.number} are not what it says")

    def _check_end(self) -> None:
        final = visible(self.launchdarkly.states[-1])
        for node in self.nodes:
            if node.task.done():
                self.report(f"{node.process.name} ended: {node.task.exception()!r}")
            elif visible(node.environment.payload or EMPTY) != final:
                self.report(f"{node.process.name} is not current")
            elif self.launchdarkly.kind in {"numbered", "addressed"}:
                name = node.environment.journal.upstream
                if name != self.launchdarkly.names[-1].state:
                    self.report(f"{node.process.name} does not know the name of its data: {name}")
        roles = sorted(node.source.role.value for node in self.nodes)
        if roles != sorted([Role.LEADER.value] + [Role.FOLLOWER.value] * (len(self.nodes) - 1)):
            self.report(f"roles at the end: {roles}")
        connected = [process.name for process in self.launchdarkly.connected]
        if len(connected) != 1:
            self.report(f"connected at the end: {connected}")
        read = self.keys.visible or self.keys.data
        if visible(self._stored(self.servers[-1], read)) != final:
            self.report("what SDKs read is not current")
        if read.marker.encode() not in self.servers[-1].server.values:
            self.report("what SDKs read has no marker")

    def _check_visible(self, _: object) -> None:
        read = self._stored(self.servers[-1], self.keys.visible or self.keys.data)
        if self.launchdarkly.kind == "numbered":
            former = self.launchdarkly.position_of(self.visible, 0) or 0
            if len(read) and self.launchdarkly.position_of(read, former) is None:
                self.report("what SDKs read went back, or upstream never had it")
        elif not is_at_least_as_new(read, self.visible):
            self.report("what SDKs read went back")
        self.visible = read

    @staticmethod
    def _stored(redis: FakeRedis, layout: Layout) -> Payload:
        values = redis.server.values
        hashes = {kind: values.get(layout.hash(kind).encode(), {}) for kind in Kind}
        return finish(parse_items(entries(hashes))).payload


def visible(payload: Payload) -> dict[str, bytes | None]:
    return {each.key: each.json for each in payload.live(Kind.FLAG)}
