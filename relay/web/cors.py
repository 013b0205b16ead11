"""CORS headers, without which scripts in browsers may not read a response (endpoints 1.3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from relay.model.environment import EnvironmentSpec
from relay.model.text import header_value
from relay.web.responses import Headers

ALLOWED_HEADERS = (
    *("Cache-Control", "Content-Type", "Content-Length", "Accept-Encoding"),
    *("X-LaunchDarkly-User-Agent", "X-LaunchDarkly-Payload-ID", "X-LaunchDarkly-Wrapper"),
    *("X-LaunchDarkly-Event-Schema", "X-LaunchDarkly-Tags"),
)
"""Request headers that SDKs may send; an environment may allow more."""

MAX_AGE = 300
"""Seconds for which a browser may cache a preflight."""

MAX_KNOWN = 1024
"""Cached header sets, by environment and origin; each takes some hundred bytes."""


def cors_headers(
    spec: EnvironmentSpec | None,
    origin: str,
    methods: Sequence[str],
    exposed: Sequence[str] = ("Date",),
) -> dict[str, str]:
    """Return the CORS headers of a response; errors need them, too.

    Args:
        spec: of the environment; None if the request names none.
        origin: the request header; empty without one.
        methods: of the route.
        exposed: response headers that scripts may read.
    """
    more = spec.allowed_headers if spec else ()
    return {
        "access-control-allow-origin": _as_header(_allowed_origin(spec, origin)),
        "access-control-allow-methods": ",".join(methods),
        "access-control-allow-headers": _as_header(",".join((*ALLOWED_HEADERS, *more))),
        "access-control-allow-credentials": "false",
        "access-control-max-age": str(MAX_AGE),
        "access-control-expose-headers": ",".join(exposed),
    }


@lru_cache(maxsize=MAX_KNOWN)
def cors_lines(
    spec: EnvironmentSpec, origin: bytes, methods: tuple[str, ...], exposed: tuple[str, ...]
) -> Headers:
    """Return the headers of `cors_headers` and `Vary: Origin` as the fast path writes them.

    Args:
        spec: of the environment.
        origin: the request header; empty without one.
        methods: of the route.
        exposed: response headers that scripts may read.
    """
    headers = cors_headers(spec, origin.decode("latin-1"), methods, exposed)
    lines = ((name.encode(), value.encode("latin-1")) for name, value in headers.items())
    return (*lines, (b"vary", b"Origin"))


def _allowed_origin(spec: EnvironmentSpec | None, origin: str) -> str:
    allowed = spec.allowed_origins if spec else ()
    if not allowed:
        return origin or "*"
    if origin in allowed:
        return origin
    return "*" if "*" in allowed else allowed[0]


def _as_header(text: str) -> str:
    """Return a text from the configuration or a request as a safe header value."""
    return header_value(text.encode("latin-1", "replace")).decode("latin-1")
