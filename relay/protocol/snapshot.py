"""Format of snapshot files: a header line of fixed length, then one line of JSON per item.

The first line is a `Header` with its own checksum. Item lines are `[kind, key, version, item]`, the
item verbatim, or null for a tombstone. The format is private to Relay.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator

import msgspec

from relay.errors import InvalidData
from relay.model.item import Item, Kind
from relay.model.payload import Payload

CHUNK = 1024 * 1024
"""Bytes to encode and write, or to decode, at a time: about a millisecond, after which the
interpreter can switch to the event loop."""

HEADER_SIZE = 512
"""Bytes of the first line: at most one disk sector, so that an update of it is atomic."""

_FORMAT = b"relay snapshot "
_VERSION = b"1 "
"""Incremented whenever items of earlier releases become incompatible."""


EARLIEST = 1_735_689_600.0
"""Start of 2025 in Unix seconds. No snapshot is older, so an earlier clock is wrong."""

CLOCK_TOLERANCE = 60.0
"""Seconds by which a synchronised clock may go back."""


class UnknownFormat(Exception):
    """The file is intact, but belongs to another release or environment."""


class Header(msgspec.Struct, frozen=True):
    """Content of the first line.

    Args:
        environment: SHA-256 of the SDK key, or of the ID, in hexadecimal digits.
        filter: payload filter of the environment; always empty so far.
        confirmed: time at which upstream last confirmed the data, in Unix seconds.
        items: number of items.
        size: total size of the item lines in bytes.
        sha256: SHA-256 of the item lines.
    """

    environment: str
    filter: str
    confirmed: float
    items: int
    size: int
    sha256: str


def header(line: bytes) -> Header:
    """Decode the first line of a file.

    Raises:
        InvalidData: the line is damaged.
        UnknownFormat: the file belongs to another release.
    """
    if line.startswith(_FORMAT) and not line.startswith(_FORMAT + _VERSION):
        raise UnknownFormat("it was written by another release")
    text, _, checksum = line.rstrip().rpartition(b" ")
    if len(line) != HEADER_SIZE or checksum != _checksum(text):
        raise damaged("its first line is not that of a snapshot")
    try:
        return _DECODE_HEADER(text.removeprefix(_FORMAT + _VERSION))
    except msgspec.MsgspecError as e:
        raise damaged(str(e)) from e


def age(header: Header, now: float) -> float | None:
    """Return the seconds since upstream last confirmed the data; None if unknown.

    The clock may have been wrong when the file was written, or may be wrong now: a time in the
    future, or before the first release, is ignored.

    Args:
        header: header of the file.
        now: current time in Unix seconds.
    """
    if not EARLIEST <= header.confirmed <= now + CLOCK_TOLERANCE:
        return None
    return max(0.0, now - header.confirmed)


def first_line(header: Header) -> bytes:
    """Encode the first line: format, JSON, checksum, blanks."""
    text = _FORMAT + _VERSION + msgspec.json.encode(header)
    return (text + b" " + _checksum(text)).ljust(HEADER_SIZE - 1) + b"\n"


def payload(header: Header, body: bytes) -> Payload:
    """Decode the item lines.

    Raises:
        InvalidData: the lines do not match the header.
    """
    if len(body) != header.size:
        raise damaged(f"{len(body)} bytes of items instead of {header.size}")
    if hashlib.sha256(body).hexdigest() != header.sha256:
        raise damaged("its checksum is wrong")
    try:
        result = Payload.of(_items(body))
    except (msgspec.MsgspecError, ValueError) as e:
        raise damaged(str(e)) from e
    if len(result) != header.items:
        raise damaged(f"{len(result)} items instead of {header.items}")
    return result


def damaged(reason: str) -> InvalidData:
    """Return the error for a damaged file."""
    return InvalidData("damaged", reason)


def chunks(items: Iterable[Item]) -> Iterator[bytes]:
    """Yield the item lines in chunks of about `CHUNK` bytes."""
    lines: list[bytes] = []
    size = 0
    for item in items:
        kind, key = item.kind.value.encode(), msgspec.json.encode(item.key)
        line = b'["%b",%b,%d,%b]\n' % (kind, key, item.version, item.json or b"null")
        lines.append(line)
        size += len(line)
        if size >= CHUNK:
            yield b"".join(lines)
            lines, size = [], 0
    yield b"".join(lines)


def _items(body: bytes) -> Iterator[Item]:
    """Yield the items of all lines; the inverse of `chunks`."""
    start = 0
    while start < len(body):
        end = body.find(b"\n", start + CHUNK) + 1 or len(body)
        for kind, key, version, raw in _DECODE_LINES(body[start:end]):
            json = bytes(raw)
            yield Item(Kind(kind), key, version, None if json == b"null" else json)
        start = end


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


_DECODE_HEADER = msgspec.json.Decoder(Header).decode
_DECODE_LINES = msgspec.json.Decoder(tuple[str, str, int, msgspec.Raw]).decode_lines
