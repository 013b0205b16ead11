"""Fingerprint of a database's content: the versions of all its items in 32 characters; pure.

A relay writes it beside the data. As long as it is there, and is that of the relay's own payload, a
probe of the database reads only this and the marker, instead of all items. Relays at the same
versions have the same fingerprint, however each of them came to its data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b

from msgspec import Struct

from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.steps import Steps

_SIZE = 16
_MODULUS = 1 << 8 * _SIZE


class Fingerprint(Struct, frozen=True):
    """Sum of the digests of all items, so that a change costs the digests of what changed.

    Args:
        total: the sum.
        counts: number of items of each kind, tombstones included.
    """

    total: int
    counts: Mapping[Kind, int]

    def __str__(self) -> str:
        return f"{self.total:0{2 * _SIZE}x}"

    @classmethod
    def of(cls, payload: Payload) -> Steps[Fingerprint]:
        """Return the fingerprint of a payload, with a step for each item."""
        total = 0
        for item in payload:
            total += _digest(item)
            yield
        return cls(total % _MODULUS, {kind: len(payload.all(kind)) for kind in Kind})

    def after(self, before: Payload, items: Iterable[Item]) -> Fingerprint:
        """Return the fingerprint after items have replaced those of the same keys.

        Args:
            before: payload of this fingerprint.
            items: the new items; no two have the same key.
        """
        total, counts = self.total, dict(self.counts)
        for item in items:
            replaced = before.all(item.kind).get(item.key)
            total += _digest(item) - (_digest(replaced) if replaced else 0)
            counts[item.kind] += replaced is None
        return Fingerprint(total % _MODULUS, counts)


def _digest(item: Item) -> int:
    text = f"{item.kind.value}\0{item.key}\0{item.version}\0{item.deleted}"
    return int.from_bytes(blake2b(text.encode(), digest_size=_SIZE).digest(), "big")
