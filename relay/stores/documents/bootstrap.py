"""A published document that a relay only reads, to start without upstream and databases."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from relay.aio import in_thread, wait_for
from relay.backoff import Backoff
from relay.errors import InvalidData, StoreUnavailable
from relay.model.payload import Change, Payload
from relay.protocol import document
from relay.steps import finish
from relay.stores import Key, Stored, StoreStatus
from relay.stores.documents import Place
from relay.telemetry.log import Log
from relay.telemetry.outage import OutageLog

RETRY = Backoff(first=0.5, longest=30.0)
"""Delays while the document cannot be read, until upstream delivers."""


class Bootstrap:
    """Mirror that is only loaded. Nothing is ever written to the document.

    Args:
        place: place of the document, plain or in gzip.
        log: a logger that names the environment.
        retry: delays between attempts.
    """

    status: StoreStatus | None = None
    has_journal = False

    def __init__(self, place: Place, log: Log, retry: Backoff = RETRY) -> None:
        self._place = place
        self._log = log
        self._retry = retry
        self._outage = OutageLog(log)
        self._delivered = asyncio.Event()
        """Set once upstream has delivered: the document is not needed any more."""

    def __repr__(self) -> str:
        return f"<Bootstrap {self._place.url}>"

    async def load(self) -> Stored | None:
        """Return the content of the document. Wait for it, but only until upstream delivers."""
        failures = 0
        while not self._delivered.is_set():
            try:
                return await self._read()
            except (StoreUnavailable, InvalidData) as e:
                text = "Document %s cannot be read: %s; trying again until LaunchDarkly delivers"
                self._outage.begin(str(e), text, self._place.url, e, again=self._is_new(str(e)))
            await wait_for(self._delivered, self._retry.delay(failures))
            failures += 1
        return None

    async def _read(self) -> Stored:
        found = await self._place.read()
        if found is None:
            raise StoreUnavailable("there is none")
        content, _ = found
        data = await in_thread(lambda: finish(document.read(content)), "documents")
        for bad in data.invalid:
            self._log.error("Document %s holds an unusable %s", self._place.url, bad)
        self._outage.end("Document %s has been read", self._place.url)
        return Stored(Payload.of(data.items), data.invalid)

    def _is_new(self, reason: str) -> bool:
        return self._outage.reason != reason

    def update(
        self,
        payload: Payload,
        change: Change | None,
        *,
        full: bool = False,
        unusable: Collection[Key] = (),
    ) -> None:
        """Give up waiting for the document: upstream has delivered."""
        del payload, change, full, unusable
        self._delivered.set()

    def suspend(self) -> None:
        """Do nothing: nothing is ever written."""

    async def flushed(self) -> None:
        """Return at once: nothing is ever written."""

    async def run(self) -> None:
        """Wait until cancelled, then close all connections."""
        try:
            await asyncio.Event().wait()
        finally:
            await self._place.aclose()
