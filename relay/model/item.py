"""Items: flags and segments in transit, as the bytes that upstream sent.

An item is validated on arrival, because a single bad item makes strict SDKs reject a whole payload
(sdk-behaviour 11.3). It is not parsed again unless it is evaluated.
"""

from __future__ import annotations

from enum import Enum

import msgspec
from msgspec import Struct

from relay.errors import InvalidData
from relay.model.flag import Flag
from relay.model.segment import Segment

LAST_VERSION_OF_TIME = 2**31 - 2**20
"""Upper limit, a time in January 2038: some SDKs keep versions in 32 bits, and versions that count
up from this one must fit, too."""


def version_of_time(seconds: float) -> int:
    """Return a version that grows with time.

    Args:
        seconds: Unix seconds; a wrong clock is tolerated.
    """
    return int(min(max(seconds, 0), LAST_VERSION_OF_TIME))


class Kind(Enum):
    """The two kinds of item. The values are the names in paths and payloads (streams 2.2)."""

    FLAG = "flags"
    SEGMENT = "segments"

    __hash__ = object.__hash__  # Enum's own costs as much as several dict lookups

    @property
    def noun(self) -> str:
        """The kind as a word for messages."""
        return "flag" if self is Kind.FLAG else "segment"


class Item(Struct, frozen=True, gc=False):
    """A flag or segment at one version.

    Args:
        kind: flag or segment.
        key: the key by which upstream lists it; the inner `key` may differ and is not changed.
        version: a greater version is newer.
        json: one line of UTF-8 JSON, verbatim except for `clientSide` (see `parse`); None for a
            tombstone, which records the version of a deletion.
    """

    kind: Kind
    key: str
    version: int
    json: bytes | None

    @property
    def deleted(self) -> bool:
        """True for a tombstone."""
        return self.json is None


class InvalidItem(Struct, frozen=True):
    """An unusable item that upstream sent; its previous version stays in force."""

    kind: Kind
    key: str
    reason: str

    def __str__(self) -> str:
        return f'{self.kind.noun} "{self.key}": {self.reason}'


_DECODERS: dict[Kind, msgspec.json.Decoder[Flag] | msgspec.json.Decoder[Segment]] = {
    Kind.FLAG: msgspec.json.Decoder(Flag),
    Kind.SEGMENT: msgspec.json.Decoder(Segment),
}


def parse(kind: Kind, key: str, json: bytes) -> Item:
    """Validate the JSON of an item and return the item.

    The bytes are kept verbatim, with two exceptions: line ends between tokens become spaces, so
    that an item is one line; and a flag with `clientSideAvailability` but without `clientSide` gets
    one, because older SDKs read only that.

    Raises:
        InvalidData: not JSON, or a known property has the wrong type, or a version is negative:
            SDKs in Rust and C++ reject that.
    """
    try:
        value = _DECODERS[kind].decode(json)
        version = int(value.version)
    except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError, RecursionError) as e:
        raise InvalidData(f'{kind.noun} "{key}"', str(e)) from e
    if version < 0:
        raise InvalidData(f'{kind.noun} "{key}"', "the version is negative")
    if value.deleted:
        return Item(kind, key, version, None)
    return Item(kind, key, version, _with_client_side(value, _one_line(json)))


def _one_line(json: bytes) -> bytes:
    """Replace line ends, which occur only between tokens: within JSON strings they are escaped."""
    if b"\n" in json or b"\r" in json:
        json = json.replace(b"\r", b" ").replace(b"\n", b" ")
    return json.strip()


def _with_client_side(value: Flag | Segment, json: bytes) -> bytes:
    if not isinstance(value, Flag) or value.client_side is not msgspec.UNSET:
        return json
    availability = value.client_side_availability
    if availability is None:
        return json
    visible = b"true" if availability.using_environment_id else b"false"
    return json[:-1] + b',"clientSide":' + visible + b"}"
