"""Keeps a database equal to the payload: never in the way, and healing.

Changes are written as they come. Whenever the database may differ for another reason (at the start,
after upstream or the database was away, and on a timer, since it may have been wiped, restored or
overwritten) the versions of all its items are compared with the payload's, and what is missing or
older is written again.

What the database has *newer*, or has and we have not, may mean that this relay is behind, and that
another one has written it. So that relays never write against each other, such a difference is
looked at twice, then upstream is asked for everything once more; only what upstream still does not
have is then removed, and what stays newer in the database stays there. What comes back soon after
it was removed is vouched for by another relay, and stays too. Contents of equal version are not
compared: other programs write the same item in other words.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from relay.errors import StoreUnavailable
from relay.log import Log
from relay.model.item import Item, Kind
from relay.model.payload import EMPTY, Change, Payload
from relay.stores import DataStore, Stored, StoreState, StoreStatus, Version, Versions

MAX_PENDING = 1000
"""Changed items that wait for a slow database one by one; of more, all versions are compared."""

NAMED = 5
"""Items that a log line names."""

Key = tuple[Kind, str]


@dataclass(frozen=True, slots=True)
class MirrorTimes:
    """Waiting times in seconds. Together they make a database whole within 30 s.

    Args:
        probe: between two comparisons while nothing happens.
        retry: after the first failure, doubling;
        longest_retry: up to this.
        second_look: between the two looks at what is newer in the database: a change that is on its
            way to us as well has arrived by then.
        refresh: between two requests for everything, at least.
        returned: after the removal of an item; back within this, it is another relay's, which
            needs its own `probe` to write it again. Back later, it is from an old backup.
        finish: for what is not written yet when the relay ends.
    """

    probe: float = 10.0
    retry: float = 0.5
    longest_retry: float = 5.0
    second_look: float = 1.0
    refresh: float = 60.0
    returned: float = 30.0
    finish: float = 2.0


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


class Mirror:
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
        times: MirrorTimes = MirrorTimes(),
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
        self._healthy = False
        """Whether it still does."""
        self._pending: dict[Key, Item] = {}
        """What changed since the last write, as long as nothing else may be different."""
        self._doubtful = True
        """Whether anything else may be different."""
        self._news = asyncio.Event()
        self._equal = asyncio.Event()
        self._held: Payload = EMPTY
        """What we know the database to have held, last."""
        self._full_at = -float("inf")
        """The clock when upstream last sent everything."""
        self._suspected: dict[Key, Version | None] = {}
        """What was newer in the database, or only there, at the last look, and is not judged."""
        self._suspected_at = 0.0
        self._refreshed_at = -float("inf")
        self._looks_again = False
        """Whether the second look is due."""
        self._theirs: dict[Key, Version | None] = {}
        """What upstream does not have, though it was asked: somebody else's, and left alone."""
        self._removed: dict[Key, float] = {}
        """What we have removed, by the clock, and may come back because others vouch for it."""

    async def load(self) -> Stored | None:
        """Return what the database holds; waits for the database, but not if upstream came."""
        delay = self._times.retry
        while self._payload is None:
            try:
                stored = await self._store.load()
            except StoreUnavailable as e:
                self._begin_trouble(e)
                await asyncio.sleep(delay)
                delay = min(delay * 2, self._times.longest_retry)
                continue
            self._end_trouble()
            if stored:
                self._note_invalid(stored)
            return stored
        return None

    def follow(self, payload: Payload, change: Change | None, *, full: bool = False) -> None:
        """Note what is to be written; returns at once."""
        if full:
            self._full_at = time.monotonic()
        if not self._healthy or (change is not None and change.replace):
            self._doubtful = True
        self._payload, self._healthy = payload, True
        items = change.items if change is not None and not self._doubtful else ()
        self._pending.update(((item.kind, item.key), item) for item in items)
        if len(self._pending) > MAX_PENDING:
            self._doubtful = True
        if self._doubtful:
            self._pending.clear()
        if self._doubtful or self._pending:
            self._equal.clear()
            self._news.set()

    def hold(self) -> None:
        """Write nothing before the next `follow`: without upstream nobody vouches for the data."""
        self._healthy = False

    async def written(self) -> None:
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
                    self._begin_trouble(e)
                    self._doubtful = True  # what was under way may have arrived or not
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, self._times.longest_retry)
                else:
                    delay = self._times.retry
                    await self._rest()
        finally:
            await self._finish()

    async def _rest(self) -> None:
        """Wait until there is something to write, or it is time to compare again."""
        if self._looks_again:
            await asyncio.sleep(self._times.second_look)
            return
        try:
            async with asyncio.timeout(self._times.probe):
                await self._news.wait()
        except TimeoutError:
            self._doubtful = True

    async def _finish(self) -> None:
        if self._healthy and not self._equal.is_set():
            self._doubtful = True  # what was under way may have arrived or not
            with contextlib.suppress(TimeoutError, StoreUnavailable):
                async with asyncio.timeout(self._times.finish):
                    await self._work()
        await self._store.aclose()

    async def _work(self) -> None:
        """Write what is due. Raises `StoreUnavailable`."""
        self._news.clear()
        payload = self._payload
        if payload is None or not self._healthy:
            await self._look_for_recovery()
            return
        if self._doubtful:
            await self._compare(payload)
        elif self._pending:
            items, self._pending = list(self._pending.values()), {}
            if await self._store.upsert(items):
                self._note_equal(payload)
            else:
                await self._compare(payload)  # somebody has emptied it

    async def _look_for_recovery(self) -> None:
        """Without upstream nothing is written, but `/status` tells when the database is back."""
        if self.status.state is StoreState.INTERRUPTED:
            await self._store.versions()
            self._end_trouble()

    async def _compare(self, payload: Payload) -> None:
        """Look at everything, and write or ask accordingly."""
        self._doubtful = self._looks_again = False
        self._pending.clear()
        versions = await self._store.versions()
        if versions is None:
            if self._held:
                self._log.warning("%s has lost its data; they are written again", self._label)
            await self._store.init(payload)
            self._note_equal(payload)
            return
        self._forget_removed(versions)
        difference = Difference.between(versions, payload)
        suspects = {
            key: versions.get(key)
            for key in difference.ahead | difference.extra
            if not self._is_ours(key, versions)
        }
        if self._may_judge(suspects):
            await self._mend(payload, difference, suspects)
            self._note_equal(payload)
        else:
            self._doubtful = True
            if difference.behind:
                await self._store.upsert(difference.behind)
            # Only now: a database that can be read may still refuse to be written.
            self._end_trouble()

    def _is_ours(self, key: Key, versions: Versions) -> bool:
        """Whether the database has what we wrote: then upstream itself has gone back since."""
        kind, name = key
        held = self._held.all(kind).get(name)
        stored = versions.get(key)
        return held is not None and stored is not None and held.version == stored.number

    def _may_judge(self, suspects: dict[Key, Version | None]) -> bool:
        """Whether upstream has been asked about all that others may have written."""
        unknown = dict(suspects.items() - self._theirs.items())
        if not unknown:
            self._suspected = {}
            return True
        now = time.monotonic()
        lasting = unknown.keys() & self._suspected.keys()
        if unknown != self._suspected:
            self._suspected, self._suspected_at = unknown, now
            self._looks_again = not lasting
        elif self._full_at >= self._suspected_at:
            return True
        # Also if it has become newer still: who is behind a busy writer never sees it twice alike.
        if lasting and now - self._refreshed_at >= self._times.refresh:
            self._refreshed_at = now
            text = "%s holds other data than this relay (%s); asking upstream for everything"
            self._log.info(text, self._label, _named(lasting))
            self._refresh()
        return False

    def _forget_removed(self, versions: Versions) -> None:
        now = time.monotonic()
        self._removed = {
            key: at
            for key, at in self._removed.items()
            if key in versions or now - at < self._times.returned
        }

    async def _mend(
        self, payload: Payload, difference: Difference, suspects: dict[Key, Version | None]
    ) -> None:
        """Write what upstream has; it has just been asked, or nothing was doubtful."""
        theirs = {
            key: version
            for key, version in suspects.items()
            if key in difference.ahead or key in self._removed
        }
        self._suspected = {}
        if theirs.keys() - self._theirs.keys():
            text = "%s holds items newer than upstream has (%s); they are left as they are"
            self._log.warning(text, self._label, _named(theirs))
        self._theirs = theirs
        written = {(item.kind, item.key) for item in difference.behind}
        surplus = (difference.ahead | difference.extra) - theirs.keys()
        if surplus:
            # Upstream has gone back, or items have vanished: only the whole leads there.
            now = time.monotonic()
            self._removed |= dict.fromkeys(surplus & difference.extra & suspects.keys(), now)
            written |= surplus
            await self._store.init(await self._beside(theirs, payload))
        elif written:
            await self._store.upsert(difference.behind)
        if written:
            self._log.info("%s brought up to date in %d items", self._label, len(written))

    async def _beside(self, theirs: Collection[Key], payload: Payload) -> Payload:
        """Return the payload with what is somebody else's as the database has it."""
        stored = await self._store.load() if theirs else None
        if stored is None:
            return payload
        kept = (stored.payload.all(kind).get(key) for kind, key in theirs)
        return Payload.of([*payload, *(item for item in kept if item)])

    def _note_equal(self, payload: Payload) -> None:
        self._end_trouble()
        self._held = payload
        if self.status.invalid:
            self.status = replace(self.status, invalid=())
        if payload is self._payload and not self._doubtful and not self._pending:
            self._equal.set()

    def _begin_trouble(self, error: StoreUnavailable) -> None:
        if self.status.state is not StoreState.INTERRUPTED:
            self._enter(StoreState.INTERRUPTED)
            text = "%s is unavailable: %s; flags are served from memory meanwhile"
            self._log.error(text, self._label, error)

    def _end_trouble(self) -> None:
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


def _named(keys: Collection[Key]) -> str:
    """Return the names of some items for a log line."""
    names = [f'{kind.noun} "{key}"' for kind, key in list(keys)[:NAMED]]
    more = len(keys) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
