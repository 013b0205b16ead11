"""Request heads: raw ones as keys of caches, parsed ones for the handlers of hot routes.

Cloud functions connect by the thousand with heads that are the same except for a few values, which
differ between instances of one client. Without these, the parser runs once for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from relay.relay import Relay
from relay.web.access import Access, resolve
from relay.web.routes import has_routes, match

END = b"\r\n\r\n"
"""The blank line that ends a head."""

MAX_HEAD = 4096
"""Maximum bytes of a head that is remembered; SDKs send a few hundred."""

LENGTH = b"content-length"
PAYLOAD_ID = b"x-launchdarkly-payload-id"

EVALUATION_STARTS = (b"GET /sdk/evalx/", b"GET /msdk/evalx/", b"GET /sdk/poll/eval/")
"""First bytes of evaluation requests."""

_VARIABLE = re.compile(
    rb"\r\n(content-length|x-launchdarkly-(?:payload|instance)-id): ([0-9A-Za-z-]{1,100})(?=\r\n)",
    re.IGNORECASE,
)

HeadTemplate = tuple[bytes, ...]
"""The texts of a head in between its variable values, with the name of the header before each."""


def normalise_head(head: bytes) -> tuple[HeadTemplate, list[bytes]]:
    """Return the template of a head, and the values taken out of it.

    Only values of letters, digits and dashes are taken out: with any of these, a head is as valid
    as all others with the same template.
    """
    parts = _VARIABLE.split(head)
    values = parts[2::3]
    del parts[2::3]
    return tuple(parts), values


def variable_names(template: HeadTemplate) -> list[bytes]:
    """Return the names of the headers whose values were taken out, in lower case."""
    return [name.lower() for name in template[1::2]]


class RequestHead(NamedTuple):
    """Parsed head of a plain request to an authenticated route."""

    raw: bytes
    """As received, with the blank line."""
    access: Access
    segment: bytes
    """Parameter in the path besides the client-side ID: a context, or the key of an item."""
    url: bytes
    """Target as received."""
    query: bytes
    headers: Mapping[bytes, bytes]
    """By name in lower case; none is repeated."""
    closes: bool
    """True if the client wants the connection closed after the response."""


_START = re.compile(rb"(GET|POST) /([a-z]+)[/? ]")
_ODD_HEADERS = frozenset((b"expect", b"upgrade"))
_BODY_HEADERS = _ODD_HEADERS | {b"content-length", b"transfer-encoding"}


def read_head(relay: Relay, raw: bytes) -> RequestHead | None:
    """Return a request that the fast path may answer; None to leave it to the application.

    Left to the application are other methods, unknown credentials, escapes, repeated or odd
    headers, and GETs with a body.

    Args:
        relay: provides the environments.
        raw: the whole head, with the blank line.
    """
    start = _START.match(raw)
    if start is None or not has_routes(start[1], start[2]):
        return None
    parsed = _ParsedHead.of(raw)
    if parsed is None:
        return None
    path, _, query = parsed.url.partition(b"?")
    found = match(parsed.method, path)
    odd = _BODY_HEADERS if parsed.method == b"GET" else _ODD_HEADERS
    if found is None or not odd.isdisjoint(parsed.headers):
        return None
    access = resolve(relay, found.route, parsed.headers, found.environment_id, query)
    if not isinstance(access, Access):
        return None
    return RequestHead(raw, access, found.segment, parsed.url, query, parsed.headers, parsed.closes)


class _ParsedHead:
    """Head of an HTTP/1.1 request without repeated headers; receives the parser's callbacks."""

    __slots__ = ("_parser", "_repeats", "closes", "headers", "method", "url")

    def __init__(self) -> None:
        self.method = b""
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.closes = False
        self._repeats = False
        self._parser: HttpRequestParser | None = HttpRequestParser(self)

    @classmethod
    def of(cls, raw: bytes) -> _ParsedHead | None:
        """Parse a head; None if it is invalid or unusual."""
        head = cls()
        try:
            if head._parser is not None:
                head._parser.feed_data(raw)
        except (HttpParserError, HttpParserUpgrade):
            return None
        finally:
            head._parser = None  # the two refer to each other
        return head if head.method and not head._repeats else None

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._repeats = self._repeats or name in self.headers
        self.headers[name] = value

    def on_headers_complete(self) -> None:
        parser = self._parser
        if parser is not None and parser.get_http_version() == "1.1":
            self.method, self.closes = parser.get_method(), not parser.should_keep_alive()
