"""Resolve the credential of a request to its environment (endpoints 1.2), for both paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from relay.environment import Environment
from relay.evaluation.sdkkind import SDKKind
from relay.model.credential import CredentialKind
from relay.registry import Grant, Registry
from relay.relay import Relay
from relay.telemetry.traffic import RequestLabels, RequestMetrics, client_label
from relay.web.requests import parameter_in
from relay.web.responses import (
    FDV1_INSTEAD,
    MALFORMED_CREDENTIAL,
    NO_ENVIRONMENTS,
    UNKNOWN_CREDENTIAL,
    UNKNOWN_ENVIRONMENT_ID,
    UNKNOWN_FILTER,
    PreparedResponse,
)
from relay.web.routes import CredentialSource, Route, RouteAuth

_PREFIX = "api_key "
_BLANKS = " \t"


class Access(NamedTuple):
    """Route of a request, and the permission that its credential gives."""

    route: Route
    grant: Grant[Environment]

    @property
    def environment(self) -> Environment:
        """The environment that the credential opens."""
        return self.grant.environment

    @property
    def sdk_kind(self) -> SDKKind:
        """Kind of the SDK, which decides which flags are visible."""
        if self.grant.credential.kind is CredentialKind.MOBILE_KEY:
            return SDKKind.MOBILE
        return self.route.sdk_kind

    def __repr__(self) -> str:
        return f"<Access {self.route.template} {self.environment.spec.name!r}>"

    def is_valid(self, registry: Registry[Environment]) -> bool:
        """Return whether the credential still opens the environment, after a wait."""
        credential, payload_filter = self.grant.credential, self.environment.spec.payload_filter
        return registry.grant(credential.kind, credential.value, payload_filter) is self.grant

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
        name, template = self.environment.spec.name, self.route.template
        return RequestLabels(name, template, method, self.sdk_kind.value, user_agent)


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
    payload_filter = parameter_in(query, "filter")
    find, kinds = relay.registry.grant, route.auth.accepted
    for kind in kinds:
        grant = find(kind, credential, payload_filter)
        if grant is not None:
            return _access(relay, route, grant)
    if not relay.knows_environments:
        return NO_ENVIRONMENTS  # on 401, SDKs would give up for good
    if not credential and route.auth.source is CredentialSource.HEADER:
        return MALFORMED_CREDENTIAL
    for kind in kinds if payload_filter else ():
        unfiltered = find(kind, credential)
        if unfiltered is not None:
            # LaunchDarkly gives all data (fdv2 13.1.1); SDKs would give up for good on a refusal.
            return _access(relay, route, unfiltered) if route.is_fdv2 else UNKNOWN_FILTER
    by_path = route.auth.source is CredentialSource.PATH
    return UNKNOWN_ENVIRONMENT_ID if by_path else UNKNOWN_CREDENTIAL


def _access(relay: Relay, route: Route, grant: Grant[Environment]) -> Access | PreparedResponse:
    return FDV1_INSTEAD if relay.fdv1_fallback and route.is_fdv2 else Access(route, grant)


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
