"""Brings LaunchDarkly's patches of big segments into the database, each once and in order.

Of several relays on a database the one with the lease does so. Should two believe that they have
it, or should one be an ld-relay, which knows no lease, the cursor in the database decides who
applies a patch; the others see that it has been applied, and go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Protocol

from relay import clock, randomness
from relay.aio import wait_for
from relay.bigsegments.lease import Lease
from relay.errors import (
    InvalidData,
    RelayError,
    StoreUnavailable,
    UpstreamRefused,
    UpstreamUnavailable,
)
from relay.protocol.bigsegments import Patch
from relay.sources.timings import SourceBackoff, SourceTimings
from relay.stores.bigsegments import BigSegmentStore
from relay.telemetry.log import Log
from relay.telemetry.outage import OutageLog

CONFIRM_EVERY = 30.0
"""Seconds of silence on the stream after which the time of the synchronisation is written again."""

MAX_OVERTAKEN = 100
"""Times that another relay may be faster with one patch before the procedure starts over."""


class PatchSource(Protocol):
    """Contract of a source of patches; see `relay.sources.bigsegments`."""

    def poll(self, after: str | None) -> AsyncGenerator[Patch, None]:
        """Yield the patches after a version."""

    def stream(self) -> AbstractAsyncContextManager[AsyncGenerator[tuple[Patch, ...], None]]:
        """Open the stream of patches to come; yields those of one event at a time."""


class _Misfit(RelayError):
    """A patch does not follow what is stored."""


class Synchroniser:
    """Keeps the big segments of one environment in a database up to date.

    Args:
        source: yields the patches.
        store: the database.
        changed: called with the hashes of the context keys whose memberships have changed; with
            None if those are unknown.
        synchronised: called when all patches are known to be stored.
        lease: lease of this environment.
        log: a logger that names the environment.
        timings: delays after failures.
    """

    def __init__(
        self,
        source: PatchSource,
        store: BigSegmentStore,
        changed: Callable[[frozenset[str] | None], None],
        synchronised: Callable[[], None],
        *,
        lease: Lease,
        log: Log,
        timings: SourceTimings = SourceTimings(),
    ) -> None:
        self.applied = 0
        """Number of patches that this relay has applied."""
        self.connected = False
        """True while the stream is open and all patches are stored."""
        self._source = source
        self._store = store
        self._changed = changed
        self._synchronised = synchronised
        self._lease = lease
        self._log = log
        self._timings = timings
        self._outage = OutageLog(log)
        self._retry_now = asyncio.Event()
        self._cursor: str | None = None
        """Version of what is stored, as last read or written."""
        self._confirmed_at = 0.0
        """Monotonic time at which the time of the synchronisation was last written."""

    def __repr__(self) -> str:
        state = "connected" if self.connected else "not connected"
        return f"<Synchroniser {state}, {self.applied} patches applied>"

    def check(self) -> None:
        """Try again soon if disconnected: there may be another SDK key."""
        self._retry_now.set()

    async def run(self) -> None:
        """Apply patches whenever this relay has the lease, until cancelled.

        It gives the lease up after each failure: another relay may reach LaunchDarkly.
        """
        backoff = SourceBackoff(self._timings)
        while True:
            self._retry_now.clear()
            try:
                if await self._lease.acquire():
                    self._changed(None)  # the other one's last patches
                await self._lease.use(self._follow(backoff))
            except (UpstreamUnavailable, InvalidData, StoreUnavailable, _Misfit) as e:
                refused = isinstance(e, UpstreamRefused)
                delay = backoff.failed(clock.monotonic(), randomness.fraction(), refused=refused)
                text = "BigSegmentSynchronizer: Synchronization failed: %s; next attempt in %.0f s"
                self._outage.begin(str(e), text, e, delay, again=str(e) != self._outage.reason)
                await wait_for(self._retry_now, delay)
            finally:
                self.connected = False

    async def confirm(self) -> None:
        """Write the time of the synchronisation again, if it is due and everything is stored.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        if self.connected and clock.monotonic() - self._confirmed_at >= CONFIRM_EVERY:
            await self._mark()

    async def _follow(self, backoff: SourceBackoff) -> None:
        """Poll until nothing is left, then follow the stream; always ends by raising."""
        while True:
            await self._catch_up()
            async with self._source.stream() as events, aclosing(events):
                if await self._poll():
                    continue  # patches came before the stream was open: it may lack others
                backoff.succeeded(clock.monotonic())
                await self._mark()
                self._outage.end("BigSegmentSynchronizer: Re-established connection")
                self.connected = True
                async for patches in events:
                    self.connected = False
                    await self._apply_event(patches)
                    await self._mark()
                    self.connected = True

    async def _catch_up(self) -> None:
        self._cursor = (await self._store.metadata()).cursor
        while await self._poll():
            pass

    async def _poll(self) -> int:
        """Apply the patches of one poll; return their number."""
        batch = _Batch(self)
        async with aclosing(self._source.poll(self._cursor)) as patches:
            async for patch in patches:
                await batch.apply(patch)
        return batch.finish()

    async def _apply_event(self, patches: tuple[Patch, ...]) -> None:
        batch = _Batch(self)
        for patch in patches:
            await batch.apply(patch)
        batch.finish()

    async def _mark(self) -> None:
        await self._store.mark_synchronized(clock.unix())
        self._confirmed_at = clock.monotonic()
        self._synchronised()

    async def apply_next(self, patch: Patch) -> bool:
        """Apply a patch if it follows what is stored; return False if it does not.

        Raises:
            StoreUnavailable: nothing was changed, or all was.
        """
        if not patch.follows(self._cursor):
            return False
        hashes = await self._store.apply(patch, self._cursor)
        if hashes is None:
            return False
        self._cursor = patch.version
        self.applied += 1
        if hashes:
            self._changed(hashes)
        return True

    async def is_overtaken(self) -> bool:
        """Read the stored cursor; return whether somebody else has moved it.

        Raises:
            _Misfit: there is none any more, so that everything has to be stored again.
        """
        before, self._cursor = self._cursor, (await self._store.metadata()).cursor
        if self._cursor == before:
            return False
        self._changed(None)
        if self._cursor is None:
            raise _Misfit("the database has lost its big segments")
        return True

    @property
    def has_lease(self) -> bool:
        """True while this relay is the one that synchronises."""
        return self._lease.is_held

    @property
    def cursor(self) -> str | None:
        """Version of what is stored, as far as known."""
        return self._cursor

    def log_applied(self, count: int) -> None:
        """Log that patches were applied."""
        if count:
            text = "BigSegmentSynchronizer: Applied %d update%s"
            self._log.info(text, count, "" if count == 1 else "s")


