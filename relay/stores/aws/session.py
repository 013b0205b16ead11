"""Region and credentials, found as by all of AWS's tools (datastore 4.4)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from aiobotocore.session import AioSession, get_session
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import BotoCoreError, NoCredentialsError

from relay import clock
from relay.errors import ConfigError
from relay.reasons import describe

RENEWAL = 5.0
"""Least seconds from one look for credentials to the next."""

_LOADER = "data_loader"


class AWSSession:
    """Region and credentials for one service. Make it before the event loop is busy.

    aiobotocore renews credentials that say when they expire. Those of files and variables do not:
    if a service refuses them, `renew` looks for others.

    Args:
        service: name of the service, such as `s3`; empty if no client is made.
        environ: environment variables.

    Raises:
        ConfigError: the profile that `AWS_PROFILE` names does not exist, for example.
    """

    def __init__(self, service: str, environ: Mapping[str, str]) -> None:
        self._service = service
        self._botocore: AioSession = get_session()
        self.version = object()
        """Another one after each look for credentials."""
        self._renew_at = 0.0
        """Monotonic time from which on credentials may be looked for again."""
        try:
            # botocore itself knows AWS_DEFAULT_REGION only.
            region = environ.get("AWS_REGION") or self._botocore.get_config_variable("region")
            if service:
                _load_descriptions(self._botocore, service)
        except BotoCoreError as e:
            raise ConfigError([f"AWS: {describe(e)}"]) from e
        self.region: str | None = region or None

    def __repr__(self) -> str:
        return f"<AWSSession {self._service!r} in {self.region!r}>"

    def renew(self, version: object) -> bool:
        """Look for credentials again, unless that was done a moment ago.

        Args:
            version: of the credentials that were refused.

        Returns:
            True if there may be others than those.
        """
        if version is self.version and clock.monotonic() >= self._renew_at:
            self._renew_at = clock.monotonic() + RENEWAL
            loader = self._botocore.get_component(_LOADER)  # knows the descriptions
            self._botocore = get_session()
            self._botocore.register_component(_LOADER, loader)
            self.version = object()
        return version is not self.version

    async def credentials(self) -> ReadOnlyCredentials:
        """Return credentials that are valid now.

        Raises:
            BotoCoreError: there are none, or they cannot be renewed.
        """
        credentials = await self._botocore.get_credentials()
        if credentials is None:
            raise NoCredentialsError
        return await credentials.get_frozen_credentials()

    def new_client(self, **options: Any) -> AbstractAsyncContextManager[Any]:
        """Return a client of aiobotocore, to be entered."""
        client: AbstractAsyncContextManager[Any] = self._botocore.create_client(
            self._service, **options
        )
        return client


def _load_descriptions(session: AioSession, service: str) -> None:
    """Load megabytes of descriptions, which the session then knows.

    It blocks. Otherwise the first request would, on the event loop.
    """
    loader = session.get_component(_LOADER)
    for kind in ("service-2", "endpoint-rule-set-1"):
        loader.load_service_model(service, kind)
    for name in ("endpoints", "partitions", "sdk-default-configuration", "_retry"):
        loader.load_data(name)
