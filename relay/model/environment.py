"""The description of an environment: what the environments loop is told to serve."""

from __future__ import annotations

from dataclasses import dataclass

from relay.model.credential import Credential, EnvironmentID, MobileKey, SDKKey


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """One environment: its names, what opens it, and how it is served.

    Args:
        name: the display name, unique in this relay; the key in `/status`.
        sdk_key: opens it for server-side SDKs, and opens upstream for us.
        mobile_key: opens it for mobile SDKs.
        environment_id: opens it for client-side SDKs; sent as `X-LD-EnvId`.
        project_key: the LaunchDarkly project, where the configuration names it.
        environment_key: its key within that project, where the configuration names it.
        secure_mode: client-side requests must carry a hash of the context.
        eval_streams: client-side streams carry evaluated flags instead of pings.
        ttl: seconds for which polled answers may be cached; 0 for none.
        allowed_origins: CORS origins; none means every origin.
        allowed_headers: CORS request headers beside the standard ones.
        prefix: of the keys in the database; empty for the default.
        log_level: of this environment's lines; None for the relay's.
    """

    name: str
    sdk_key: SDKKey
    mobile_key: MobileKey | None = None
    environment_id: EnvironmentID | None = None
    project_key: str = ""
    environment_key: str = ""
    secure_mode: bool = False
    eval_streams: bool = False
    ttl: float = 0.0
    allowed_origins: tuple[str, ...] = ()
    allowed_headers: tuple[str, ...] = ()
    prefix: str = ""
    log_level: str | None = None

    @property
    def credentials(self) -> tuple[Credential, ...]:
        """Everything that opens this environment."""
        given = (self.sdk_key, self.mobile_key, self.environment_id)
        return tuple(credential for credential in given if credential is not None)
