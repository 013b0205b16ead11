"""Brings a database up to date once, without serving anything: `relay sync`, and the updater.

What is written, and that nothing newer is overwritten, is the mirror's decision, as in a relay that
runs; here is only what comes before (is there anything to write?) and after (what was it?).
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field

from relay.errors import ErrorKind, StoreUnavailable, UpstreamRefused, UpstreamUnavailable
from relay.model.environment import EnvironmentSpec
from relay.model.item import Item, Kind
from relay.model.payload import EMPTY, Change, ChangeSet, Payload
from relay.sources import DataSource, Interrupted, Update
from relay.stores import DataStore
from relay.stores.mirror import ONCE, DatabaseMirror
from relay.telemetry.log import Log

LAST_ANSWER = 3.0
"""Seconds that the last look has for its answer; then what is there must do."""

MAX_CONCURRENT = 16
"""Environments that are brought up to date at a time: hundreds of payloads need not be in memory
together."""

Key = tuple[Kind, str]


@dataclass(frozen=True, slots=True)
class SyncTarget:
    """From where to where one environment's data go.

    Args:
        spec: the environment.
        source: of its data.
        store: the database.
        log: a logger that names the environment.
    """

    spec: EnvironmentSpec
    source: DataSource
    store: DataStore
    log: Log


@dataclass(frozen=True, slots=True)
class SyncChanges:
    """How a database differs from upstream, by the keys of items.

    Args:
        added: live upstream, and not in the database.
        updated: newer upstream, or unreadable in the database.
        deleted: live in the database only.
        kept: newer in the database than upstream, and never overwritten; with it, as upstream is
            behind, what only the database has.
        whole: whether the database was never filled.
        unseen: items that must be stored, though nobody can see a difference: tombstones.
    """

    added: tuple[Key, ...] = ()
    updated: tuple[Key, ...] = ()
    deleted: tuple[Key, ...] = ()
    kept: tuple[Key, ...] = ()
    whole: bool = False
    unseen: int = 0

    def __bool__(self) -> bool:
        """Whether anything is to be written."""
        return bool(self.added or self.updated or self.deleted or self.whole or self.unseen)

    def counts(self) -> dict[str, int]:
        """Return how many there are of each."""
        kinds = ("added", "updated", "deleted", "kept")
        return {kind: len(getattr(self, kind)) for kind in kinds}

    @classmethod
    def between(cls, stored: Payload | None, payload: Payload, bad: Collection[Key]) -> SyncChanges:
        """Compare by versions.

        Args:
            stored: what the database holds; None if it was never filled.
            payload: what upstream has.
            bad: what the database holds, and nobody can read.
        """
        have = stored or EMPTY
        sorted_: defaultdict[str, list[Key]] = defaultdict(list)
        for item in payload:
            key = item.kind, item.key
            known = have.all(item.kind).get(item.key)
            sorted_[_fate(item, known, unreadable=key in bad)].append(key)
        gone = [key for key in _live(have, bad) if key[1] not in payload.all(key[0])]
        if sorted_["kept"]:
            # Upstream's answer is older than the database, so what it lacks may be new.
            sorted_["kept"] += gone
        else:
            sorted_["deleted"] += gone
        return cls(
            added=tuple(sorted_["added"]),
            updated=tuple(sorted_["updated"]),
            deleted=tuple(sorted_["deleted"]),
            kept=tuple(sorted_["kept"]),
            whole=stored is None,
            unseen=len(sorted_["unseen"]),
        )


def _fate(item: Item, stored: Item | None, *, unreadable: bool) -> str:
    """Return what happens to an item of upstream, as a member of `SyncChanges`; or "same"."""
    if unreadable:
        return "deleted" if item.deleted else "updated"
    if stored is None or (stored.deleted and item.version > stored.version):
        return "unseen" if item.deleted else "added"
    if item.version > stored.version:
        return "deleted" if item.deleted else "updated"
    return "kept" if item.version < stored.version else "same"


def _live(payload: Payload, bad: Collection[Key]) -> Iterator[Key]:
    """Yield what a database shows to SDKs, or would if it were readable."""
    yield from ((item.kind, item.key) for item in payload if not item.deleted)
    yield from bad


@dataclass(frozen=True, slots=True)
class SyncResult:
    """How it went with one environment.

    Args:
        name: of the environment.
        problem: why it could not be brought up to date; empty if it could.
        changes: what was written or, in a dry run, would be.
        items: flags and segments that upstream has.
    """

    name: str
    problem: str = ""
    changes: SyncChanges = field(default_factory=SyncChanges)
    items: int = 0


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """How to synchronise.

    Args:
        timeout: seconds that one environment has.
        dry_run: compare, and write nothing.
        recheck_after: seconds after the start at which upstream is asked again, until `is_seen`
            says that the environment has what is expected.
        is_seen: whether it is, by the environment's name, its payload, and what that changes.
    """

    timeout: float
    dry_run: bool = False
    recheck_after: Sequence[float] = ()
    is_seen: Callable[[str, Payload, SyncChanges], bool] = lambda _name, _payload, _changes: True


async def synchronise(
    targets: Sequence[SyncTarget],
    session: AbstractAsyncContextManager[object],
    options: SyncOptions,
    report: Callable[[SyncResult], None] = lambda _: None,
) -> dict[str, SyncResult]:
    """Bring each environment's database up to date, several at a time.

    Args:
        targets: the environments.
        session: of the sources; closed at the end.
        options: how.
        report: called for each environment when it is done.
    """
    room = asyncio.Semaphore(MAX_CONCURRENT)

    async def one(way: SyncTarget) -> SyncResult:
        async with room:
            outcome = await _one(way, options)
        report(outcome)
        return outcome

    async with session, asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(way)) for way in targets]
    return {outcome.name: outcome for outcome in (task.result() for task in running)}


async def _one(target: SyncTarget, options: SyncOptions) -> SyncResult:
    run = _Run(target, options)
    problem = ""
    try:
        async with asyncio.timeout(options.timeout):
            await run.do()
    except StoreUnavailable as e:
        problem = f"{target.store.server} is unavailable: {e}"
    except (UpstreamUnavailable, TimeoutError) as e:
        problem = str(e) or run.outage
    finally:
        await target.store.aclose()
    return run.outcome(problem)


class _Run:
    """One environment's way to the database.

    Args:
        target: it.
        options: how to go.
    """

    def __init__(self, target: SyncTarget, options: SyncOptions) -> None:
        self._target = target
        self._options = options
        self._started = time.monotonic()
        self._mirror: DatabaseMirror | None = None
        self._before: Payload | None = None
        """What the database held; None if it was never filled."""
        self._bad: frozenset[Key] = frozenset()
        """What it held, and nobody could read."""
        self._payload = EMPTY
        """What upstream has, beside what it sent and cannot be used."""
        self._changes: SyncChanges | None = None
        """What that brings; None before upstream has answered."""
        self._answered = False
        """Whether upstream has answered since the last look."""
        self._refused = False
        self._news = asyncio.Event()
        self.outage = "no answer from upstream in time"
        """What would be the reason if time were over now."""

    def outcome(self, problem: str) -> SyncResult:
        """Return how it went."""
        name = self._target.spec.name
        if self._changes is None:
            return SyncResult(name, problem)
        items = sum(1 for kind in Kind for _ in self._payload.live(kind))
        return SyncResult(name, problem, self._changes, items)

    async def do(self) -> None:
        """Load, compare and write, until upstream has what is expected.

        Raises:
            StoreUnavailable: the database cannot be read.
            UpstreamRefused: the key is refused.
        """
        way = self._target
        stored = await way.store.load()
        if stored is not None:
            self._before = self._payload = stored.payload
            self._bad = frozenset((bad.kind, bad.key) for bad in stored.invalid)
        running = [asyncio.create_task(self._listen())]
        if not self._options.dry_run:
            self._mirror = DatabaseMirror(way.store, "redis", way.source.resync, way.log, ONCE)
            running.append(asyncio.create_task(self._mirror.run()))
        done = asyncio.create_task(self._done())
        try:
            await asyncio.wait([done, *running], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (done, *running):
                task.cancel()
            await asyncio.wait([done, *running])
        for task in (*running, done):
            if not task.cancelled():
                task.result()

    async def _listen(self) -> None:
        async with aclosing(self._target.source.updates()) as updates:
            async for update in updates:
                self._take(update)
                self._answered = True
                self._news.set()

    def _take(self, update: Update) -> None:
        match update:
            case ChangeSet() if update.full or self._changes is not None:
                self._payload, _ = self._payload.apply(update)
                self._changes = SyncChanges.between(self._before, self._payload, self._bad)
                if self._mirror:
                    change = Change((), (), replace=True)
                    self._mirror.update(self._vouched_for(), change, full=update.full)
            case Interrupted():
                self._refused = update.refused
                # Nobody waits for the next attempt here.
                self.outage = update.reason.partition("; next attempt")[0]
                if self._mirror:
                    self._mirror.suspend()

    def _vouched_for(self) -> Payload:
        """Return what the database shall hold: what upstream has, and what may be newer still."""
        kept = set(self._changes.kept) if self._changes else set()
        before = self._before or EMPTY
        missing = (item for item in before if item.key not in self._payload.all(item.kind))
        return Payload.of([*self._payload, *(i for i in missing if (i.kind, i.key) in kept)])

    async def _done(self) -> None:
        await self._until(lambda: self._changes is not None or self._refused)
        looks = self._options.recheck_after
        for number, at in enumerate(looks, 1):
            if await self._until(self._is_seen, self._started + at - time.monotonic()):
                break
            self._answered = False
            self._target.source.check(reconnect=number == len(looks))
            if number == len(looks):
                await self._until(lambda: self._answered, LAST_ANSWER)
        if self._changes is None:
            raise UpstreamRefused(ErrorKind.ERROR_RESPONSE, self.outage)
        if self._mirror:
            self.outage = "the data could not be stored in time"
            await self._mirror.flushed()

    def _is_seen(self) -> bool:
        changes = self._changes
        return changes is not None and self._options.is_seen(
            self._target.spec.name, self._payload, changes
        )

    async def _until(self, holds: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until something holds, for so many seconds at most; return whether it does."""
        try:
            async with asyncio.timeout(None if seconds is None else max(0.0, seconds)):
                while not holds():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return holds()
        return True
