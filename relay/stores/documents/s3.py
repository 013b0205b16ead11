"""A bucket of S3, or of a service that speaks its protocol, as a place for documents.

Writes are conditional on the ETag that was read (`If-Match`, `If-None-Match`), so two relays cannot
overwrite each other's documents. For services without conditions the ETag is compared right before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiobotocore.config import AioConfig
from botocore.exceptions import BotoCoreError, ClientError

from relay.errors import StoreUnavailable
from relay.protocol.document import MAX_SIZE
from relay.reasons import shorten
from relay.stores.aws.connection import AWSConnection, Share, error_code, reason_of
from relay.stores.documents import DocumentChanged
from relay.stores.documents.location import Location

READ_TIMEOUT = 20.0
"""Seconds of silence of the service."""

REQUEST_TIMEOUT = 60.0
"""Seconds for one request, a document of some megabytes over a slow line included."""

_CHANGED = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})
"""Error codes of a condition that does not hold, or of two writers at the same moment."""

_MISSING = frozenset({"NoSuchKey", "404"})
_NOT_IMPLEMENTED = 501
_FORBIDDEN = 403


class S3Connection:
    """The connection that all places share. Make it before the event loop is busy.

    Args:
        environ: environment variables.
        proxy: URL of the proxy for all requests; empty for that of the environment variables.

    Raises:
        ConfigError: the profile that `AWS_PROFILE` names does not exist, for example.
    """

    def __init__(self, environ: Mapping[str, str], proxy: str = "") -> None:
        config = AioConfig(
            read_timeout=READ_TIMEOUT,
            proxies={"http": proxy, "https": proxy} if proxy else None,
            # Checksums beside TLS's own are unknown to many services.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self._connection = AWSConnection("s3", environ, config)
        self.has_conditions = True
        """False once the service has said that it knows no conditional writes."""

    def __repr__(self) -> str:
        return f"<S3Connection {self._connection!r}>"

    def share(self) -> Share:
        """Return a share in the client, for one place."""
        return self._connection.share()


class S3Place:
    """An object with a document. Its tag is its ETag.

    Args:
        location: address of the object.
        connection: client of the service.
    """

    def __init__(self, location: Location, connection: S3Connection) -> None:
        self.url = location.masked
        self.in_gzip = location.in_gzip
        self._object = {"Bucket": location.bucket, "Key": location.path}
        self._connection = connection
        self._share = connection.share()

    def __repr__(self) -> str:
        return f"<S3Place {self.url}>"

    async def read(self) -> tuple[bytes, str] | None:
        """Return the content and its tag; None if there is no object.

        Raises:
            StoreUnavailable: the object cannot be read, or is too long.
        """
        async with self._client() as client:
            try:
                response = await client.get_object(**self._object)
            except ClientError as e:
                if error_code(e) in _MISSING:
                    return None
                raise
            if response["ContentLength"] > MAX_SIZE:
                raise StoreUnavailable(f"the object is longer than {MAX_SIZE} bytes")
            async with response["Body"] as body:
                return await body.read(), response["ETag"]

    async def is_unchanged(self, tag: str | None) -> bool:
        """Return whether the object still has this ETag.

        Raises:
            StoreUnavailable: the service does not answer.
        """
        async with self._client() as client:
            return await self._tag(client) == tag

    async def write(self, content: bytes, tag: str | None) -> str:
        """Replace the object; return the new tag.

        Raises:
            DocumentChanged: somebody else has replaced it.
            StoreUnavailable: it cannot be written.
        """
        if self._connection.has_conditions:
            condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
            try:
                return await self._put(content, condition)
            except StoreUnavailable as e:
                if not _is_unknown_to_service(e.__cause__):
                    raise
                self._connection.has_conditions = False
        if not await self.is_unchanged(tag):
            raise DocumentChanged
        return await self._put(content, {})

    async def _put(self, content: bytes, condition: dict[str, str]) -> str:
        encoding = {"ContentEncoding": "gzip"} if self.in_gzip else {}
        async with self._client() as client:
            try:
                response = await client.put_object(
                    **self._object,
                    **encoding,
                    **condition,
                    Body=content,
                    ContentType="application/json",
                    CacheControl="no-cache",  # readers ask by ETag, and get 304 while it stands
                )
            except ClientError as e:
                if error_code(e) in _MISSING:
                    raise DocumentChanged from e  # it was removed
                raise
        return str(response["ETag"])

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        """Lend the client for one request, whose errors are translated.

        Raises:
            StoreUnavailable: there is no answer, or an error.
            DocumentChanged: a condition of the request does not hold.
        """
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT), self._share.client() as client:
                yield client
        except ClientError as e:
            if error_code(e) in _CHANGED:
                raise DocumentChanged from e
            raise StoreUnavailable(_reason(e)) from e
        except (BotoCoreError, OSError, TimeoutError) as e:
            raise StoreUnavailable(reason_of(e)) from e

    async def _tag(self, client: Any) -> str | None:
        try:
            response = await client.head_object(**self._object)
        except ClientError as e:
            if error_code(e) in _MISSING:
                return None
            raise
        return str(response["ETag"])

    async def aclose(self) -> None:
        """Close the client if this is the last place."""
        await self._share.aclose()


def _is_unknown_to_service(error: BaseException | None) -> bool:
    return isinstance(error, ClientError) and _status(error) == _NOT_IMPLEMENTED


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _reason(error: ClientError) -> str:
    code, status = error.response["Error"].get("Code", ""), _status(error)
    text = shorten(error.response["Error"].get("Message", ""))
    reason = f"the service answers {status} ({code}" + (f": {text})" if text != code else ")")
    if status == _FORBIDDEN:
        reason += "; s3:GetObject and s3:PutObject are needed, and s3:ListBucket to see that an"
        reason += " object does not exist yet"
    return reason
