"""CORS headers: origins, and the place of the headers in a response."""

from __future__ import annotations

import pytest

from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.web.cors import cors_lines, with_cors
from relay.web.routes import ROUTES, Endpoint

GOALS = next(route for route in ROUTES if route.endpoint is Endpoint.GOALS)


@pytest.mark.parametrize("allowed", [("*",), ("*", "https://a"), ("https://a", "*")])
def test_a_star_among_the_origins_means_all(allowed):
    """A star allows every origin; a listed one is named in the response."""
    spec = EnvironmentSpec("x", SDKKey("sdk-1"), allowed_origins=allowed)
    for origin in ("https://a", "https://b", ""):
        allowed_origin = dict(cors_lines(spec, origin.encode(), GOALS))[
            b"access-control-allow-origin"
        ]
        assert allowed_origin.decode() == (origin if origin in allowed and origin else "*")


def test_headers_of_cors_replace_equal_ones_in_their_places():
    """The order of a response stays; `Vary` is added to another one."""
    headers = (
        (b"access-control-allow-origin", b"*"),
        (b"vary", b"Accept-Encoding"),
        (b"etag", b"x"),
    )
    lines = cors_lines(None, b"https://a", GOALS)
    merged = with_cors(headers, lines)
    assert merged[:3] == ((b"access-control-allow-origin", b"https://a"), *headers[1:])
    assert merged[3:] == lines[1:]
    assert merged[-1] == (b"vary", b"Origin")


def test_without_an_environment_every_origin_is_allowed():
    """Scripts can read refusals, too."""
    assert dict(cors_lines(None, b"", GOALS))[b"access-control-allow-origin"] == b"*"
