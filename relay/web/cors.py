"""CORS headers, without which scripts in browsers may not read a response (endpoints 1.3)."""

from __future__ import annotations

from relay.model.environment import EnvironmentSpec
from relay.model.text import header_value
from relay.web.responses import Headers
from relay.web.routes import Route

ALLOWED_HEADERS = (
    *("Cache-Control", "Content-Type", "Content-Length", "Accept-Encoding"),
    *("X-LaunchDarkly-User-Agent", "X-LaunchDarkly-Payload-ID", "X-LaunchDarkly-Wrapper"),
    *("X-LaunchDarkly-Event-Schema", "X-LaunchDarkly-Tags"),
)
"""Request headers that SDKs may send; an environment may allow more."""

MAX_AGE = 300
"""Seconds for which a browser may cache a preflight."""


def cors_lines(spec: EnvironmentSpec | None, origin: bytes, route: Route) -> Headers:
    """Return the CORS headers of a response; errors need them, too.

    Args:
        spec: of the environment; None if the request names none.
        origin: the request header; empty without one.
        route: of the request.
    """
    more = spec.allowed_headers if spec else ()
    return (
        (b"access-control-allow-origin", _as_header(_allowed_origin(spec, origin))),
        (b"access-control-allow-methods", ",".join(route.methods).encode()),
        (b"access-control-allow-headers", _as_header(",".join((*ALLOWED_HEADERS, *more)))),
        (b"access-control-allow-credentials", b"false"),
        (b"access-control-max-age", b"%d" % MAX_AGE),
        (b"access-control-expose-headers", ",".join(route.auth.exposed_headers).encode()),
        (b"vary", b"Origin"),
    )


def with_cors(headers: Headers, lines: Headers) -> Headers:
    """Return response headers with CORS headers, which replace equal ones in their places.

    Args:
        headers: of the response.
        lines: of `cors_lines`; `Vary` does not replace another one.
    """
    *own, vary = lines
    missing = dict(own)
    merged = [(name, missing.pop(name, value)) for name, value in headers]
    return (*merged, *missing.items(), vary)


def _allowed_origin(spec: EnvironmentSpec | None, origin: bytes) -> str:
    allowed, text = spec.allowed_origins if spec else (), origin.decode("latin-1")
    if not allowed:
        return text or "*"
    if text in allowed:
        return text
    return "*" if "*" in allowed else allowed[0]


def _as_header(text: str) -> bytes:
    """Return a text from the configuration or a request as a safe header value."""
    return header_value(text.encode("latin-1", "replace"))
