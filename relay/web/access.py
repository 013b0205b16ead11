"""Resolve the credential of a request to its environment (endpoints 1.2), for both paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from relay.environment import Environment
from relay.evaluation.sdkkind import SDKKind
from relay.relay import Relay
from relay.telemetry.traffic import RequestLabels, RequestMetrics, client_label
from relay.web.requests import parameter_in
from relay.web.responses import (
    MALFORMED_CREDENTIAL,
    UNKNOWN_CREDENTIAL,
    UNKNOWN_ENVIRONMENT_ID,
    UNKNOWN_FILTER,
    PreparedResponse,
)
from relay.web.routes import CredentialSource, Route, RouteAuth

_PREFIX = "api_key "
_BLANKS = " \t"


class Access(NamedTuple):
    """Route of a request, and the environment that its credential opens."""

    route: Route
    environment: Environment
    credential: str

    def __repr__(self) -> str:
        return f"<Access {self.route.template} {self.environment.spec.name!r}>"

    def labels(
        self, traffic: RequestMetrics, method: str, headers: Mapping[bytes, bytes]
    ) -> RequestLabels:
        """Return the labels of the metrics that count the request.

        Args:
            traffic: bounds the number of user agents.
            method: of the request.
            headers: of the request, by name in lower case.
        """
        user_agent = client_label(traffic, headers)
        name, route = self.environment.spec.name, self.route
        return RequestLabels(name, route.template, method, route.sdk_kind.value, user_agent)


def resolve(
    relay: Relay,
    route: Route,
    headers: Mapping[bytes, bytes],
    environment_id: str = "",
    query: bytes = b"",
) -> Access | PreparedResponse:
    """Return the access that a request's credential gives, or the refusal.

    SDK keys and mobile keys are never interchangeable.

    Args:
        relay: provides the environments.
        route: of the request.
        headers: of the request, by name in lower case, each with its first value.
        environment_id: client-side ID in the path; empty without one.
        query: of the request.
    """
    credential = _credential(route.auth, headers, environment_id, query)
    if not credential and route.auth.source is CredentialSource.HEADER:
        return MALFORMED_CREDENTIAL
    kinds = route.auth.accepted
    payload_filter = parameter_in(query, "filter")
    for kind in kinds:
        environment = find(relay, kind, credential, payload_filter)
        if environment is not None:
            return Access(route, environment, credential)
    if payload_filter and any(find(relay, kind, credential) for kind in kinds):
        return UNKNOWN_FILTER
    by_path = route.auth.source is CredentialSource.PATH
    return UNKNOWN_ENVIRONMENT_ID if by_path else UNKNOWN_CREDENTIAL


def find(
    relay: Relay, kind: SDKKind, credential: str, payload_filter: str = ""
) -> Environment | None:
    """Return the environment that a credential opens with a payload filter; None if there is none.

    Args:
        relay: provides the environments.
        kind: of the SDKs that have such credentials.
        credential: as sent.
        payload_filter: key of the filter; empty for all data.
    """
    if payload_filter:
        return None  # no environment has filters yet
    if kind is SDKKind.SERVER:
        return relay.by_sdk_key.get(credential)
    by_credential = relay.by_mobile_key if kind is SDKKind.MOBILE else relay.by_environment_id
    return by_credential.get(credential)


def _credential(
    auth: RouteAuth, headers: Mapping[bytes, bytes], environment_id: str, query: bytes
) -> str:
    """Return the credential of a request; empty if it is missing or malformed."""
    if auth.source is CredentialSource.PATH:
        return environment_id
    authorization = headers.get(b"authorization", b"").decode("latin-1").strip(_BLANKS)
    if auth.source is CredentialSource.QUERY:
        return parameter_in(query, "auth").strip(_BLANKS) or authorization
    if authorization.startswith(_PREFIX):
        authorization = authorization.removeprefix(_PREFIX).strip(_BLANKS)
    return "" if " " in authorization else authorization
