"""Items as all databases hold them and SDKs in daemon mode read them (datastore 4.1); pure.

The layouts of the databases differ only in where they keep the JSON of an item.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from relay.errors import InvalidData
from relay.model.flag import Prerequisite
from relay.model.item import InvalidItem, Item, Kind, parse
from relay.model.payload import Payload
from relay.steps import Steps
from relay.stores import UNREADABLE, Key, Stored, Version, Versions

KIND_NAMES = {Kind.FLAG: "features", Kind.SEGMENT: "segments"}
"""Names of the kinds in databases."""

Entry = tuple[Kind, str, bytes]
"""A stored item: kind, key and JSON."""

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


def stored_json(item: Item) -> bytes:
    """Return the JSON to store; tombstones are complete objects that old SDKs can read."""
    if item.json is not None:
        return item.json
    tombstone = _FLAG_TOMBSTONE if item.kind is Kind.FLAG else _SEGMENT_TOMBSTONE
    return tombstone % item.version


def version_of(json: bytes) -> Version:
    """Return the version of a stored item; `UNREADABLE` if it cannot be decoded."""
    try:
        stored = _DECODER.decode(json)
        return Version(int(stored.version), live=not stored.deleted)
    except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError, RecursionError):
        return UNREADABLE


class _Needs(msgspec.Struct, frozen=True):
    prerequisites: list[Prerequisite] | None = None


_NEEDS_DECODER = msgspec.json.Decoder(_Needs)


def in_order(items: Iterable[Item]) -> Steps[list[Item]]:
    """Return items in the order in which they are written one by one, with a step for each.

    Segments come first, and each flag after its prerequisites: a reader that comes in between finds
    whatever an item refers to.
    """
    items = list(items)
    flags = {item.key: item for item in items if item.kind is Kind.FLAG}
    ordered = [item for item in items if item.kind is Kind.SEGMENT]
    entered: set[str] = set()
    left: set[str] = set()
    for first in flags:
        path = [first]
        while path:
            key = path[-1]
            if key not in entered:
                entered.add(key)
                path += [
                    need for need in _needs(flags[key]) if need in flags and need not in entered
                ]
                yield
                continue
            path.pop()
            if key not in left:
                left.add(key)
                ordered.append(flags[key])
    return ordered


def in_waves(items: Iterable[Item]) -> Steps[list[list[Item]]]:
    """Return items in groups, each of which may be written in any order, with steps between.

    An item is in a later group than those that it refers to; see `in_order`.
    """
    ordered = yield from in_order(items)
    waves: list[list[Item]] = []
    depths: dict[str, int] = {}
    for item in ordered:
        depth = 0
        if item.kind is Kind.FLAG:
            needs = [depths[need] for need in _needs(item) if need in depths]
            depth = depths[item.key] = 1 + max(needs, default=0)
        while len(waves) <= depth:
            waves.append([])
        waves[depth].append(item)
        yield
    return [wave for wave in waves if wave]


def _needs(flag: Item) -> list[str]:
    """Return the keys of the flags that a flag refers to."""
    if flag.json is None or b'"prerequisites"' not in flag.json:
        return []
    try:
        return [need.key for need in _NEEDS_DECODER.decode(flag.json).prerequisites or ()]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []


def parse_items(entries: Iterable[Entry]) -> Steps[Stored]:
    """Return the content of a database, with a step for each item."""
    items: list[Item] = []
    invalid: list[InvalidItem] = []
    for kind, key, json in entries:
        try:
            items.append(parse(kind, key, json))
        except InvalidData as e:
            invalid.append(InvalidItem(kind, key, e.reason))
        yield
    return Stored(Payload.of(items), tuple(invalid))


def parse_versions(entries: Iterable[Entry]) -> Steps[Versions]:
    """Return the versions of all items, with a step for each."""
    versions: dict[Key, Version] = {}
    for kind, key, json in entries:
        versions[kind, key] = version_of(json)
        yield
    return versions
