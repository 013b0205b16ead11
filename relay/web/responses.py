"""Responses that are prepared once and sent many times, and refusals in ld-relay's words."""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus

import orjson
from starlette.responses import Response

from relay.model.environment import EnvironmentSpec
from relay.model.text import header_value

Headers = tuple[tuple[bytes, bytes], ...]

_TEXT: Headers = ((b"content-type", b"text/plain; charset=utf-8"),)
_JSON: Headers = ((b"content-type", b"application/json"),)


@dataclass(frozen=True, slots=True)
class PreparedResponse:
    """A complete HTTP response.

    Args:
        status: code.
        headers: lower-case names and values, without `content-length` and `date`.
        body: empty for a 304.
    """

    status: int
    headers: Headers = ()
    body: bytes = b""
    head: bytes = field(init=False, repr=False)
    """Status line and headers, each with its CRLF; without `date` and the final blank line."""

    def __post_init__(self) -> None:
        line = b"HTTP/1.1 %d %b\r\n" % (self.status, HTTPStatus(self.status).phrase.encode())
        headers = (b"%b: %b\r\n" % header for header in self.all_headers)
        object.__setattr__(self, "head", line + b"".join(headers))

    def __repr__(self) -> str:
        # Without headers and body: they can be megabytes, and hold data of customers.
        return f"<PreparedResponse [{self.status}, {len(self.body)} bytes]>"

    @property
    def all_headers(self) -> Headers:
        """Headers to send; a 304 has no `content-length`, which would be that of the 200."""
        if self.status == HTTPStatus.NOT_MODIFIED:
            return self.headers
        return (*self.headers, (b"content-length", b"%d" % len(self.body)))

    def with_headers(self, *headers: tuple[bytes, bytes]) -> PreparedResponse:
        """Return a copy with additional headers."""
        return PreparedResponse(self.status, (*self.headers, *headers), self.body)

    def to_starlette(self) -> Response:
        """Return the response for the application; the server omits the body for HEAD."""
        response = Response(self.body, self.status)
        response.raw_headers = list(self.all_headers)
        return response


def environment_headers(spec: EnvironmentSpec) -> Headers:
    """Return the header that names the client-side ID of an environment, if it has one."""
    if spec.environment_id is None:
        return ()
    return ((b"x-ld-envid", header_value(spec.environment_id.value.encode(errors="replace"))),)


def text(status: int, message: str) -> PreparedResponse:
    """Return a response in plain text, without a line end."""
    return PreparedResponse(status, _TEXT, message.encode())


def json(status: int, value: object) -> PreparedResponse:
    """Return a response in compact JSON."""
    return PreparedResponse(status, _JSON, orjson.dumps(value))


def json_error(status: int, message: str) -> PreparedResponse:
    """Return a response with `{"message":"…"}`."""
    return json(status, {"message": message})


# The texts are those of endpoints 1.1 and 1.2.
NOT_FOUND = PreparedResponse(
    404, (*_TEXT, (b"x-content-type-options", b"nosniff")), b"404 page not found\n"
)
NO_SUCH_ITEM = PreparedResponse(404)
BAD_ESCAPE = PreparedResponse(400, (*_TEXT, (b"connection", b"close")), b"400 Bad Request")
MALFORMED_CREDENTIAL = PreparedResponse(401)
UNKNOWN_CREDENTIAL = text(
    401,
    "Relay Proxy does not recognize the client credential "
    "(missing or invalid Authorization header)",
)
UNKNOWN_ENVIRONMENT_ID = text(404, "URL did not contain an environment ID")
UNKNOWN_FILTER = text(
    404, "Relay Proxy recognizes the provided credential, but the payload filter was not found"
)
NO_ENVIRONMENTS = text(
    503,
    "Relay Proxy is not yet fully initialized, does not have list of environments yet",
)
NO_DATA = text(503, "client was not initialized")
EVENTS_DISABLED = json_error(
    503,
    "Event proxy is not enabled for this environment: set [Events] sendEvents (USE_EVENTS=true)",
)

FDV1_INSTEAD = json_error(
    503, "FDv2 is switched off for now; SDKs turn to FDv1 by themselves"
).with_headers((b"x-ld-fd-fallback", b"true"), (b"x-ld-fd-fallback-ttl", b"3600"))
"""Makes SDKs that speak FDv2 poll by FDv1 at once; a few return after an hour (fdv2 13.4.1)."""
