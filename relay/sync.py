"""Bring a data store up to date once, without serving: `relay sync` and the Lambda updater.

As in a running relay, the mirror decides what to write, and overwrites nothing newer. This module
only compares upstream with the database, and reports the changes.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field

from relay import clock
from relay.errors import ErrorKind, StoreUnavailable, UpstreamRefused, UpstreamUnavailable
from relay.model.environment import EnvironmentSpec
from relay.model.item import Item, Kind
from relay.model.payload import EMPTY, Change, ChangeSet, Payload
from relay.sources import DataSource, Interrupted, Update
from relay.stores import UNREADABLE, DataStore, Key, Version, Versions
from relay.stores.mirror import SINGLE_RUN, DatabaseMirror
from relay.stores.reconcile import Difference
from relay.telemetry.log import Log

LAST_RECHECK_TIMEOUT = 3.0
"""Seconds to wait for upstream's answer to the last recheck; then the data at hand are used."""

MAX_CONCURRENT = 16
"""Maximum number of environments synchronised at a time, so that not all payloads are in memory at
once."""


@dataclass(frozen=True, slots=True)
class SyncTarget:
    """One environment, the source of its data, and their destination.

    Args:
        spec: environment.
        source: source of its data.
        store: data store to bring up to date.
        log: logger that names the environment.
        database: kind of the store.
        label: the store for log lines and results; empty for the first or only database.
        table: table of the database; empty if it has none.
    """

    spec: EnvironmentSpec
    source: DataSource
    store: DataStore
    log: Log
    database: str = "redis"
    label: str = ""
    table: str = ""


@dataclass(frozen=True, slots=True)
class SyncChanges:
    """Differences between a database and upstream, as keys of items.

    Args:
        added: items that are live upstream, and not in the database.
        updated: items that are newer upstream, or unreadable in the database.
        deleted: items that are live in the database only.
        kept: items that are newer in the database than upstream, and never overwritten. If there
            are any, upstream is behind, so items that only the database has are kept as well.
        whole: True if the database was never filled.
        unseen: number of items to store that make no visible difference: tombstones.
    """

    added: tuple[Key, ...] = ()
    updated: tuple[Key, ...] = ()
    deleted: tuple[Key, ...] = ()
    kept: tuple[Key, ...] = ()
    whole: bool = False
    unseen: int = 0

    def __bool__(self) -> bool:
        """Return whether there is anything to write."""
        return bool(self.added or self.updated or self.deleted or self.whole or self.unseen)

    def counts(self) -> dict[str, int]:
        """Return the number of items per kind of change."""
        kinds = ("added", "updated", "deleted", "kept")
        return {kind: len(getattr(self, kind)) for kind in kinds}

    @classmethod
    def between(cls, versions: Versions | None, payload: Payload) -> SyncChanges:
        """Compare a database with upstream.

        Args:
            versions: versions of the stored items; None if the database was never filled.
            payload: data from upstream.
        """
        stored = versions or {}
        difference = Difference.between(stored, payload)
        by_fate: defaultdict[str, list[Key]] = defaultdict(list)
        for item in difference.outdated:
            key = item.kind, item.key
            by_fate[_fate(item, stored.get(key))].append(key)
        # If upstream is behind the database, items that it lacks may be new.
        missing_fate = "kept" if difference.ahead else "deleted"
        by_fate["kept"] += difference.ahead
        by_fate[missing_fate] += difference.extra
        return cls(
            added=tuple(by_fate["added"]),
            updated=tuple(by_fate["updated"]),
            deleted=tuple(by_fate["deleted"]),
            kept=tuple(by_fate["kept"]),
            whole=versions is None,
            unseen=len(by_fate["unseen"]),
        )


def _fate(item: Item, stored: Version | None) -> str:
    """Return the kind of change for an item that is outdated: a field of `SyncChanges`."""
    if stored is not None and (stored.live or stored == UNREADABLE):
        return "deleted" if item.deleted else "updated"
    return "unseen" if item.deleted else "added"


@dataclass(frozen=True, slots=True)
class SyncResult:
    """Result for one environment.

    Args:
        name: name of the environment.
        problem: reason why it is not up to date; empty on success.
        changes: changes that were written or, in a dry run, would be.
        items: number of flags and segments upstream.
        label: destination, unless it is the database of the relay.
    """

    name: str
    problem: str = ""
    changes: SyncChanges = field(default_factory=SyncChanges)
    items: int = 0
    label: str = ""


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """Options of a synchronisation.

    Args:
        timeout: seconds per environment.
        dry_run: compare, and write nothing.
        recheck_after: seconds after the start at which to check upstream again, unless `is_seen`
            returned True.
        is_seen: returns whether the expected change has arrived, from the environment's name, its
            payload and the changes.
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
        targets: environments to synchronise.
        session: session of the sources; closed at the end.
        options: options for all targets.
        report: called with the result of each environment as soon as it is done.

    Returns:
        The results by the environments' names; of several destinations one that failed, if any.
    """
    semaphore = asyncio.Semaphore(MAX_CONCURRENT)

    async def synchronise_and_report(target: SyncTarget) -> SyncResult:
        async with semaphore:
            result = await _synchronise_one(target, options)
        report(result)
        return result

    async with session, asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(synchronise_and_report(target)) for target in targets]
    results: dict[str, SyncResult] = {}
    for result in (task.result() for task in running):
        if result.problem or result.name not in results:
            results[result.name] = result
    return results


