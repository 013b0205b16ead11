"""What browsers need to be told before their code may read an answer (endpoints 1.3)."""

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
"""Request headers that every SDK may send; environments may allow more."""

MAX_AGE = 300
"""Seconds for which a browser need not ask again."""

MAX_KNOWN = 1024
"""Pairs of environment and origin whose headers are at hand; each is some hundred bytes."""


def cors_headers(
    spec: EnvironmentSpec | None,
    origin: str,
    methods: Sequence[str],
    exposed: Sequence[str] = ("Date",),
) -> dict[str, str]:
    """Return the headers of an answer that browsers may read, errors included.

    Args:
        spec: the environment; None if the request named none.
        origin: the request header; empty if there is none.
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
    """Return the same as the front door writes it, and that it depends on the origin.

    Args:
        spec: the environment.
        origin: the request header; empty if there is none.
        methods: of the route.
        exposed: response headers that scripts may read.
    """
    given = cors_headers(spec, origin.decode("latin-1"), methods, exposed)
    lines = ((name.encode(), value.encode("latin-1")) for name, value in given.items())
    return (*lines, (b"vary", b"Origin"))


def _allowed_origin(spec: EnvironmentSpec | None, origin: str) -> str:
    allowed = spec.allowed_origins if spec else ()
    if not allowed:
        return origin or "*"
    if origin in allowed:
        return origin
    return "*" if "*" in allowed else allowed[0]


def _as_header(text: str) -> str:
    """Return what is sent of a text that the configuration, or a request, has brought."""
    return header_value(text.encode("latin-1", "replace")).decode("latin-1")
