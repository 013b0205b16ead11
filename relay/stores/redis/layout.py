"""Layout of items in Redis that SDKs in daemon mode read (datastore 4.1, 4.3); pure.

Two hashes hold flags and segments as JSON by key; an empty string marks both as complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from relay.model.environment import DEFAULT_PREFIX
from relay.model.item import Item, Kind
from relay.model.text import one_line
from relay.stores.items import KIND_NAMES, Entry, stored_json

CHUNK = 256 * 1024
"""Bytes of items per command: half a millisecond of packing before the loop can run other tasks."""

Hashes = dict[Kind, dict[bytes, bytes]]
"""Stored items by kind and encoded key."""


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

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, where one server has them all."""
        return (self.marker, self.notes, *map(self.hash, Kind))

    def hash(self, kind: Kind) -> str:
        """Return the key of the hash of a kind."""
        return f"{self.prefix}:{KIND_NAMES[kind]}"

    def notes_beside(self, kind: Kind) -> str:
        """Return the key of what relays note of one kind, in a cluster that divides the keys.

        It is in the slot of the hash, unless the prefix has a brace: what a failover loses, it
        loses of both.
        """
        return f"{{{self.hash(kind)}}}:$relay"


def fields(items: Iterable[Item]) -> Iterator[tuple[str, bytes]]:
    """Yield items as fields of a hash."""
    return ((item.key, stored_json(item)) for item in items)


def chunks(pairs: Iterable[tuple[str, bytes]]) -> Iterator[list[str | bytes]]:
    """Yield alternating fields and values of a hash, in lists for one command each."""
    chunk: list[str | bytes] = []
    size = 0
    for field, value in pairs:
        chunk += (field, value)
        size += len(value)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def pairs_of(reply: Sequence[bytes]) -> dict[bytes, bytes]:
    """Return the fields and values of a hash."""
    return dict(zip(reply[::2], reply[1::2], strict=True))


def entries(hashes: Hashes) -> Iterator[Entry]:
    """Yield the stored items of both hashes."""
    for kind, pairs in hashes.items():
        for key, json in pairs.items():
            yield kind, key.decode(errors="replace"), json
