"""Server-sent events: an incremental decoder and the encoder. WHATWG HTML, section 9.2.6.

Differences from the standard: data stay bytes, because items are passed on verbatim; and a block
with any field but no `data` is an event with empty data, so that its reader can call it broken
(streams 2.6). Lines end at CR and LF bytes only: JSON may hold U+2028 and its like.
"""

from __future__ import annotations

from typing import NamedTuple

from relay.errors import InvalidData

MAX_MESSAGE = 128 * 1024 * 1024
"""Bytes of one message. Several times the largest environment (50 MB), and a stream of garbage
that never ends a message is given up before it takes the machine's memory."""

LINE_COST = 8
"""What a line counts beside its bytes: its place in the list of lines."""

_BOM = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """One message of a stream."""

    name: str
    data: bytes
    id: str = ""
    """The last id that the stream gave, here or before; empty if none."""


class Decoder:
    """Turns chunks of bytes, cut anywhere, into events.

    Work is linear in the bytes and does not depend on how they are cut: a line that is not complete
    is kept in pieces, unread, and joined once.

    Args:
        max_message: bytes from which on a message is refused.
    """

    def __init__(self, max_message: int = MAX_MESSAGE) -> None:
        self.retry: int | None = None
        """Milliseconds to wait before reconnecting, as the stream last asked for."""
        self._max = max_message
        self._pieces: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._at_start = True
        self._id = ""
        self._begin()

    def _begin(self) -> None:
        self._name = ""
        self._lines: list[bytes] = []
        self._any_field = False

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that `chunk` completes.

        Raises:
            InvalidData: a message is too long. The decoder is of no use after that.
        """
        if not chunk:
            return []
        ended = chunk.endswith((b"\n", b"\r"))
        lines = chunk.splitlines()  # of bytes: at CR, LF and CRLF only
        if self._after_cr and chunk.startswith(b"\n"):
            del lines[0]  # the second half of a CRLF
        self._after_cr = chunk.endswith(b"\r")
        rest = b"" if ended or not lines else lines.pop()
        events = self._take_lines(lines)
        if rest:
            self._count(len(rest))
            self._pieces.append(rest)
        return events

    def _take_lines(self, lines: list[bytes]) -> list[Event]:
        events: list[Event] = []
        for piece in lines:
            line = self._whole(piece) if self._pieces else piece
            if self._at_start:
                self._at_start = False
                line = line.removeprefix(_BOM)
            if line:
                self._take_line(line)
            elif self._any_field:
                events.append(self._event())
        return events

    def _whole(self, last: bytes) -> bytes:
        pieces, self._pieces = self._pieces, []
        self._size -= sum(map(len, pieces))
        pieces.append(last)
        return b"".join(pieces)

    def _take_line(self, line: bytes) -> None:
        if line.startswith(b"data:"):  # the only field whose copies could matter
            self._any_field = True
            self._add_data(line[6:] if line.startswith(b" ", 5) else line[5:])
        elif not line.startswith(b":"):
            self._any_field = True
            field, _, value = line.partition(b":")
            self._take_field(field, value.removeprefix(b" "))

    def _take_field(self, field: bytes, value: bytes) -> None:
        match field:
            case b"event":
                self._name = value.decode(errors="replace")
            case b"data":
                self._add_data(value)
            case b"id" if b"\0" not in value:
                self._id = value.decode(errors="replace")
            case b"retry" if value.isdigit() and len(value) <= len("4294967296"):
                self.retry = int(value)

    def _add_data(self, line: bytes) -> None:
        self._count(len(line) + LINE_COST)
        self._lines.append(line)

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > self._max:
            raise InvalidData("message", f"it is longer than {self._max} bytes")

    def _event(self) -> Event:
        event = Event(self._name or "message", b"\n".join(self._lines), self._id)
        self._size = 0
        self._begin()
        return event


def encode(name: str, data: bytes, id: str | None = None) -> bytes:  # noqa: A002 - its name in SSE
    """Return the bytes of a message.

    Args:
        name: the event's name; must not be empty or hold line ends.
        data: must not hold CR; each LF begins another `data` line.
        id: written if given; must not hold line ends or NUL.
    """
    head = f"event: {name}\n" if id is None else f"event: {name}\nid: {id}\n"
    return b"%bdata: %b\n\n" % (head.encode(), data.replace(b"\n", b"\ndata: "))
