"""A published document as a data store: every write replaces the whole document.

So a document heals, and follows upstream, under the rules of all stores. The content that was last
read or written is known, and the tag of the place tells whether it still stands: a change costs one
write, and a probe one cheap question.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

from relay.aio import in_thread
from relay.backoff import Backoff
from relay.errors import InvalidData, StoreUnavailable
from relay.model.item import InvalidItem, Item, Kind
from relay.model.payload import EMPTY, ChangeSet, Payload
from relay.protocol import document
from relay.steps import finish
from relay.stores import Stored, Versions
from relay.stores.documents import DocumentChanged, Place
from relay.stores.fingerprint import Fingerprint
from relay.stores.mirror import MirrorTimings
from relay.telemetry.log import Log

MAX_RACES = 5
"""Attempts of a write that other writers interrupt, before it fails."""

PUBLICATION = MirrorTimings(
    probe=60.0, compare=3600.0, retry=Backoff(first=1.0, longest=30.0), finish=4.0, pause=1.0
)
"""Delays of a published document. A write costs money in most places, so changes gather for a
second. A probe finds every change of the document, so that hardly anything is left to compare."""


class Renderings:
    """The bytes of a payload as a document, made once for all places. Its methods block.

    Args:
        shared: True if there are several places; the last bytes are then kept for the others.
        in_gzip: True if a place wants gzip.
    """

    def __init__(self, *, shared: bool, in_gzip: bool) -> None:
        self._shared = shared
        self._in_gzip = in_gzip
        self._lock = Lock()
        self._payload = EMPTY
        self._bytes: dict[bool, bytes] = {}

    def __repr__(self) -> str:
        return f"<Renderings of {self._payload}>"

    def of(self, payload: Payload) -> dict[bool, bytes]:
        """Return the document of a payload: in gzip for True, plain for False."""
        if not self._shared:
            return self._render(payload)
        with self._lock:
            if not self._bytes or not _is_equal(payload, self._payload):
                self._payload, self._bytes = payload, self._render(payload)
            return self._bytes

    def _render(self, payload: Payload) -> dict[bool, bytes]:
        plain = document.text(payload)
        return {False: plain, **({True: document.compressed(plain)} if self._in_gzip else {})}


def _is_equal(one: Payload, other: Payload) -> bool:
    """Return whether two payloads have the same items; those that they share cost nothing."""
    return all(one.all(kind) == other.all(kind) for kind in Kind)


class _Content(NamedTuple):
    """Content of a document in all its forms; `torn` is True if they differ."""

    payload: Payload
    invalid: tuple[InvalidItem, ...]
    torn: bool

    @classmethod
    def of(cls, forms: Sequence[bytes]) -> _Content:
        """Return the items of the last form, and newer ones of the other forms. Blocks.

        Raises:
            InvalidData: the last form is damaged.
        """
        *others, last = forms
        data = finish(document.read(last))
        payload, plain, torn = Payload.of(data.items), document.decompressed(last), False
        for form in others:
            try:
                if document.decompressed(form) == plain:
                    continue
                other = finish(document.read(form)).items
            except InvalidData:
                other = ()
            torn = True
            payload, _ = payload.apply(ChangeSet(other))
        return cls(payload, data.invalid, torn)


class DocumentStore:
    """Data store for one environment, in a document that has several forms in one place.

    The plain form is written last. It is the one that counts; the others are as new or newer.

    Args:
        places: of all forms of the document; the one that counts last.
        renderings: makes the bytes.
        server: URL of all documents, without secrets.
        prefix: name of the document.
        log: a logger that names the environment.
    """

    def __init__(
        self, places: Sequence[Place], renderings: Renderings, server: str, prefix: str, log: Log
    ) -> None:
        self.server = server
        self.prefix = prefix
        self._places = tuple(places)
        self._renderings = renderings
        self._log = log
        self._payload: Payload | None = None
        """Content of the document as last read or written, unless that failed."""
        self._exists = False
        """True if there was a document then."""
        self._torn = False
        """True if the forms differed then."""
        self._invalid: tuple[InvalidItem, ...] = ()
        self._tags: dict[Place, str | None] = {}
        self._marked: Fingerprint | None = None
        self._damage = ""
        """Damage that was logged."""
        self._lock = asyncio.Lock()
        """Serialises operations: the mirror loads the document while it already writes."""

    def __repr__(self) -> str:
        return f"<DocumentStore {self.server} {self.prefix!r}>"

    @property
    def label(self) -> str:
        """The document for log lines."""
        return f"Published document {self._places[-1].url}"

    def problem_with(self, item: Item) -> str | None:  # noqa: ARG002 - the contract's
        """Return None: a document holds items of any size that upstream sends."""
        return None

    async def load(self) -> Stored | None:
        """Return the content of the document; None if there is none, or it is damaged (logged).

        Raises:
            StoreUnavailable: the place does not answer.
        """
        async with self._lock:
            payload = await self._read()
            return Stored(payload, self._invalid) if self._exists else None

    async def versions(self) -> Versions | None:
        """Return the versions of all items in the document; None if there is none.

        Raises:
            StoreUnavailable: the place does not answer.
        """
        stored = await self.load()
        return None if stored is None else await in_thread(lambda: stored.versions, "documents")

    async def init(self, payload: Payload) -> None:
        """Replace the document.

        Raises:
            StoreUnavailable: the place does not answer, or another writer was faster.
        """
        async with self._lock:
            await self._replace(payload)

    async def upsert(self, items: Sequence[Item]) -> bool:
        """Replace the document if some of the items are newer than those in it.

        Returns:
            True if there was a document; otherwise nothing is written.

        Raises:
            StoreUnavailable: the place does not answer.
        """
        async with self._lock:
            for _ in range(MAX_RACES):
                before = await self._read() if self._payload is None else self._payload
                if not self._exists:
                    return False
                after, change = before.apply(ChangeSet(tuple(items)))
                if change is None:
                    return True
                try:
                    await self._write(after)
                except DocumentChanged:
                    continue
                return True
        raise StoreUnavailable("other writers leave no room")

    async def mark(self, fingerprint: Fingerprint) -> None:
        """Remember the fingerprint of the document, and make all its forms equal.

        Nothing is written beside the data: the tag of the place tells as much.

        Raises:
            StoreUnavailable: the place does not answer, or another writer was faster.
        """
        async with self._lock:
            if self._payload is not None and self._exists and self._torn:
                await self._replace(self._payload)
            self._marked = fingerprint

    async def holds(self, fingerprint: Fingerprint) -> bool:
        """Return whether the document is still the one that was marked.

        Raises:
            StoreUnavailable: the place does not answer.
        """
        async with self._lock:
            for place in self._places:
                if not await place.is_unchanged(self._tags.get(place)):
                    self._payload = None
                    return False
            return self._exists and self._payload is not None and self._marked == fingerprint

    async def aclose(self) -> None:
        """Close all connections."""
        for place in self._places:
            await place.aclose()

    async def _read(self) -> Payload:
        """Read all forms. What only one of them has, a write was interrupted before the others."""
        self._payload, self._marked = None, None
        found = {place: await place.read() for place in self._places}
        self._tags = {place: each[1] if each else None for place, each in found.items()}
        contents = [each[0] for each in found.values() if each]
        self._torn = len(contents) < len(found)
        self._exists, self._invalid, payload = False, (), EMPTY
        try:
            if contents:
                content = await in_thread(lambda: _Content.of(contents), "documents")
                payload, self._invalid = content.payload, content.invalid
                self._exists, self._torn = True, self._torn or content.torn
        except InvalidData as e:
            self._report_damage(str(e))
        else:
            self._damage = ""
        self._payload = payload
        return payload

    def _report_damage(self, damage: str) -> None:
        if damage != self._damage:
            self._damage = damage
            url = self._places[-1].url
            self._log.error("Document %s cannot be used: %s; it will be replaced", url, damage)

    async def _replace(self, payload: Payload) -> None:
        """Write all forms, and read the document before if it is not known."""
        if self._payload is None:
            await self._read()
        try:
            await self._write(payload)
        except DocumentChanged:
            raise StoreUnavailable("another writer was faster") from None

    async def _write(self, payload: Payload) -> None:
        """Write all forms.

        Raises:
            DocumentChanged: another writer has changed one; nothing is known of the document now.
            StoreUnavailable: the same, for another reason.
        """
        self._payload = None  # until the write has succeeded
        contents = await in_thread(lambda: self._renderings.of(payload), "documents")
        for place in self._places:
            self._tags[place] = await place.write(contents[place.in_gzip], self._tags.get(place))
        self._payload, self._exists, self._torn, self._invalid = payload, True, False, ()
