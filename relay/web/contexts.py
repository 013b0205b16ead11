"""Evaluation contexts in the path or body of a request, and the hash that secure mode requires.

Contexts are private: no response and no log line repeats any part of one (endpoints 1.4).
"""

from __future__ import annotations

import hmac

from msgspec import Struct
from starlette.requests import Request

from relay import clock
from relay.errors import InvalidData
from relay.model.context import Context, parse_context
from relay.model.environment import EnvironmentSpec
from relay.model.text import from_base64
from relay.web.bodies import MemoryBudget, RequestBody, RequestRejected
from relay.web.requests import basis_in, header, parameter_in
from relay.web.responses import json_error, text

MAX_CONTEXT = 5 * 1024 * 1024
"""Bytes of the largest body with a context unless configured otherwise; as in ld-relay."""

NOT_BASE64 = json_error(400, "context part of URL path did not decode as valid base64")
NO_CONTEXT = json_error(
    400, "context part of URL path did not decode to valid evaluation context as JSON"
)
WRONG_TYPE = text(415, "Content-Type must be application/json.")
TOO_LARGE = json_error(413, "Request body exceeds maximum allowed size.")
CONTEXTS_OVERLOADED = json_error(503, "Contexts cannot be accepted at the moment")
NO_KEY = json_error(400, "User must have a 'key' attribute")
WRONG_HASH = json_error(400, "Environment is in secure mode, and context hash does not match.")


def json_in_path(segment: bytes) -> bytes:
    """Return the JSON in a path segment, which is base64.

    Both alphabets are accepted, padded or not; line ends are ignored.

    Args:
        segment: without percent escapes.

    Raises:
        RequestRejected: the segment is not base64.
    """
    try:
        return from_base64(segment, ignored=b"\r\n")
    except ValueError:
        raise RequestRejected(NOT_BASE64) from None


def context_in_path(segment: bytes) -> Context:
    """Return the context in a path segment; see `json_in_path`.

    Raises:
        RequestRejected: the segment is not base64, or not a context.
    """
    json = json_in_path(segment)
    try:
        return parse_context(json)
    except InvalidData:
        raise RequestRejected(NO_CONTEXT) from None


def context_in_body(body: bytes) -> Context:
    """Return the context in a body, which is JSON.

    Raises:
        RequestRejected: the body is not a context.
    """
    try:
        return parse_context(body)
    except InvalidData as e:
        raise RequestRejected(json_error(400, e.reason)) from None


def context_budget(max_size: int = 0) -> MemoryBudget:
    """Return the memory limits shared by bodies with contexts.

    Args:
        max_size: bytes of the largest body; 0 for `MAX_CONTEXT`.
    """
    return MemoryBudget(max_size or MAX_CONTEXT, too_large=TOO_LARGE, full=CONTEXTS_OVERLOADED)


async def read_context_body(request: Request, budget: MemoryBudget) -> bytes:
    """Return the body of a request that should contain a context.

    Raises:
        RequestRejected: it is not declared as JSON, is too large, or did not arrive.
    """
    body = RequestBody(request, budget)
    try:
        _check_type(header(request, "content-type"))
        await body.begin()
        return await body.read()
    except RequestRejected as e:
        raise RequestRejected(await body.reject(e.response)) from None
    finally:
        body.release()


def _check_type(content_type: bytes) -> None:
    """Accept JSON with any parameters, in any letter case.

    Raises:
        RequestRejected: it is another type.
    """
    if content_type.partition(b";")[0].strip().lower() != b"application/json":
        raise RequestRejected(WRONG_TYPE)


class EvaluationQuery(Struct, frozen=True):
    """Parameters of a request for evaluated flags.

    Args:
        with_reasons: whether to include evaluation reasons.
        secure_mode_hash: sent by the client; empty without one.
        basis: state of the client's data (fdv2 13.2.5); empty without one.
    """

    with_reasons: bool = False
    secure_mode_hash: str = ""
    basis: str = ""

    @classmethod
    def parse(cls, query: bytes) -> EvaluationQuery:
        """Return the parameters in a query."""
        if not query:  # most have none
            return _NO_PARAMETERS
        reasons = parameter_in(query, "withReasons") == "true"
        return cls(reasons, parameter_in(query, "h"), basis_in(query))


_NO_PARAMETERS = EvaluationQuery()


def check_secure_mode_hash(spec: EnvironmentSpec, key: str, secure_mode_hash: str) -> None:
    """Check that the owner of an SDK key has signed for a context, if secure mode is on.

    Args:
        spec: of the environment.
        key: fully qualified key of the context.
        secure_mode_hash: parameter `h`.

    Raises:
        RequestRejected: secure mode is on, and the hash is wrong.
    """
    if not spec.secure_mode:
        return
    message = key.encode(errors="replace")
    given = secure_mode_hash.encode(errors="replace")
    for sdk_key in spec.sdk_keys(clock.now()):
        expected = hmac.digest(sdk_key.value.encode(), message, "sha256").hex()
        if hmac.compare_digest(expected.encode(), given):
            return
    raise RequestRejected(WRONG_HASH)
