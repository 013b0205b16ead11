"""Flag delivery protocol v2 for server-side SDKs: encoding of streams and polls (fdv2 13.2).

A transfer is a `server-intent`, an event for each item, and `payload-transferred`, which names the
state that the client then has. A stream has them as messages, a poll in one JSON object.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import orjson

from relay.model.item import Item, Kind
from relay.model.journal import Delta, Full, Journal
from relay.model.payload import Payload
from relay.protocol.sse import encode


class Names(Protocol):
    """What the events of a transfer say of its payload."""

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
