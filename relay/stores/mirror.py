"""Keeps a database equal to the payload: never in the way, and healing.

Changes are written as they come. Whenever the database may differ for another reason (at the start,
after upstream or the database was away, and on a timer, since it may have been wiped, restored or
overwritten) the versions of all its items are compared with the payload's, and what is missing or
older is written again.

What the database has *newer*, or has and we have not, may mean that this relay is behind, and that
another one has written it. So that relays never write against each other, it is left alone until
`conflicts` says that upstream has disowned it. Contents of equal version are not compared: other
programs write the same item in other words.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from relay.errors import StoreUnavailable
from relay.model.item import Item
from relay.model.payload import EMPTY, Change, Payload
from relay.stores import DataStore, Key, Stored, StoreState, StoreStatus, Versions
from relay.stores.conflicts import NEVER, Conflicts, ConflictTimes, Verdict
from relay.telemetry.log import Log

MAX_PENDING = 1000
"""Changed items that wait for a slow database one by one; of more, all versions are compared."""

NAMED = 5
"""Items that a log line names."""


@dataclass(frozen=True, slots=True)
class MirrorTimings:
    """Waiting times in seconds. Together they make a database whole within 30 s.

    Args:
        probe: between two comparisons while nothing happens.
        retry: after the first failure, doubling;
        longest_retry: up to this.
        finish: for what is not written yet when the relay ends.
        conflicts: until what is newer in the database, or only there, is replaced.
    """

    probe: float = 10.0
    retry: float = 0.5
    longest_retry: float = 5.0
    finish: float = 2.0
    conflicts: ConflictTimes = field(default_factory=ConflictTimes)


ONCE = MirrorTimings(conflicts=ConflictTimes(second_look=0.01, refresh=2.0, newer=NEVER, extra=2.0))
"""Times of a run that ends when the database is up to date. What is newer there stays: such a run
does not know what the one before it replaced. What only the database has goes after the two seconds
that LaunchDarkly's guide waits for its caches (webhooks 12.3)."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How a database differs from a payload.

    Args:
        behind: items that it lacks, or has older, or unreadable.
        ahead: keys of which it has a newer version.
        extra: keys of live items that the payload does not have.
    """

    behind: tuple[Item, ...]
    ahead: frozenset[Key]
    extra: frozenset[Key]

    @classmethod
    def between(cls, versions: Versions, payload: Payload) -> Difference:
        """Compare by versions."""
        behind: list[Item] = []
        ahead: set[Key] = set()
        for item in payload:
            key = item.kind, item.key
            stored = versions.get(key)
            if stored is None or stored.number < item.version:
                behind.append(item)
            elif stored.number > item.version:
                ahead.add(key)
        extra = {
            (kind, key)
            for (kind, key), stored in versions.items()
            if key not in payload.all(kind) and (stored.live or stored.number < 0)
        }
        return cls(tuple(behind), frozenset(ahead), frozenset(extra))


class DatabaseMirror:
    """The copy of an environment's payload in a database.

    Args:
        store: the database.
        name: of the kind of database, as `/status` shows it.
        refresh: asks upstream for everything once more.
        log: a logger that names the environment.
        times: waiting times.
    """

    def __init__(
        self,
        store: DataStore,
        name: str,
        refresh: Callable[[], None],
        log: Log,
        times: MirrorTimings = MirrorTimings(),
    ) -> None:
        self._store = store
        self._label = f"{name.capitalize()} data store {store.server}"
        self._refresh = refresh
        self._log = log
        self._times = times
        self.status = StoreStatus(
            StoreState.INITIALIZING, time.time(), name, store.server, store.prefix
        )
        self._payload: Payload | None = None
        """What upstream last vouched for."""
        self._unusable: frozenset[Key] = frozenset()
        """Items that upstream has in a version that we do not know."""
        self._healthy = False
        """Whether it still does."""
        self._pending: dict[Key, Item] = {}
        """What changed since the last write, as long as nothing else may be different."""
        self._needs_compare = True
        """Whether anything else may be different."""
        self._news = asyncio.Event()
        self._equal = asyncio.Event()
        self._last_known: Payload = EMPTY
        """What we know the database to have held, last."""
        self._answered = -NEVER
        """The clock when upstream last sent everything."""
        self._conflicts = Conflicts(times.conflicts)
        self._settled = True
        """Nothing more will be done about conflicts."""
        self._look_at = NEVER
        """The clock when they are to be looked at again."""

    async def load(self) -> Stored | None:
        """Return what the database holds; waits for the database, but not if upstream came."""
        delay = self._times.retry
        while self._payload is None:
            try:
                stored = await self._store.load()
            except StoreUnavailable as e:
                self._begin_outage(e)
                await asyncio.sleep(delay)
                delay = min(delay * 2, self._times.longest_retry)
                continue
            self._end_outage()
            if stored:
                self._note_invalid(stored)
            return stored
        return None

    def update(
        self,
        payload: Payload,
        change: Change | None,
        *,
        full: bool = False,
        unusable: Collection[Key] = (),
    ) -> None:
        """Note what is to be written; returns at once."""
        if full:
            self._answered = _clock()
            self._needs_compare |= bool(self._conflicts)  # that is what they wait for
        if not self._healthy or (change is not None and change.replace):
            self._needs_compare = True
        self._payload, self._healthy = payload, True
        self._unusable = frozenset(unusable)
        items = change.items if change is not None and not self._needs_compare else ()
        self._pending.update(((item.kind, item.key), item) for item in items)
        if len(self._pending) > MAX_PENDING:
            self._needs_compare = True
        if self._needs_compare:
            self._pending.clear()
        if self._needs_compare or self._pending:
            self._equal.clear()
            self._news.set()

    def suspend(self) -> None:
        """Write nothing before the next `update`: without upstream nobody vouches for the data."""
        self._healthy = False

    async def flushed(self) -> None:
        """Return once the database holds the payload; waits as long as that takes."""
        await self._equal.wait()

    async def run(self) -> None:
        """Keep the database equal until cancelled; then write what is left, for a bounded time."""
        try:
            delay = self._times.retry
            while True:
                try:
                    await self._work()
                except StoreUnavailable as e:
                    self._begin_outage(e)
                    self._needs_compare = True  # what was under way may have arrived or not
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, self._times.longest_retry)
                else:
                    delay = self._times.retry
                    await self._rest()
        finally:
            await self._finish()

    async def _rest(self) -> None:
        """Wait until there is something to write, or it is time to compare again."""
        wait = max(0.0, min(self._times.probe, self._look_at - _clock()))
        try:
            async with asyncio.timeout(wait):
                await self._news.wait()
        except TimeoutError:
            self._needs_compare, self._look_at = True, NEVER

    async def _finish(self) -> None:
        if self._healthy and not self._equal.is_set():
            self._needs_compare = True  # what was under way may have arrived or not
            with contextlib.suppress(TimeoutError, StoreUnavailable):
                async with asyncio.timeout(self._times.finish):
                    await self._work()
        await self._store.aclose()

    async def _work(self) -> None:
        """Write what is due. Raises `StoreUnavailable`."""
        self._news.clear()
        payload = self._payload
        if payload is None or not self._healthy:
            await self._check_recovery()
            return
        if self._needs_compare:
            await self._compare(payload)
        elif self._pending:
            items, self._pending = list(self._pending.values()), {}
            if await self._store.upsert(items):
                self._note_equal(payload)
            else:
                await self._compare(payload)  # somebody has emptied it

    async def _check_recovery(self) -> None:
        """Without upstream nothing is written, but `/status` tells when the database is back."""
        if self.status.state is StoreState.INTERRUPTED:
            await self._store.versions()
            self._end_outage()

    async def _compare(self, payload: Payload) -> None:
        """Look at everything, and write or ask accordingly."""
        # What comes while we look may know more than `payload`.
        answered, unusable = self._answered, self._unusable
        self._needs_compare = False
        self._pending.clear()
        versions = await self._store.versions()
        if versions is None:
            if self._last_known:
                self._log.warning("%s has lost its data; they are written again", self._label)
            self._judge({}, frozenset(), answered)
            await self._store.init(payload)
        else:
            difference = Difference.between(versions, payload)
            unlike = difference.ahead | difference.extra
            strange = {
                key: versions[key] for key in unlike - unusable if not self._is_ours(key, versions)
            }
            verdict = self._judge(strange, difference.extra, answered)
            if verdict.ask:
                text = "%s holds other data than this relay (%s); asking upstream for everything"
                self._log.info(text, self._label, _named(verdict.ask))
                self._refresh()
            left = (unlike & unusable) | (strange.keys() - verdict.replace)
            await self._mend(payload, difference.behind, unlike - left, left)
            if verdict.replace:
                self._note_replaced(verdict.replace, versions, payload)
        self._note_equal(payload)

    def _is_ours(self, key: Key, versions: Versions) -> bool:
        """Whether the database has what we wrote: then upstream itself has gone back since."""
        kind, name = key
        held = self._last_known.all(kind).get(name)
        stored = versions.get(key)
        return held is not None and stored is not None and held.version == stored.number

    def _judge(self, strange: Versions, extra: Collection[Key], answered: float) -> Verdict:
        """Decide about what others may have written."""
        verdict = self._conflicts.judge(_clock(), strange, extra, answered)
        self._settled, self._look_at = verdict.settled, verdict.look_at
        if verdict.returned:
            text = (
                "%s holds again what was replaced (%s): something else writes to it, maybe a relay"
                " that gets newer data than this one; it is left alone for %.0f s at least"
            )
            self._log.warning(text, self._label, _named(verdict.returned), verdict.wait)
        return verdict

    async def _mend(
        self,
        payload: Payload,
        behind: Sequence[Item],
        surplus: Collection[Key],
        left: Collection[Key],
    ) -> None:
        """Write what upstream has.

        Args:
            payload: all of it.
            behind: what the database lacks, or has older.
            surplus: what it has newer, or alone, and shall not have.
            left: what it may keep.
        """
        if surplus:
            # Upstream has gone back, or items have vanished: only the whole leads there.
            await self._store.init(await self._beside(left, payload))
        elif behind:
            await self._store.upsert(behind)
        if surplus or behind:
            written = {*surplus, *((item.kind, item.key) for item in behind)}
            self._log.info("%s brought up to date in %d items", self._label, len(written))

    def _note_replaced(self, keys: Collection[Key], versions: Versions, payload: Payload) -> None:
        self._conflicts.replaced(keys)
        text = (
            "%s held what upstream does not have, though it was asked for everything twice (%s);"
            " upstream's data have replaced it"
        )
        self._log.warning(text, self._label, _told(keys, versions, payload))

    async def _beside(self, others: Collection[Key], payload: Payload) -> Payload:
        """Return the payload with what may be somebody else's as the database has it."""
        stored = await self._store.load() if others else None
        if stored is None:
            return payload
        kept = (stored.payload.all(kind).get(key) for kind, key in others)
        return Payload.of([*payload, *(item for item in kept if item)])

    def _note_equal(self, payload: Payload) -> None:
        self._end_outage()
        self._last_known = payload
        if self.status.invalid:
            self.status = replace(self.status, invalid=())
        if not self._settled:
            self._equal.clear()
        elif payload is self._payload and not self._needs_compare and not self._pending:
            self._equal.set()

    def _begin_outage(self, error: StoreUnavailable) -> None:
        if self.status.state is not StoreState.INTERRUPTED:
            self._enter(StoreState.INTERRUPTED)
            text = "%s is unavailable: %s; flags are served from memory meanwhile"
            self._log.error(text, self._label, error)

    def _end_outage(self) -> None:
        if self.status.state is StoreState.INTERRUPTED:
            self._log.warning("%s is available again", self._label)
        if self.status.state is not StoreState.VALID:
            self._enter(StoreState.VALID)

    def _enter(self, state: StoreState) -> None:
        self.status = replace(self.status, state=state, since=time.time())

    def _note_invalid(self, stored: Stored) -> None:
        self.status = replace(self.status, invalid=stored.invalid)
        for bad in stored.invalid:
            self._log.error("%s holds an unreadable %s; it is skipped", self._label, bad)


def _clock() -> float:
    """Return the time by which the event loop waits."""
    return asyncio.get_running_loop().time()


def _named(keys: Collection[Key]) -> str:
    """Return the names of some items for a log line."""
    return _listed([f'{kind.noun} "{key}"' for kind, key in _some(keys)], len(keys))


def _told(keys: Collection[Key], versions: Versions, payload: Payload) -> str:
    """Return some items of a database for a log line, with their versions there and upstream."""
    texts = []
    for kind, key in _some(keys):
        item, stored = payload.all(kind).get(key), versions[kind, key].number
        there = f"in version {stored}" if stored >= 0 else "unreadable"
        texts.append(
            f'{kind.noun} "{key}" {there}, upstream has {item.version if item else "none"}'
        )
    return _listed(texts, len(keys), "; ")


def _some(keys: Collection[Key]) -> list[Key]:
    return sorted(keys, key=lambda each: (each[0].noun, each[1]))[:NAMED]


def _listed(texts: Collection[str], count: int, separator: str = ", ") -> str:
    more = count - len(texts)
    return separator.join(texts) + (f" and {more} more" if more else "")
