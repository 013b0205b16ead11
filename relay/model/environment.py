"""Specification of an environment: the settings with which it is served."""

from __future__ import annotations

from dataclasses import dataclass

from relay.model.credential import Credential, EnvironmentID, MobileKey, SDKKey


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """Names, credentials and settings of one environment.

    Args:
        name: display name, unique in this relay; the key in `/status`.
        sdk_key: credential of server-side SDKs, and of this relay towards LaunchDarkly.
        mobile_key: credential of mobile SDKs.
        environment_id: credential of client-side SDKs; sent as `X-LD-EnvId`.
        project_key: key of the LaunchDarkly project, if configured.
        environment_key: key of the environment within that project, if configured.
        secure_mode: require client-side requests to carry a hash of the context.
        eval_streams: send evaluated flags instead of pings on client-side streams.
        ttl: seconds for which clients may cache polling responses; 0 disables caching.
        allowed_origins: allowed CORS origins; empty allows every origin.
        allowed_headers: allowed CORS request headers besides the standard ones.
        prefix: prefix of the keys in the database; empty for the default.
        log_level: level of this environment's log lines; None for the relay's.
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
        """The credentials that this environment has."""
        candidates = (self.sdk_key, self.mobile_key, self.environment_id)
        return tuple(credential for credential in candidates if credential is not None)
