"""Texts that the relays of a fleet exchange in Redis: term, head, entries of the feed; pure.

Term and head are text and never change their form, so that relays of all releases understand them.
The key of the feed carries the number of its format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import msgspec
from isal import igzip, isal_zlib
from msgspec import Struct

from relay.errors import InvalidData
from relay.model.item import Item, Kind
from relay.model.payload import Selector
from relay.protocol.gzip import CORRUPT, GZIP

FEED = "relay:feed:1"
"""Key of the feed of all environments; the number is that of the format of its entries."""

LARGE = 32 * 1024
"""Bytes from which on entries are compressed: below, sending them costs less."""

LARGEST = 256 * 1024
"""Bytes of items from which on an entry refers to the data in Redis, so that the feed stays small
enough for the memory of its server."""

COMPRESSION_LEVEL = 0
"""isal's fastest; every member has to wait for it."""


class Term(Struct, frozen=True):
    """A leadership: its number grows with each election, and its owner was elected.

    The owner belongs to it because a failover of Redis may lose an election, and so give the same
    number twice.
    """

    number: int
    owner: str

    def __str__(self) -> str:
        return f"{self.number}:{self.owner}"

    @classmethod
    def parse(cls, text: bytes | None) -> Self:
        """Return the stored term; one that nobody has if there is none or it is unreadable."""
        number, _, owner = (text or b"").decode(errors="replace").partition(":")
        return cls(int(number), owner) if number.isdecimal() else cls(0, "")


class Head(Struct, frozen=True):
    """The last publication of an environment.

    Args:
        number: counts publications; the first is 1.
        selector: address of the data after it.
        identity: of the environment, to notice two that share a prefix by mistake.
    """

    number: int
    selector: str
    identity: str

    def __str__(self) -> str:
        return f"{self.number}:{self.selector}:{self.identity}"

    @classmethod
    def parse(cls, text: bytes | None) -> Self | None:
        """Return the stored head; None if there is none or it is unreadable."""
        number, _, rest = (text or b"").decode(errors="replace").partition(":")
        selector, _, identity = rest.partition(":")
        return cls(int(number), selector, identity) if number.isdecimal() else None


class Entry(Struct, frozen=True):
    """An entry of the feed.

    Args:
        prefix: prefix of the environment's keys.
        term: of the leader that has written it.
        number: as in the head, which was written with it.
        before: address of the data before; empty if unknown.
        after: address of the data after.
        confirmed: True if the leader's upstream is healthy.
        evaluated: version of the data for client-side SDKs.
        items: new values of the changed items; None if they are too large for the feed, so that
            the data have to be read.
        resigned: True if nothing changes but that the leader gives up its lease.
        name: name that upstream gives to the data after it; None if it gives none, or if the
            writer is of a release that does not tell.
    """

    prefix: str
    term: Term
    number: int
    before: str
    after: str
    confirmed: bool = True
    evaluated: int = 0
    items: tuple[Item, ...] | None = ()
    resigned: bool = False
    name: Selector | None = None


_Item = tuple[str, str, int, bytes | None]
_Name = tuple[str, str, int, bool]


class _Wire(Struct, array_like=True):
    term: int
    owner: str
    number: int
    before: str
    after: str
    confirmed: bool
    evaluated: int
    items: list[_Item] | None
    resigned: bool
    name: _Name | None = None
    """Not in entries of older releases, which take no notice of it."""


class _Note(Struct, array_like=True):
    number: int
    address: str
    name: _Name


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Wire)
_NOTE = msgspec.msgpack.Decoder(_Note)

PREFIX, PLAIN, COMPRESSED = b"p", b"d", b"z"
"""Fields of an entry: whose it is, and its content in one of two forms."""


def fields_of(entry: Entry) -> tuple[str | bytes, ...]:
    """Return an entry as alternating fields and values."""
    items = entry.items
    if items is not None and sum(len(item.json or b"") for item in items) > LARGEST:
        items = None
    wire = _Wire(
        entry.term.number,
        entry.term.owner,
        entry.number,
        entry.before,
        entry.after,
        entry.confirmed,
        entry.evaluated,
        None if items is None else [(i.kind.value, i.key, i.version, i.json) for i in items],
        entry.resigned,
        _plain(entry.name),
    )
    content = _ENCODER.encode(wire)
    if len(content) < LARGE:
        return PREFIX, entry.prefix, PLAIN, content
    return PREFIX, entry.prefix, COMPRESSED, igzip.compress(content, COMPRESSION_LEVEL)


def entry_of(fields: Mapping[bytes, bytes]) -> Entry:
    """Return the entry of its fields.

    Raises:
        InvalidData: it is none.
    """
    try:
        compressed = fields.get(COMPRESSED)
        content = fields[PLAIN] if compressed is None else _inflated(compressed)
        wire = _DECODER.decode(content)
        items = None if wire.items is None else tuple(map(_item_of, wire.items))
        prefix = fields[PREFIX].decode()
    except (KeyError, ValueError, EOFError, OSError, msgspec.MsgspecError, CORRUPT) as e:
        raise InvalidData("entry of the feed", str(e)) from e
    return Entry(
        prefix,
        Term(wire.term, wire.owner),
        wire.number,
        wire.before,
        wire.after,
        wire.confirmed,
        wire.evaluated,
        items,
        wire.resigned,
        _selector(wire.name),
    )


def note_of(entry: Entry) -> bytes:
    """Return what is written beside the head about the name of the data; nothing without one.

    It says to which publication it belongs, because members of older releases leave it as it is.
    """
    name = _plain(entry.name)
    return _ENCODER.encode(_Note(entry.number, entry.after, name)) if name else b""


def name_of(note: bytes, head: Head | None) -> Selector | None:
    """Return the name of the data of a head; None if the note is of others, or is none."""
    try:
        noted = _NOTE.decode(note)
    except msgspec.MsgspecError:
        return None
    is_same = head is not None and (noted.number, noted.address) == (head.number, head.selector)
    return _selector(noted.name) if is_same else None


def _plain(name: Selector | None) -> _Name | None:
    return None if name is None else (name.state, name.id, name.version, name.verbatim)


def _selector(name: _Name | None) -> Selector | None:
    return None if name is None else Selector(*name)


def _item_of(wire: _Item) -> Item:
    kind, key, version, json = wire
    return Item(Kind(kind), key, version, json)


def _inflated(content: bytes) -> bytes:
    inflated: bytes = isal_zlib.decompress(content, GZIP)
    return inflated
