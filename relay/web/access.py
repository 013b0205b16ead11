"""Resolve the credential of a request to its environment (endpoints 1.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from relay.environment import Environment
from relay.model.credential import CredentialKind
from relay.registry import Grant
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
) -> Grant[Environment] | PreparedResponse:
    """Return the environment of the SDK key in an `Authorization` header, or the refusal."""
    return _by_header(relay, CredentialKind.SDK_KEY, authorization, payload_filter)


def for_mobile_key(
    relay: Relay, authorization: bytes, payload_filter: str
) -> Grant[Environment] | PreparedResponse:
    """Return the environment of the mobile key in an `Authorization` header, or the refusal.

    SDK keys and mobile keys are never interchangeable.
    """
    return _by_header(relay, CredentialKind.MOBILE_KEY, authorization, payload_filter)


def for_environment_id(
    relay: Relay, environment_id: str, payload_filter: str
) -> Grant[Environment] | PreparedResponse:
    """Return the environment of the client-side ID in a path, or the refusal."""
    kinds = (CredentialKind.ENVIRONMENT_ID,)
    return _grant(relay, kinds, environment_id, payload_filter) or UNKNOWN_ENVIRONMENT_ID


def for_client(
    relay: Relay, credential: bytes, payload_filter: str
) -> Grant[Environment] | PreparedResponse:
    """Return the environment of a mobile key or client-side ID, or the refusal.

    FDv2 client-side SDKs authenticate this way (newer-versions 10.5).
    """
    value = credential.strip(_BLANKS).decode("latin-1")
    kinds = (CredentialKind.MOBILE_KEY, CredentialKind.ENVIRONMENT_ID)
    return _grant(relay, kinds, value, payload_filter) or UNKNOWN_CREDENTIAL


def by_plain_key(
    relay: Relay, kind: CredentialKind, headers: Mapping[bytes, bytes]
) -> Grant[Environment] | None:
    """Return the environment of a plain `Authorization` header, for the fast path.

    None if the key is unknown, missing or in an unusual form: the application resolves it or
    refuses.

    Args:
        relay: provides the environments.
        kind: of the credential.
        headers: of the request, each once.
    """
    return relay.registry.grant(kind, plain_key(headers))


def plain_key(headers: Mapping[bytes, bytes]) -> str:
    """Return the key in a plain `Authorization` header; empty without one."""
    return headers.get(b"authorization", b"").removeprefix(_PREFIX).decode("latin-1")


def _by_header(
    relay: Relay, kind: CredentialKind, authorization: bytes, payload_filter: str
) -> Grant[Environment] | PreparedResponse:
    key = authorization.strip(_BLANKS)
    if key.startswith(_PREFIX):
        key = key.removeprefix(_PREFIX).strip(_BLANKS)
    if not key or b" " in key:
        return MALFORMED_CREDENTIAL
    return _grant(relay, (kind,), key.decode("latin-1"), payload_filter) or UNKNOWN_CREDENTIAL


def _grant(
    relay: Relay, kinds: Iterable[CredentialKind], value: str, payload_filter: str
) -> Grant[Environment] | PreparedResponse | None:
    """Return what a credential of one of these kinds opens; None for an unknown credential."""
    find = relay.registry.grant
    for kind in kinds:
        if grant := find(kind, value, payload_filter):
            return grant
        if payload_filter and find(kind, value):
            return UNKNOWN_FILTER
    return None
