"""Request heads: raw ones as keys of caches, parsed ones for the handlers of hot routes.

Cloud functions connect by the thousand with heads that are the same except for a few values, which
differ between instances of one client. Without these, the parser runs once for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from relay.relay import Relay
from relay.web.access import Access, resolve
from relay.web.routes import match

END = b"\r\n\r\n"
"""The blank line that ends a head."""

MAX_HEAD = 4096
"""Maximum bytes of a head that is remembered; SDKs send a few hundred."""

LENGTH = b"content-length"
PAYLOAD_ID = b"x-launchdarkly-payload-id"

EVALUATION_STARTS = (b"GET /sdk/evalx/", b"GET /msdk/evalx/")
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

    access: Access
    segment: bytes
    """Parameter in the path besides the client-side ID: a context, or the key of an item."""
    query: bytes
    headers: Mapping[bytes, bytes]
    """By name in lower case; none is repeated."""
    raw: bytes
    """As received, if alone and in one piece; else empty."""
    closes: bool
    """True if the client wants the connection closed after the response."""


_METHODS = (b"GET", b"POST")
_ODD_HEADERS = frozenset((b"expect", b"upgrade"))
_BODY_HEADERS = _ODD_HEADERS | {b"content-length", b"transfer-encoding"}


def read_head(
    relay: Relay,
    method: bytes,
    url: bytes,
    headers: Sequence[tuple[bytes, bytes]],
    raw: bytes,
    *,
    closes: bool,
) -> RequestHead | None:
    """Return a request that the fast path may answer; None to leave it to the application.

    Left to the application are other methods, unknown credentials, escapes, repeated or odd
    headers, and GETs with a body or in pieces.

    Args:
        relay: provides the environments.
        method: of the request.
        url: target as received.
        headers: as received, with names in lower case.
        raw: the whole head, if it arrived alone and in one piece; else empty.
        closes: True if the client wants the connection closed after the response.
    """
    path, _, query = url.partition(b"?")
    found = match(method, path) if method in _METHODS else None
    if found is None:
        return None
    by_name = dict(headers)
    odd = _BODY_HEADERS if method == b"GET" else _ODD_HEADERS
    if len(by_name) != len(headers) or not odd.isdisjoint(by_name):
        return None
    if method == b"GET" and not raw:
        return None
    access = resolve(relay, found.route, by_name, found.environment_id, query)
    if not isinstance(access, Access):
        return None
    return RequestHead(access, found.segment, query, by_name, raw, closes)
