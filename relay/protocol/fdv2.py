"""Flag delivery protocol v2 of server-side SDKs: streams and polls (fdv2 13.2).

A transfer is a `server-intent`, an event for each item, and `payload-transferred`, which names the
state that the client then has. A stream has them as messages, a poll in one JSON object.

`respond` and what it calls encode transfers for SDKs. `Reader` makes change sets of upstream's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import msgspec
import orjson
from msgspec import Raw, Struct

from relay.errors import InvalidData
from relay.model.flag import Number
from relay.model.item import InvalidItem, Item, Kind
from relay.model.item import parse as parse_item
from relay.model.journal import Delta, Full, Journal
from relay.model.payload import ChangeSet, Payload, Selector
from relay.protocol.fdv1 import decode
from relay.protocol.sse import MAX_MESSAGE, encode
from relay.steps import Steps


class Names(Protocol):
    """Names of a payload, as the events of a transfer have them."""

    @property
    def id(self) -> str:
        """ID of the payload."""

    @property
    def version(self) -> int:
        """Number of the state."""


Event = tuple[bytes, tuple[bytes, ...]]
"""Name, and data in parts."""

STALE = b"xfer-changes", b"stale"
"""Code and reason of an intent to transfer changes."""

_KINDS = {Kind.FLAG: b"flag", Kind.SEGMENT: b"segment"}


def respond(journal: Journal, payload: Payload, answer: Full | Delta) -> Iterator[Event]:
    """Return the events of an answer: of everything, of a delta, or of nothing."""
    if isinstance(answer, Full):
        return full(journal, payload, answer)
    return changes(journal, answer.items) if answer.items else nothing(journal)


def full(journal: Journal, payload: Payload, reason: Full) -> Iterator[Event]:
    """Yield the events of a transfer of everything, which replaces all that a client has."""
    yield intent(journal, b"xfer-full", reason.reason.encode())
    for kind in Kind:
        yield from map(_item, payload.live(kind))
    yield transferred(journal, journal.state)


def changes(journal: Journal, items: Iterable[Item]) -> Iterator[Event]:
    """Yield the events of a transfer of items that replace those of the same keys."""
    yield intent(journal, *STALE)
    yield from map(_item, items)
    yield transferred(journal, journal.state)


def nothing(names: Names) -> Iterator[Event]:
    """Yield the event for a client that is up to date."""
    yield intent(names, b"none", b"up-to-date")


def stream(events: Iterable[Event]) -> bytes:
    """Return events as messages of a stream."""
    return b"".join(encode(name, *data) for name, data in events)


def poll(events: Iterable[Event]) -> bytes:
    """Return events as the body of a poll."""
    return b"".join(_poll(events))


def _poll(events: Iterable[Event]) -> Iterator[bytes]:
    separator = b'{"events":['
    for name, data in events:
        yield separator
        yield b'{"event":"%b","data":' % name
        yield from data
        yield b"}"
        separator = b","
    yield b"]}"


def intent(names: Names, code: bytes, reason: bytes) -> Event:
    """Return the event that begins a transfer."""
    members = names.id.encode(), names.version, code, reason
    text = b'{"payloads":[{"id":"%b","target":%d,"intentCode":"%b","reason":"%b"}]}'
    return b"server-intent", (text % members,)


def _item(item: Item) -> Event:
    kind, key = _KINDS[item.kind], orjson.dumps(item.key)
    if item.json is None:
        return deleted(kind, key, max(0, item.version))
    start = b'{"version":%d,"kind":"%b","key":%b,"object":' % (item.version, kind, key)
    return b"put-object", (start, item.json, b"}")


def deleted(kind: bytes, key: bytes, version: int) -> Event:
    """Return the event that removes an object.

    Args:
        kind: of the object.
        key: as JSON.
        version: greater than that of the object.
    """
    text = b'{"version":%d,"kind":"%b","key":%b}'
    return b"delete-object", (text % (version, kind, key),)


def transferred(names: Names, state: str) -> Event:
    """Return the event that ends a transfer, after which the client has the data of a state."""
    members = state.encode(), names.id.encode(), names.version
    return b"payload-transferred", (b'{"state":"%b","id":"%b","version":%d}' % members,)


FULL, CHANGES, NONE = "xfer-full", "xfer-changes", "none"

MAX_TRANSFER = MAX_MESSAGE
"""Maximum size of one transfer in bytes: upstream may send everything in one poll as well."""


MAX_FALLBACK = 3600.0
"""Seconds after which FDv2 is tried again at the latest, whatever upstream says (fdv2 13.4.1)."""


class Fallback(Struct, frozen=True):
    """Upstream wants to be followed by FDv1 for a while.

    Args:
        seconds: for how long, as upstream says; None if it says nothing.
    """

    seconds: float | None = None

    def period(self, chance: float) -> float:
        """Return the seconds after which to try FDv2 again.

        If upstream names no usable time, they differ, so that relays do not return all at once.

        Args:
            chance: random number in [0, 1).
        """
        if self.seconds is not None and 1 <= self.seconds <= MAX_FALLBACK:
            return self.seconds
        return MAX_FALLBACK * (1 - chance / 2)


class Current(Struct, frozen=True):
    """Upstream has nothing new.

    Args:
        since: state of the data that it has nothing new for.
    """

    since: str


class Goodbye(Struct, frozen=True):
    """Upstream is going to close the connection.

    Args:
        reason: words of upstream; may be empty.
        fallback: what it says about FDv1; None if it says nothing.
    """

    reason: str
    fallback: Fallback | None = None


class _Intent(Struct):
    payloads: list[Raw]


class _PayloadIntent(Struct, rename="camel"):
    intent_code: str
    id: str = ""


class _Put(Struct):
    kind: str
    key: str
    object: Raw


class _Delete(Struct):
    kind: str
    key: str


class _Transferred(Struct):
    state: str
    version: Number
    id: str = ""


class _Goodbye(Struct, rename={"fallback": "protocolFallbackTTL"}):
    reason: str = ""
    fallback: float | None = None


class _Event(Struct):
    event: str
    data: Raw = Raw(b"null")


class _Poll(Struct):
    events: list[_Event]


_INTENT = msgspec.json.Decoder(_Intent)
_PAYLOAD_INTENT = msgspec.json.Decoder(_PayloadIntent)
_PUT = msgspec.json.Decoder(_Put)
_DELETE = msgspec.json.Decoder(_Delete)
_TRANSFERRED = msgspec.json.Decoder(_Transferred)
_GOODBYE = msgspec.json.Decoder(_Goodbye)
_POLL = msgspec.json.Decoder(_Poll)

_SECONDS = re.compile("[0-9]{1,9}")
_KINDS_BY_NAME = {name.decode(): kind for kind, name in _KINDS.items()}

Told = ChangeSet | Current | Goodbye
"""Content of an event of upstream."""


class Reader:
    """Makes change sets of the events of one connection, or of one poll (fdv2 13.2.3).

    Nothing of a transfer is to be seen before it is complete.

    Args:
        basis: state that the request has named; empty for none.
    """

    def __init__(self, basis: str = "") -> None:
        self.state = basis
        """State after the last complete transfer."""
        self._has_data = bool(basis)
        """True if the client has the data of `state`."""
        self._intent = ""
        """Intent of the present transfer; empty before the first one."""
        self._id = ""
        self._begin()

    def __repr__(self) -> str:
        return f"<Reader {self.state!r} {self._intent} [{len(self._items)} items]>"

    def _begin(self) -> None:
        self._items: dict[tuple[Kind, str], Item | InvalidItem] = {}
        self._size = 0
        self._knows_all = True

    def read(self, name: str, data: bytes) -> Told | None:
        """Return what an event tells; None if that has to wait for others, or is nothing.

        Args:
            name: of the event. Unknown ones are ignored.
            data: JSON.

        Raises:
            InvalidData: the event is broken, or comes where it must not. The connection is of no
                use any more, and what was incomplete is void.
        """
        match name:
            case "server-intent":
                return self._take_intent(data)
            case "put-object":
                self._take_put(data)
            case "delete-object":
                self._take_delete(data)
            case "payload-transferred":
                return self._finish(decode(_TRANSFERRED, name, data))
            case "error":
                self._begin()
            case "goodbye":
                self._begin()
                return _goodbye(data)
        return None

    def _take_intent(self, data: bytes) -> Current | None:
        subject = "server-intent"
        payloads = decode(_INTENT, subject, data).payloads
        if not payloads:
            raise InvalidData(subject, "it has no payload")
        intent = decode(_PAYLOAD_INTENT, subject, bytes(payloads[0]))  # only the first one counts
        code = intent.intent_code
        if code not in (FULL, CHANGES, NONE):
            raise InvalidData(subject, f"unknown intent {code[:50]!r}")
        if code != FULL and not self._has_data:
            raise InvalidData(subject, f"{code} for a client without data")
        self._begin()
        self._intent, self._id = code, intent.id
        return Current(self.state) if code == NONE else None

    def _take_put(self, data: bytes) -> None:
        put = decode(_PUT, "put-object", data)
        if (kind := self._note("put-object", put, len(data))) is None:
            return
        try:
            item: Item | InvalidItem = parse_item(kind, put.key, bytes(put.object))
        except InvalidData as e:
            item = InvalidItem(kind, put.key, e.reason)
        self._items[kind, put.key] = item

    def _take_delete(self, data: bytes) -> None:
        delete = decode(_DELETE, "delete-object", data)
        if (kind := self._note("delete-object", delete, len(data))) is not None:
            # The version is that of upstream's payload, which says nothing about the item.
            self._items[kind, delete.key] = Item(kind, delete.key, 0, None)

    def _note(self, subject: str, target: _Put | _Delete, size: int) -> Kind | None:
        """Return the kind of an item that is about to be collected; None for unknown kinds."""
        if not self._intent:
            raise InvalidData(subject, "there was no server-intent")
        self._size += size
        if self._size > MAX_TRANSFER:
            raise InvalidData("transfer", f"it is longer than {MAX_TRANSFER} bytes")
        kind = _KINDS_BY_NAME.get(target.kind)
        self._knows_all &= kind is not None
        return kind

    def _finish(self, end: _Transferred) -> ChangeSet:
        if not self._intent:
            raise InvalidData("payload-transferred", "there was no server-intent")
        items = tuple(item for item in self._items.values() if isinstance(item, Item))
        invalid = tuple(item for item in self._items.values() if isinstance(item, InvalidItem))
        verbatim = self._knows_all and not invalid
        selector = Selector(end.state, end.id or self._id, int(end.version), verbatim)
        full = self._intent == FULL
        changes = ChangeSet(items, full, invalid, selector, "" if full else self.state)
        self.state, self._has_data, self._intent = end.state, True, CHANGES
        self._begin()
        return changes


def read_poll(body: bytes, basis: str) -> Steps[Told]:
    """Return what a poll tells, with a step for each item.

    Args:
        body: of the response.
        basis: state that the request has named; empty for none.

    Raises:
        InvalidData: it is broken, or has no complete transfer.
    """
    reader, subject = Reader(basis), "body of /sdk/poll"
    for event in decode(_POLL, subject, body).events:
        told = reader.read(event.event, bytes(event.data))
        if told is not None:
            return told
        yield
    raise InvalidData(subject, "it has no complete transfer")


def _goodbye(data: bytes) -> Goodbye:
    """Return a goodbye, of which not even the reason is needed."""
    try:
        goodbye = decode(_GOODBYE, "goodbye", data)
    except InvalidData:
        return Goodbye("")
    seconds = goodbye.fallback
    return Goodbye(goodbye.reason, None if seconds is None else Fallback(seconds))


def fallback(headers: Mapping[str, str]) -> Fallback | None:
    """Return what a response says about FDv1; None if it says nothing.

    Args:
        headers: by name in lower case.
    """
    if headers.get("x-ld-fd-fallback", "").strip().lower() != "true":
        return None
    seconds = headers.get("x-ld-fd-fallback-ttl", "").strip()
    return Fallback(float(seconds) if _SECONDS.fullmatch(seconds) else None)