async def _synchronise_one(target: SyncTarget, options: SyncOptions) -> SyncResult:
    run = _Run(target, options)
    problem = ""
    try:
        async with asyncio.timeout(options.timeout):
            await run.execute()
    except StoreUnavailable as e:
        problem = f"{target.store.server or target.table} is unavailable: {e}"
    except (UpstreamUnavailable, TimeoutError) as e:
        problem = str(e) or run.outage
    finally:
        await target.store.aclose()
    return run.result(problem)


class _Run:
    """Synchronisation of one environment.

    Args:
        target: environment to synchronise.
        options: options of the synchronisation.
    """

    def __init__(self, target: SyncTarget, options: SyncOptions) -> None:
        self._target = target
        self._options = options
        self._started = clock.monotonic()
        self._mirror: DatabaseMirror | None = None
        self._before = EMPTY
        """Readable items of the database before."""
        self._versions: Versions | None = None
        """Versions of all its items; None if it was never filled."""
        self._payload = EMPTY
        """Data from upstream, without unusable items."""
        self._changes: SyncChanges | None = None
        """Differences between both; None before upstream has answered."""
        self._answered = False
        """True if upstream has answered since the last recheck."""
        self._refused = False
        self._updated = asyncio.Event()
        self.outage = "no answer from upstream in time"
        """Reason to report if the time runs out now."""

    def result(self, problem: str) -> SyncResult:
        """Return the result; *problem* is empty on success."""
        name, label = self._target.spec.name, self._target.label
        if self._changes is None:
            return SyncResult(name, problem, label=label)
        items = sum(1 for kind in Kind for _ in self._payload.live(kind))
        return SyncResult(name, problem, self._changes, items, label)

    async def execute(self) -> None:
        """Load, compare and write, until upstream has the expected data.

        Raises:
            StoreUnavailable: the database cannot be read.
            UpstreamRefused: the key is refused.
        """
        target = self._target
        stored = await target.store.load()
        if stored is not None:
            self._before = self._payload = stored.payload
            self._versions = stored.versions
        running = [asyncio.create_task(self._listen())]
        if not self._options.dry_run:
            self._mirror = DatabaseMirror(
                target.store,
                target.database,
                target.source.resync,
                target.log,
                SINGLE_RUN,
                label=target.label,
                table=target.table,
            )
            running.append(asyncio.create_task(self._mirror.run()))
        done = asyncio.create_task(self._wait_done())
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
                self._updated.set()

    def _take(self, update: Update) -> None:
        match update:
            case ChangeSet() if update.full or self._changes is not None:
                self._payload, _ = self._payload.apply(update)
                self._changes = SyncChanges.between(self._versions, self._payload)
                if self._mirror:
                    change = Change((), (), replace=True)
                    self._mirror.update(self._merged(), change, full=update.full)
            case Interrupted():
                self._refused = update.refused
                # The next attempt comes too late for this run.
                self.outage = update.reason.partition("; next attempt")[0]
                if self._mirror:
                    self._mirror.suspend()

    def _merged(self) -> Payload:
        """Return the payload to store: upstream's, plus stored items that may be newer."""
        kept = set(self._changes.kept) if self._changes else set()
        missing = (item for item in self._before if item.key not in self._payload.all(item.kind))
        return Payload.of([*self._payload, *(i for i in missing if (i.kind, i.key) in kept)])

    async def _wait_done(self) -> None:
        await self._until(lambda: self._changes is not None or self._refused)
        rechecks = self._options.recheck_after
        for number, at in enumerate(rechecks, 1):
            if await self._until(self._is_seen, self._started + at - clock.monotonic()):
                break
            self._answered = False
            self._target.source.check(reconnect=number == len(rechecks))
            if number == len(rechecks):
                await self._until(lambda: self._answered, LAST_RECHECK_TIMEOUT)
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

    async def _until(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until the condition is true, at most for some seconds; return whether it is."""
        try:
            async with asyncio.timeout(None if seconds is None else max(0.0, seconds)):
                while not condition():
                    self._updated.clear()
                    await self._updated.wait()
        except TimeoutError:
            return condition()
        return True
