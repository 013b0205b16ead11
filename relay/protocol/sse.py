"""Server-sent events: incremental decoder and encoder. WHATWG HTML, section 9.2.6.

Differences from the standard: data stays bytes, because items are forwarded verbatim; and a block
with any field but no `data` is an event with empty data, so that the caller can reject it
(streams 2.6). Only CR and LF bytes end lines: JSON may contain U+2028 and similar characters.
"""

from __future__ import annotations

from typing import NamedTuple

from relay.errors import InvalidData

MAX_MESSAGE = 128 * 1024 * 1024
"""Maximum size of a message in bytes: several times the largest environment (50 MB). A stream that
never ends a message is rejected before it exhausts the memory."""

LINE_COST = 8
"""Bytes counted for a line in addition to its content: its slot in the list of lines."""

_BOM = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """One message of a stream."""

    name: str
    data: bytes
    id: str = ""
    """The last id sent in this or an earlier message; empty if there was none."""


class Decoder:
    """Incremental decoder: converts chunks of bytes, split anywhere, into events.

    Decoding takes linear time for any split: the pieces of an incomplete line are kept unparsed and
    joined once.

    Args:
        max_message: maximum size of a message in bytes.
    """

    def __init__(self, max_message: int = MAX_MESSAGE) -> None:
        self.retry: int | None = None
        """Reconnection delay in milliseconds that the stream last requested."""
        self._max_message = max_message
        self._partial_line: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._at_start = True
        self._id = ""
        self._start_event()

    def _start_event(self) -> None:
        self._name = ""
        self._lines: list[bytes] = []
        self._has_fields = False

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that `chunk` completes.

        Raises:
            InvalidData: a message is too long. The decoder must not be used any more.
        """
        if not chunk:
            return []
        ended = chunk.endswith((b"\n", b"\r"))
        lines = chunk.splitlines()  # unlike for str, only at CR, LF and CRLF
        if self._after_cr and chunk.startswith(b"\n"):
            del lines[0]  # the second half of a CRLF
        self._after_cr = chunk.endswith(b"\r")
        rest = b"" if ended or not lines else lines.pop()
        events = self._process_lines(lines)
        if rest:
            self._add_size(len(rest))
            self._partial_line.append(rest)
        return events

    def _process_lines(self, lines: list[bytes]) -> list[Event]:
        events: list[Event] = []
        for piece in lines:
            line = self._join_pieces(piece) if self._partial_line else piece
            if self._at_start:
                self._at_start = False
                line = line.removeprefix(_BOM)
            if line:
                self._process_line(line)
            elif self._has_fields:
                events.append(self._finish_event())
        return events

    def _join_pieces(self, last: bytes) -> bytes:
        partial, self._partial_line = self._partial_line, []
        self._size -= sum(map(len, partial))
        partial.append(last)
        return b"".join(partial)

    def _process_line(self, line: bytes) -> None:
        if line.startswith(b"data:"):  # the common case, without copying large values twice
            self._has_fields = True
            self._add_data(line[6:] if line.startswith(b" ", 5) else line[5:])
        elif not line.startswith(b":"):
            self._has_fields = True
            field, _, value = line.partition(b":")
            self._process_field(field, value.removeprefix(b" "))

    def _process_field(self, field: bytes, value: bytes) -> None:
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
        self._add_size(len(line) + LINE_COST)
        self._lines.append(line)

    def _add_size(self, size: int) -> None:
        self._size += size
        if self._size > self._max_message:
            raise InvalidData("message", f"it is longer than {self._max_message} bytes")

    def _finish_event(self) -> Event:
        event = Event(self._name or "message", b"\n".join(self._lines), self._id)
        self._size = 0
        self._start_event()
        return event


def encode(name: bytes, *data: bytes) -> bytes:
    """Return the bytes of a message.

    Args:
        name: name of the event; must not be empty or contain line ends.
        data: parts of its data, without line ends; joined once, as a payload may be large.
    """
    return b"".join((b"event: ", name, b"\ndata: ", *data, b"\n\n"))
