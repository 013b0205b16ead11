"""Connections to DynamoDB: endpoint, region, credentials, and the client that all stores share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession, get_session
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError

from relay import clock
from relay.errors import ConfigError, StoreUnavailable
from relay.reasons import describe, shorten
from relay.stores.awssession import load_descriptions

CONNECT_TIMEOUT = 5.0
"""Seconds for a connection to the service."""

READ_TIMEOUT = 10.0
"""Seconds of silence of the service."""

MAX_CONCURRENT = 32
"""Requests at a time of all stores, and so connections."""

RENEWAL = 5.0
"""Least seconds from one look for credentials to the next, as each makes a client anew."""

_LOCAL_REGION = "us-east-1"
"""Region to sign with when a URL is configured and no region: a local server takes any."""

_EXPIRED = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "UnrecognizedClientException", "RequestExpired"}
)
"""Error codes after which credentials are looked for again: files and variables may have others."""


class _Client:
    """A client of aiobotocore, closed when it is replaced and nobody uses it any more."""

    def __init__(self, client: Any, stack: contextlib.AsyncExitStack) -> None:
        self.client = client
        self.users = 0
        self.replaced = False
        self._stack = stack

    async def close_if_unused(self) -> None:
        if self.replaced and not self.users:
            await self._stack.aclose()


class DynamoDBConnection:
    """The one client for all stores of a process. Make it before the event loop is busy.

    The first request opens it, in its event loop, and the last lease closes it. Region, credentials
    and endpoint are found as by all of AWS's tools (datastore 4.4).

    Args:
        url: URL of the service; empty for that of AWS's variables, or of the region.
        environ: environment variables.

    Raises:
        ConfigError: the profile that `AWS_PROFILE` names does not exist, for example.
    """

    def __init__(self, url: str, environ: Mapping[str, str]) -> None:
        self.server = url
        self._session: AioSession = get_session()
        try:
            # botocore itself knows AWS_DEFAULT_REGION only.
            region = environ.get("AWS_REGION") or self._session.get_config_variable("region")
        except BotoCoreError as e:
            raise ConfigError([f"[DynamoDB]: {describe(e)}"]) from e
        self._region: str | None = region or (_LOCAL_REGION if url else None)
        load_descriptions(self._session, "dynamodb")
        self._config = AioConfig(
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            max_pool_connections=MAX_CONCURRENT,
            retries={"total_max_attempts": 1},  # the store tries again, with growing delays
        )
        self._leases: set[Lease] = set()
        self._opening = asyncio.Lock()
        self._places = asyncio.Semaphore(MAX_CONCURRENT)
        self._current: _Client | None = None
        self._renew_at = 0.0
        """Monotonic time from which on credentials may be looked for again."""

    def __repr__(self) -> str:
        return f"<DynamoDBConnection {self.server!r} of {len(self._leases)} leases>"

    def lease(self) -> Lease:
        """Return a share in the client, for one store."""
        return Lease(self)

    async def release(self, lease: Lease) -> None:
        """Note that a lease is over; close the client with the last one."""
        self._leases.discard(lease)
        if not self._leases:
            await self._replace(self._current)

    @contextlib.asynccontextmanager
    async def client(self, lease: Lease) -> AsyncIterator[Any]:
        """Lend the client for one request; wait while too many are under way."""
        self._leases.add(lease)
        async with self._places:
            lent = await self._opened()
            lent.users += 1
            expired = False
            try:
                yield lent.client
            except ClientError as e:
                expired = e.response.get("Error", {}).get("Code") in _EXPIRED
                raise
            finally:
                lent.users -= 1
                if expired and lent is self._current and clock.monotonic() >= self._renew_at:
                    self._renew_at = clock.monotonic() + RENEWAL
                    self._session = get_session()
                    await self._replace(lent)
                else:
                    await lent.close_if_unused()

    async def _replace(self, client: _Client | None) -> None:
        if client is None:
            return
        if client is self._current:
            self._current = None
        client.replaced = True
        await client.close_if_unused()

    async def _opened(self) -> _Client:
        async with self._opening:
            if self._current is None:
                stack = contextlib.AsyncExitStack()
                await asyncio.to_thread(load_descriptions, self._session, "dynamodb")
                opening = self._session.create_client(
                    "dynamodb",
                    region_name=self._region,
                    endpoint_url=self.server or None,
                    config=self._config,
                )
                self._current = _Client(await stack.enter_async_context(opening), stack)
            return self._current


class Lease:
    """Share of one store in the connection.

    Args:
        connection: connection that all share.
    """

    def __init__(self, connection: DynamoDBConnection) -> None:
        self._connection = connection

    @property
    def server(self) -> str:
        """URL of the service as configured; empty for AWS's own."""
        return self._connection.server

    def client(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """Lend the client of aiobotocore for one request."""
        return self._connection.client(self)

    async def aclose(self) -> None:
        """End the share; the last one closes all connections."""
        await self._connection.release(self)


def unavailable(error: Exception, table: str) -> StoreUnavailable:
    """Return the error for a failed request, with what to do about it where that is known."""
    if isinstance(error, NoRegionError):
        return StoreUnavailable("there is no region; AWS_REGION or DYNAMODB_URL names it")
    if isinstance(error, NoCredentialsError):
        return StoreUnavailable("there are no AWS credentials, neither in variables nor elsewhere")
    if not isinstance(error, ClientError):
        return StoreUnavailable(describe(error))
    code = error_code(error)
    if code == "ResourceNotFoundException":
        return StoreUnavailable(
            f'there is no table "{table}" in this region and account; Relay never creates it, and'
            ' it needs the partition key "namespace" and the sort key "key", both strings'
        )
    message = shorten(error.response.get("Error", {}).get("Message", ""))
    return StoreUnavailable(f"the service answers {code}: {message}".rstrip(": "))


def error_code(error: ClientError) -> str:
    """Return the name of an error that the service has sent."""
    return str(error.response.get("Error", {}).get("Code", "an error"))
