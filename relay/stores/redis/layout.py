"""Layout of items in Redis that SDKs in daemon mode read (datastore 4.1, 4.3); pure.

Two hashes hold flags and segments as JSON by key; an empty string marks both as complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from relay.errors import InvalidData
from relay.model.environment import DEFAULT_PREFIX
from relay.model.item import InvalidItem, Item, Kind, parse
from relay.model.payload import Payload
from relay.model.text import one_line
from relay.steps import Steps
from relay.stores import UNREADABLE, Key, Stored, Version, Versions

CHUNK = 256 * 1024
"""Bytes of items per command: half a millisecond of packing before the loop can run other tasks."""

Hashes = dict[Kind, dict[bytes, bytes]]
"""Stored items by kind and encoded key."""

_NAMES = {Kind.FLAG: "features", Kind.SEGMENT: "segments"}

_FLAG_TOMBSTONE = (
    b'{"key":"$deleted","on":false,"prerequisites":[],"targets":[],"contextTargets":[],"rules":[],'
    b'"fallthrough":{},"offVariation":null,"variations":[],"clientSide":false,"salt":"",'
    b'"trackEvents":false,"trackEventsFallthrough":false,"debugEventsUntilDate":null,'
    b'"version":%d,"deleted":true}'
)
_SEGMENT_TOMBSTONE = (
    b'{"key":"$deleted","included":[],"excluded":[],"includedContexts":[],"excludedContexts":[],'
    b'"salt":"","rules":[],"version":%d,"generation":null,"deleted":true}'
)


class _StoredVersion(msgspec.Struct, frozen=True):
    version: int | float = 0
    deleted: bool = False


_DECODER = msgspec.json.Decoder(_StoredVersion)


class Layout:
    """Keys of one environment.

    Args:
        prefix: prefix of the keys; empty for `launchdarkly`.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = one_line(prefix or DEFAULT_PREFIX)
        self.marker = f"{self.prefix}:$inited"
        self.notes = f"{self.prefix}:$relay"
        """Hash of what relays write for each other; SDKs do not read it."""

    def hash(self, kind: Kind) -> str:
        """Return the key of the hash of a kind."""
        return f"{self.prefix}:{_NAMES[kind]}"


def version_of(json: bytes) -> Version:
    """Return the version of a stored item; `UNREADABLE` if it cannot be decoded."""
    try:
        stored = _DECODER.decode(json)
        return Version(int(stored.version), live=not stored.deleted)
    except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError, RecursionError):
        return UNREADABLE


def _stored_json(item: Item) -> bytes:
    """Return the JSON to store; tombstones are complete objects that old SDKs can read."""
    if item.json is not None:
        return item.json
    tombstone = _FLAG_TOMBSTONE if item.kind is Kind.FLAG else _SEGMENT_TOMBSTONE
    return tombstone % item.version


def chunks(items: Iterable[Item]) -> Iterator[list[str | bytes]]:
    """Yield alternating keys and values, in lists for one command each."""
    chunk: list[str | bytes] = []
    size = 0
    for item in items:
        json = _stored_json(item)
        chunk += (item.key, json)
        size += len(json)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def parse_items(hashes: Hashes) -> Steps[Stored]:
    """Return the content of both hashes, with a step for each item."""
    items: list[Item] = []
    invalid: list[InvalidItem] = []
    for kind, key, json in _iter_items(hashes):
        try:
            items.append(parse(kind, key, json))
        except InvalidData as e:
            invalid.append(InvalidItem(kind, key, e.reason))
        yield
    return Stored(Payload.of(items), tuple(invalid))


def parse_versions(hashes: Hashes) -> Steps[Versions]:
    """Return the versions of all items, with a step for each."""
    versions: dict[Key, Version] = {}
    for kind, key, json in _iter_items(hashes):
        versions[kind, key] = version_of(json)
        yield
    return versions


def _iter_items(hashes: Hashes) -> Iterator[tuple[Kind, str, bytes]]:
    for kind, pairs in hashes.items():
        for key, json in pairs.items():
            yield kind, key.decode(errors="replace"), json
