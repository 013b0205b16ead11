"""Format of snapshot files: a header line of fixed length, one line of JSON per item, the journal.

The first line is a `Header` with its own checksum. Item lines are `[kind, key, version, item]`, the
item verbatim, or null for a tombstone. The last line is the journal of these data, if there is one:
a checksum of both makes sure that they belong together. The format is private to Relay.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator

import msgspec

from relay.errors import InvalidData
from relay.model.item import Item, Kind
from relay.model.journal import SavedJournal
from relay.model.payload import Payload

CHUNK = 1024 * 1024
"""Bytes to encode and write, or to decode, at a time: about a millisecond, after which the
interpreter can switch to the event loop."""

HEADER_SIZE = 512
"""Bytes of the first line: at most one disk sector, so that an update of it is atomic."""

_FORMAT = b"relay snapshot "
_VERSION = b"2 "
"""Incremented whenever files become unreadable for earlier releases."""

_READABLE = (_VERSION, b"1 ")
"""Versions that can be read. Files of version 1 have no journal."""

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
        filter: the same of the key of the environment's payload filter; empty without one.
        confirmed: time at which upstream last confirmed the data, in Unix seconds.
        items: number of items.
        size: total size of the item lines in bytes.
        sha256: SHA-256 of all lines but the first.
        journal: size of the journal in bytes; 0 if there is none.
    """

    environment: str
    filter: str
    confirmed: float
    items: int
    size: int
    sha256: str
    journal: int = 0


def header(line: bytes) -> Header:
    """Decode the first line of a file.

    Raises:
        InvalidData: the line is damaged.
        UnknownFormat: the file belongs to another release.
    """
    starts = [_FORMAT + version for version in _READABLE if line.startswith(_FORMAT + version)]
    if line.startswith(_FORMAT) and not starts:
        raise UnknownFormat("it was written by another release")
    text, _, checksum = line.rstrip().rpartition(b" ")
    if len(line) != HEADER_SIZE or checksum != _checksum(text):
        raise damaged("its first line is not that of a snapshot")
    try:
        return _DECODE_HEADER(text.removeprefix(starts[0]))
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
    """Decode the item lines of all that follows the header.

    Raises:
        InvalidData: the lines do not match the header.
    """
    if len(body) != header.size + header.journal:
        raise damaged(f"{len(body)} bytes instead of {header.size + header.journal}")
    if hashlib.sha256(body).hexdigest() != header.sha256:
        raise damaged("its checksum is wrong")
    try:
        result = Payload.of(_items(body[: header.size] if header.journal else body))
    except (msgspec.MsgspecError, ValueError) as e:
        raise damaged(str(e)) from e
    if len(result) != header.items:
        raise damaged(f"{len(result)} items instead of {header.items}")
    return result


def journal(header: Header, body: bytes) -> SavedJournal | None:
    """Decode the journal, of what `payload` has found intact; None if there is none to be read.

    That of another release may differ. Without it clients get all data once, which is always right.
    """
    try:
        return _DECODE_JOURNAL(body[header.size :]) if header.journal else None
    except msgspec.MsgspecError:
        return None


def journal_line(journal: SavedJournal | None) -> bytes:
    """Encode the journal; nothing if there is none."""
    return b"" if journal is None else msgspec.json.encode(journal) + b"\n"


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
_DECODE_JOURNAL = msgspec.json.Decoder(SavedJournal).decode
_DECODE_LINES = msgspec.json.Decoder(tuple[str, str, int, msgspec.Raw]).decode_lines
