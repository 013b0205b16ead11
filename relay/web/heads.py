"""What the heads of posts mean.

SDKs send the same head again and again, but for the length and the id of the post. So its meaning
is found out once, by the parser and all that follows; afterwards its bytes are compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from relay.environment import Environment
from relay.model.count import Count
from relay.model.event import Endpoint, Lane
from relay.web.endpoint import Access
from relay.web.events import is_payload_id

MAX_HEAD = 4096
"""Bytes of a head whose meaning is remembered; SDKs send a few hundred."""

MAX_DIGITS = 7
"""Of a length; longer ones are not plain."""

_LENGTH = b"content-length"
_VALUE = re.compile(rb"\r\n(?:(?i:content-length|x-launchdarkly-payload-id): *([!-~]*)|\r\n)")
"""The header lines that are different in each post of a client; the end of the head."""


class Route(NamedTuple):
    """Where events are posted."""

    template: str
    endpoint: Endpoint
    access: Access


class Opened(NamedTuple):
    """Where a post goes, and whose it is."""

    route: Route
    credential: str
    environment: Environment


class Cut(NamedTuple):
    """A head from which the values are cut out that are different in each post.

    Args:
        texts: what is before, between and after them.
        values: length and id, in their order; what is not plainly written stays in the texts.
        end: of the head.
    """

    texts: tuple[bytes, ...]
    values: list[bytes]
    end: int


def cut(data: bytes) -> Cut | None:
    """Cut a head with which data begin; None if there is no whole one, or it is too large."""
    texts: list[bytes] = []
    values: list[bytes] = []
    at = 0
    for found in _VALUE.finditer(data, 0, MAX_HEAD):
        start, end = found.span(1)
        if start < 0:
            end = found.end()
            texts.append(data[at:end])
            return Cut(tuple(texts), values, end)
        texts.append(data[at:start])
        values.append(data[start:end])
        at = end
    return None


def cut_like(data: bytes, texts: tuple[bytes, ...]) -> Cut | None:
    """Cut a head that has these texts, as the last one on the connection; None if it has others."""
    if not data.startswith(texts[0]):
        return None
    at = len(texts[0])
    values: list[bytes] = []
    for text in texts[1:]:
        end = data.find(b"\r", at, at + MAX_HEAD)
        if end < 0 or not data.startswith(text, end):
            return None
        values.append(data[at:end])
        at = end + len(text)
    return Cut(texts, values, at)


def length_at(head: Cut, url: bytes, headers: Mapping[bytes, bytes]) -> int | None:
    """Return which of the values is the length; None if there is none, or the head is odd.

    Args:
        head: that of a request.
        url: its target, as it was parsed.
        headers: the same, each once.
    """
    parts = (*head.values, b"")
    text = b"".join(part for pair in zip(head.texts, parts, strict=True) for part in pair)
    line, *lines = text[:-4].split(b"\r\n")
    if line != b"POST %b HTTP/1.1" % url or len(lines) != len(headers):
        return None
    for each in lines:
        name, _, value = each.partition(b":")
        if headers.get(name.lower()) != value.strip(b" \t"):
            return None
    names = [text.rpartition(b"\r\n")[2].partition(b":")[0].lower() for text in head.texts[:-1]]
    return names.index(_LENGTH) if _LENGTH in names else None


class Head:
    """What a head means, and all that are the same but for length and id.

    Args:
        texts: of the head.
        opened: where the post goes, and whose it is.
        length_at: which of the values is the length.
        lane: how the post travels.
        compressed: whether its body is.
        origin: the header, empty if there is none.
        count: of such requests.
        answer: status line and headers of a 202.
    """

    __slots__ = (
        *("_date", "_length_at", "_written", "answer", "compressed"),
        *("count", "lane", "opened", "origin", "spec", "texts"),
    )

    def __init__(
        self,
        texts: tuple[bytes, ...],
        opened: Opened,
        length_at: int,
        lane: Lane,
        *,
        compressed: bool,
        origin: bytes,
        count: Count,
        answer: bytes,
    ) -> None:
        self.texts = texts
        self.opened = opened
        self.spec = opened.environment.spec
        self.lane = lane
        self.compressed = compressed
        self.origin = origin
        self.count = count
        self.answer = answer
        self._length_at = length_at
        self._date = b""
        self._written = b""

    def read(self, head: Cut) -> Known | None:
        """Return what a head says that has these texts; None if its values are not plain."""
        values = head.values
        length, payload_id = values[self._length_at], b""
        if not length.isdigit() or len(length) > MAX_DIGITS:
            return None
        if len(values) > 1:
            payload_id = values[1 - self._length_at]
            if not is_payload_id(payload_id):
                return None
        return Known(self, payload_id.decode(), head.end, head.end + int(length))

    def written(self, date: bytes) -> bytes:
        """Return the 202; put together once a second."""
        if self._date is not date:
            self._date, self._written = date, self.answer + date
        return self._written


class Known(NamedTuple):
    """A post of whose head the meaning is known.

    Args:
        head: what it means.
        payload_id: empty if there is none.
        start: of its body, in the request.
        size: of the request.
    """

    head: Head
    payload_id: str
    start: int
    size: int
