"""Resolve the credential of a request to its environment (endpoints 1.2)."""

from __future__ import annotations

from collections.abc import Mapping

from relay.environment import Environment
from relay.relay import Relay
from relay.web.responses import (
    MALFORMED_CREDENTIAL,
    UNKNOWN_CREDENTIAL,
    UNKNOWN_ENVIRONMENT_ID,
    UNKNOWN_FILTER,
    PreparedResponse,
)

_PREFIX = b"api_key "
_BLANKS = b" \t"


def for_sdk_key(
    relay: Relay, authorization: bytes, payload_filter: str
) -> Environment | PreparedResponse:
    """Return the environment of the SDK key in an `Authorization` header, or the refusal."""
    return _by_header(relay.by_sdk_key, authorization, payload_filter)


def for_mobile_key(
    relay: Relay, authorization: bytes, payload_filter: str
) -> Environment | PreparedResponse:
    """Return the environment of the mobile key in an `Authorization` header, or the refusal.

    SDK keys and mobile keys are never interchangeable.
    """
    return _by_header(relay.by_mobile_key, authorization, payload_filter)


def for_environment_id(
    relay: Relay, environment_id: str, payload_filter: str
) -> Environment | PreparedResponse:
    """Return the environment of the client-side ID in a path, or the refusal."""
    environment = relay.by_environment_id.get(environment_id)
    return _filtered(environment, payload_filter) or UNKNOWN_ENVIRONMENT_ID


def for_client(
    relay: Relay, credential: bytes, payload_filter: str
) -> Environment | PreparedResponse:
    """Return the environment of a mobile key or client-side ID, or the refusal.

    FDv2 client-side SDKs authenticate this way (newer-versions 10.5).
    """
    value = credential.strip(_BLANKS).decode("latin-1")
    environment = relay.by_mobile_key.get(value) or relay.by_environment_id.get(value)
    return _filtered(environment, payload_filter) or UNKNOWN_CREDENTIAL


def by_plain_key(
    environments: Mapping[str, Environment], headers: Mapping[bytes, bytes]
) -> Environment | None:
    """Return the environment of a plain `Authorization` header, for the fast path.

    None if the key is unknown, missing or in an unusual form: the application resolves it or
    refuses.

    Args:
        environments: by SDK key or by mobile key.
        headers: of the request, each once.
    """
    return environments.get(plain_key(headers))


def plain_key(headers: Mapping[bytes, bytes]) -> str:
    """Return the key in a plain `Authorization` header; empty without one."""
    return headers.get(b"authorization", b"").removeprefix(_PREFIX).decode("latin-1")


def _by_header(
    environments: Mapping[str, Environment], authorization: bytes, payload_filter: str
) -> Environment | PreparedResponse:
    key = authorization.strip(_BLANKS)
    if key.startswith(_PREFIX):
        key = key.removeprefix(_PREFIX).strip(_BLANKS)
    if not key or b" " in key:
        return MALFORMED_CREDENTIAL
    environment = environments.get(key.decode("latin-1"))
    return _filtered(environment, payload_filter) or UNKNOWN_CREDENTIAL


def _filtered(
    environment: Environment | None, payload_filter: str
) -> Environment | PreparedResponse | None:
    if environment is not None and payload_filter:
        return UNKNOWN_FILTER
    return environment
