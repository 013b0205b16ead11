"""Specification of an environment: the settings with which it is served."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from relay.model.credential import Credential, EnvironmentID, MobileKey, SDKKey

DEFAULT_PREFIX = "launchdarkly"
"""Prefix of the keys in the database where none is configured: that of SDKs in daemon mode."""


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """Names, credentials and settings of one environment.

    Args:
        name: unique in this relay, and stays while LaunchDarkly renames the environment; the key in
            `/status`.
        sdk_key: credential of server-side SDKs, and of this relay towards LaunchDarkly.
        mobile_key: credential of mobile SDKs.
        environment_id: credential of client-side SDKs; sent as `X-LD-EnvId`.
        project_key: key of the LaunchDarkly project, if known.
        environment_key: key of the environment within that project, if known.
        secure_mode: require client-side requests to carry a hash of the context.
        eval_streams: send evaluated flags instead of pings on client-side streams.
        ttl: seconds for which clients may cache polling responses; 0 disables caching.
        allowed_origins: allowed CORS origins; empty allows every origin.
        allowed_headers: allowed CORS request headers besides the standard ones.
        prefix: prefix of the keys in the database; empty for the default.
        table: table of the database, where it has several; empty for none.
        log_level: level of this environment's log lines; None for the relay's.
        payload_filter: key of the payload filter whose part of the data this is; empty for all.
        project_name: display name of the project; empty for an environment of the configuration.
        environment_name: display name of the environment within that project.
        expiries: further credentials, and limits of those above: each with the Unix time at which
            it expires, `math.inf` for never.
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
    table: str = ""
    log_level: str | None = None
    payload_filter: str = ""
    project_name: str = ""
    environment_name: str = ""
    expiries: tuple[tuple[Credential, float], ...] = ()

    @property
    def title(self) -> str:
        """The environment for log lines: the names that LaunchDarkly shows, else its own."""
        names = f"{self.project_name} {self.environment_name}".strip()
        of_filter = f" ({self.payload_filter})" if self.payload_filter else ""
        return names + of_filter if names else self.name

    @property
    def lineage(self) -> str:
        """Text that identifies the environment and its filter, on all replicas; it is a secret."""
        return f"{(self.environment_id or self.sdk_key).value}\0{self.payload_filter}"

    @property
    def credentials(self) -> Mapping[Credential, float]:
        """All credentials, each with the Unix time at which it expires."""
        own = (self.sdk_key, self.mobile_key, self.environment_id)
        return {**{each: math.inf for each in own if each is not None}, **dict(self.expiries)}

    def sdk_keys(self, now: float) -> tuple[SDKKey, ...]:
        """Return the SDK keys that have not expired: the primary one first.

        Args:
            now: Unix time.
        """
        expiring = (key for key, at in self.expiries if isinstance(key, SDKKey) and at > now)
        return tuple(dict.fromkeys((self.sdk_key, *expiring)))

    def with_credential(self, credential: Credential, expires_at: float = math.inf) -> Self:
        """Return the spec with a further credential, or with a new expiry of one that it has.

        Args:
            credential: of any kind; an environment may have several of each.
            expires_at: Unix time.
        """
        return replace(
            self, expiries=tuple({**dict(self.expiries), credential: expires_at}.items())
        )

    def without_credential(self, credential: Credential) -> Self:
        """Return the spec without a credential.

        Raises:
            ValueError: it is `sdk_key`, which can be replaced only.
        """
        if credential == self.sdk_key:
            raise ValueError(f"an environment needs an SDK key, so {credential} cannot be removed")
        return replace(
            self,
            mobile_key=None if credential == self.mobile_key else self.mobile_key,
            environment_id=None if credential == self.environment_id else self.environment_id,
            expiries=tuple(pair for pair in self.expiries if pair[0] != credential),
        )
