"""One client of a service for all stores of a process, made anew when its credentials expire."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiobotocore.config import AioConfig
from botocore.exceptions import ClientError, NoCredentialsError, NoRegionError

from relay.reasons import describe, shorten
from relay.stores.aws.session import AWSSession

MAX_CONCURRENT = 32
"""Requests at a time of all stores, and so connections."""

CONNECT_TIMEOUT = 5.0
"""Seconds for a connection to the service."""

_LOCAL_REGION = "us-east-1"
"""Region to sign with when a URL is configured and no region: a local server takes any."""

_EXPIRED = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestExpired",
        "UnrecognizedClientException",
        "400",  # of S3, where the answer has no body; 403 may also be for want of a right
        "403",
    }
)
"""Error codes after which credentials are looked for again: files and variables may have others."""


class _Client:
    """A client of aiobotocore, closed when it is replaced and nobody uses it any more."""

    def __init__(self, client: Any, version: object, stack: contextlib.AsyncExitStack) -> None:
        self.client = client
        self.version = version
        """Version of its credentials."""
        self.users = 0
        self.replaced = False
        self._stack = stack

    async def close_if_unused(self) -> None:
        if self.replaced and not self.users:
            await self._stack.aclose()


class AWSConnection:
    """The one client of a service. Make it before the event loop is busy.

    The first request opens it, in its event loop, and the last share closes it.

    Args:
        service: name of the service, such as `s3`.
        environ: environment variables.
        config: options of the client, beside those for connections.
        url: URL of the service; empty for that of AWS's variables, or of the region.

    Raises:
        ConfigError: the profile that `AWS_PROFILE` names does not exist, for example.
    """

    def __init__(
        self, service: str, environ: Mapping[str, str], config: AioConfig, url: str = ""
    ) -> None:
        self.server = url
        self._session = AWSSession(service, environ)
        self._options = {
            "region_name": self._session.region or (_LOCAL_REGION if url else None),
            "endpoint_url": url or None,
            "config": AioConfig(
                connect_timeout=CONNECT_TIMEOUT,
                max_pool_connections=MAX_CONCURRENT,
                retries={"total_max_attempts": 1},  # stores try again, with growing delays
            ).merge(config),
        }
        self._service = service
        self._shares: set[Share] = set()
        self._opening = asyncio.Lock()
        self._places = asyncio.Semaphore(MAX_CONCURRENT)
        self._current: _Client | None = None

    def __repr__(self) -> str:
        return f"<AWSConnection to {self.server or self._service!r} of {len(self._shares)} shares>"

    def share(self) -> Share:
        """Return a share in the client, for one store."""
        return Share(self)

    async def release(self, share: Share) -> None:
        """Note that a share has ended; close the client with the last one."""
        self._shares.discard(share)
        if not self._shares:
            await self._replace(self._current)

    @contextlib.asynccontextmanager
    async def client(self, share: Share) -> AsyncIterator[Any]:
        """Lend the client for one request; wait while too many are under way."""
        self._shares.add(share)
        async with self._places:
            lent = await self._opened()
            lent.users += 1
            expired = False
            try:
                yield lent.client
            except ClientError as e:
                expired = error_code(e) in _EXPIRED
                raise
            finally:
                lent.users -= 1
                if expired and lent is self._current and self._session.renew(lent.version):
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
                stack, version = contextlib.AsyncExitStack(), self._session.version
                opening = self._session.new_client(**self._options)
                client = await stack.enter_async_context(opening)
                self._current = _Client(client, version, stack)
            return self._current


class Share:
    """Share of one store in the connection.

    Args:
        connection: connection that all share.
    """

    def __init__(self, connection: AWSConnection) -> None:
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


def reason_of(error: Exception) -> str:
    """Return the reason of a failed request, with what to do about it where that is known."""
    if isinstance(error, NoRegionError):
        return "there is no region; AWS_REGION names it"
    if isinstance(error, NoCredentialsError):
        return "there are no AWS credentials, neither in variables nor elsewhere"
    if not isinstance(error, ClientError):
        return describe(error)
    message = shorten(error.response.get("Error", {}).get("Message", ""))
    return f"the service answers {error_code(error)}: {message}".rstrip(": ")


def error_code(error: ClientError) -> str:
    """Return the name of an error that the service has sent."""
    return str(error.response.get("Error", {}).get("Code", "an error"))