class _Batch:
    """The patches of one answer or event.

    If another relay is faster, patches that it has applied are passed over. It may be anywhere in
    the batch; at its end it is clear whether all of them are stored.
    """

    def __init__(self, synchroniser: Synchroniser) -> None:
        self._synchroniser = synchroniser
        self._count = 0
        self._applied_before = synchroniser.applied
        self._overtaken = False
        self._last_version: str | None = None

    async def apply(self, patch: Patch) -> None:
        """Apply a patch, unless another relay has.

        Raises:
            _Misfit: it does not follow what is stored.
        """
        synchroniser = self._synchroniser
        self._count += 1
        self._last_version = patch.version
        for _ in range(MAX_OVERTAKEN):
            if await synchroniser.apply_next(patch):
                return
            if await synchroniser.is_overtaken():
                self._overtaken = True
            elif self._overtaken:
                return
            elif not patch.follows(synchroniser.cursor):
                break
            if patch.version == synchroniser.cursor:
                return
        self._log()
        raise _misfit(patch.previous_version)

    def finish(self) -> int:
        """Return the number of patches, all of which are stored now.

        Raises:
            _Misfit: another relay has stored something else.
        """
        self._log()
        if self._overtaken and self._last_version != self._synchroniser.cursor:
            raise _misfit(self._last_version or "")
        return self._count

    def _log(self) -> None:
        self._synchroniser.log_applied(self._synchroniser.applied - self._applied_before)


def _misfit(version: str) -> _Misfit:
    text = f'Received a patch to previous version "{version}" which was not the latest known'
    return _Misfit(f"{text} version")
