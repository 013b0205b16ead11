"""The grammar of a snapshot file: one line of fixed length, then one line of JSON for each item.

The first line is a `Header` with a checksum of itself; the lines of items are `[kind, key, version,
item]`, the item verbatim, or null for a tombstone. The file is our own: no specification has it.
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
"""Bytes that are made, summed and written, or read, at a time: a millisecond of the interpreter,
which is then free for the event loop."""

HEADER_SIZE = 512
"""Bytes of the first line: no more than a sector, so that renewing it cannot leave half a line."""

_FORMAT = b"relay snapshot "
_VERSION = b"1 "
"""Raised whenever items of an older relay could not be taken as they are."""


EARLIEST = 1_735_689_600.0
"""Unix seconds: the year 2025. No snapshot was written before; a clock that says so is wrong."""

UNSTEADY = 60.0
"""Seconds by which a clock that is kept right may go back."""


class UnknownFormat(Exception):
    """The file is whole, but of another release or of another environment."""


class Header(msgspec.Struct, frozen=True):
    """What the first line says.

    Args:
        environment: SHA-256 of the SDK key, in hexadecimal digits.
        filter: the environment's payload filter; there are none yet.
        confirmed: Unix seconds at which upstream last vouched for the data.
        items: their number.
        size: bytes of all lines that follow.
        sha256: of these.
    """

    environment: str
    filter: str
    confirmed: float
    items: int
    size: int
    sha256: str


def header(line: bytes) -> Header:
    """Return what the first line of a file says.

    Raises:
        InvalidData: it is damaged.
        UnknownFormat: it is of another release.
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
    """Return the seconds since upstream last vouched for the data; None if that cannot be known.

    The clock may have been wrong when the file was written, and may be wrong now: a time that has
    not come yet, or before there were snapshots, says nothing.

    Args:
        header: of the file.
        now: Unix seconds.
    """
    if not EARLIEST <= header.confirmed <= now + UNSTEADY:
        return None
    return max(0.0, now - header.confirmed)


def first_line(header: Header) -> bytes:
    """Return the first line: format, JSON, checksum, blanks."""
    text = _FORMAT + _VERSION + msgspec.json.encode(header)
    return (text + b" " + _checksum(text)).ljust(HEADER_SIZE - 1) + b"\n"


def payload(header: Header, body: bytes) -> Payload:
    """Return what the lines of items hold.

    Raises:
        InvalidData: they are not what the header says.
    """
    if len(body) != header.size:
        raise damaged(f"{len(body)} bytes of items instead of {header.size}")
    if hashlib.sha256(body).hexdigest() != header.sha256:
        raise damaged("its checksum is wrong")
    try:
        read = Payload.of(_items(body))
    except (msgspec.MsgspecError, ValueError) as e:
        raise damaged(str(e)) from e
    if len(read) != header.items:
        raise damaged(f"{len(read)} items instead of {header.items}")
    return read


def damaged(reason: str) -> InvalidData:
    """Return the error of a file that is not what was written."""
    return InvalidData("damaged", reason)


def chunks(items: Iterable[Item]) -> Iterator[bytes]:
    """Yield the lines of all items, many at a time."""
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
    """Yield the items of all lines; the opposite of `chunks`."""
    begin = 0
    while begin < len(body):
        end = body.find(b"\n", begin + CHUNK) + 1 or len(body)
        for kind, key, version, raw in _DECODE_LINES(body[begin:end]):
            json = bytes(raw)
            yield Item(Kind(kind), key, version, None if json == b"null" else json)
        begin = end


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


_DECODE_HEADER = msgspec.json.Decoder(Header).decode
_DECODE_LINES = msgspec.json.Decoder(tuple[str, str, int, msgspec.Raw]).decode_lines
