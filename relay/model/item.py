"""Items: flags and segments as they travel, in the bytes in which upstream wrote them.

An item is checked when it arrives, because one bad item would make strict SDKs reject a whole
payload (sdk-behaviour 11.3), and is never parsed again until something evaluates it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import msgspec
from msgspec import Struct

from relay.errors import InvalidData
from relay.model.flag import Flag
from relay.model.segment import Segment

LAST_VERSION_OF_TIME = 2**31 - 2**20
"""Of January 2038, whatever a clock says: some SDKs keep versions in 32 bits, and those that follow
need room, too."""


def version_of_time(seconds: float) -> int:
    """Return a version that is greater than those of earlier times.

    Args:
        seconds: Unix seconds, perhaps of a clock that is wrong.
    """
    return int(min(max(seconds, 0), LAST_VERSION_OF_TIME))


class Kind(Enum):
    """The two kinds of item. The value is the word of paths and payloads (streams 2.2)."""

    FLAG = "flags"
    SEGMENT = "segments"

    __hash__ = object.__hash__  # Enum's own takes as long as several look-ups

    @property
    def noun(self) -> str:
        """The kind in a sentence."""
        return "flag" if self is Kind.FLAG else "segment"


class Item(Struct, frozen=True, gc=False):
    """A flag or segment at one version.

    Args:
        kind: flag or segment.
        key: the key under which upstream filed it; an inner `key` may differ and is left alone.
        version: greater is newer.
        json: one line of UTF-8 JSON, verbatim but for `clientSide` (see `parse`); None for a
            tombstone, which keeps the version of a deletion.
    """

    kind: Kind
    key: str
    version: int
    json: bytes | None

    @property
    def deleted(self) -> bool:
        """Whether this is a tombstone."""
        return self.json is None


@dataclass(frozen=True, slots=True)
class InvalidItem:
    """An item that upstream sent and that cannot be used; its previous version stays in force."""

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
    """Check the JSON of an item and make the item.

    The bytes are kept as they are, with two exceptions: line ends between tokens become blanks, so
    that an item is one line; and a flag that has `clientSideAvailability` but no `clientSide` gets
    one, because older SDKs read only that.

    Raises:
        InvalidData: not JSON, or a known property has a wrong type.
    """
    try:
        value = _DECODERS[kind].decode(json)
        version = int(value.version)
    except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError, RecursionError) as e:
        raise InvalidData(f'{kind.noun} "{key}"', str(e)) from e
    if value.deleted:
        return Item(kind, key, version, None)
    return Item(kind, key, version, _with_client_side(value, _one_line(json)))


def _one_line(json: bytes) -> bytes:
    """Line ends occur only between tokens: within strings JSON demands that they be escaped."""
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
