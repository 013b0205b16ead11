"""A key-value store behind HTTP as a place for documents: `GET` and `PUT` of one URL.

Few such stores know conditional writes. So the present content is asked for right before a write,
by its ETag if it has one, and the condition is sent along for those that know it.
"""

from __future__ import annotations

import contextlib
from hashlib import blake2b

from relay.aio import in_thread
from relay.errors import InvalidData, StoreUnavailable, UpstreamUnavailable
from relay.model.credential import Secret
from relay.model.reply import Reply
from relay.protocol.document import MAX_SIZE, decompressed
from relay.stores.documents import DocumentChanged
from relay.stores.documents.location import Location
from relay.upstream import Upstream

REQUEST_TIMEOUT = 60.0
"""Seconds for one request, a document of some megabytes over a slow line included."""

_OK, _NOT_MODIFIED, _REDIRECT = 200, 304, 300
_MISSING = frozenset({404, 410})
_CHANGED = frozenset({409, 412})
_UNAUTHORIZED = frozenset({401, 403})
_TOO_MANY = 429


class HttpConnection:
    """The one HTTP session for all places of a process; the last place closes it.

    Args:
        session: HTTP client.
        token: bearer token of all requests; empty for none, or for user and password of the URL.
    """

    def __init__(self, session: Upstream, token: Secret) -> None:
        self._session = session
        self._users: set[object] = set()
        self.headers = {"Authorization": f"Bearer {token.reveal()}"} if token else {}

    def __repr__(self) -> str:
        return f"<HttpConnection of {len(self._users)} places>"

    def session(self, user: object) -> Upstream:
        """Return the session for a request of a place, which calls `release` at its end."""
        self._users.add(user)
        return self._session

    async def release(self, user: object) -> None:
        """Note that a place needs the session no more; close it with the last one."""
        self._users.discard(user)
        if not self._users:
            await self._session.aclose()


class HttpPlace:
    """The document under one URL. Its tag is the digest of the plain document.

    Args:
        location: address of the document.
        connection: HTTP session.
    """

    def __init__(self, location: Location, connection: HttpConnection) -> None:
        self.url = location.masked
        self.in_gzip = location.in_gzip
        self._secret_url = location.url
        self._headers = {} if location.has_user else connection.headers
        self._connection = connection
        self._etag: tuple[str, str] = ("", "")
        """ETag of the last answer that had one, and the tag of its content."""

    def __repr__(self) -> str:
        return f"<HttpPlace {self.url}>"

    async def read(self) -> tuple[bytes, str] | None:
        """Return the content and its tag; None if there is nothing.

        Raises:
            StoreUnavailable: there is no answer, or an error.
        """
        reply = await self._get({})
        if reply.status in _MISSING:
            return None
        if reply.status != _OK:
            raise StoreUnavailable(_reason(reply.status))
        tag = await in_thread(lambda: _tag_of(reply.body), "documents")
        self._etag = (reply.headers.get("etag", ""), tag)
        return reply.body, tag

    async def is_unchanged(self, tag: str | None) -> bool:
        """Return whether the content is still the one of this tag.

        Raises:
            StoreUnavailable: there is no answer, or an error.
        """
        etag, its_tag = self._etag
        if etag and its_tag == tag:
            reply = await self._get({"If-None-Match": etag})
            if reply.status == _NOT_MODIFIED:
                return True
        found = await self.read()
        return (None if found is None else found[1]) == tag

    async def write(self, content: bytes, tag: str | None) -> str:
        """Replace the content; return the new tag.

        Raises:
            DocumentChanged: somebody else has replaced it.
            StoreUnavailable: it cannot be written.
        """
        if not await self.is_unchanged(tag):
            raise DocumentChanged
        headers = self._headers | self._condition(tag)
        headers["Content-Type"] = "application/gzip" if self.in_gzip else "application/json"
        try:
            reply = await self._connection.session(self).put(
                self._secret_url, content, headers=headers, within=REQUEST_TIMEOUT
            )
        except UpstreamUnavailable as e:
            raise StoreUnavailable(e.reason) from e
        if reply.status in _CHANGED:
            raise DocumentChanged
        if not _OK <= reply.status < _REDIRECT:
            raise StoreUnavailable(_reason(reply.status))
        new_tag = await in_thread(lambda: _tag_of(content), "documents")
        self._etag = (reply.headers.get("etag", ""), new_tag)
        return new_tag

    def _condition(self, tag: str | None) -> dict[str, str]:
        """Return the header under which a write is right; none if the content has no ETag."""
        if tag is None:
            return {"If-None-Match": "*"}
        etag, its_tag = self._etag
        if etag and not etag.startswith("W/") and its_tag == tag:  # weak ones never match
            return {"If-Match": etag}
        return {}

    async def aclose(self) -> None:
        """Close the session if this is the last place."""
        await self._connection.release(self)

    async def _get(self, headers: dict[str, str]) -> Reply:
        try:
            return await self._connection.session(self).fetch(
                self._secret_url,
                headers=self._headers | headers,
                within=REQUEST_TIMEOUT,
                max_body=MAX_SIZE,
            )
        except UpstreamUnavailable as e:
            raise StoreUnavailable(e.reason) from e


def _tag_of(content: bytes) -> str:
    """Return the tag of a content; some servers decompress what they have got in gzip."""
    with contextlib.suppress(InvalidData):  # whatever it is, it has a digest
        content = decompressed(content)
    return blake2b(content, digest_size=16).hexdigest()


def _reason(status: int) -> str:
    if status in _UNAUTHORIZED:
        return f"HTTP status {status}: the token is missing, wrong, or not permitted to do this"
    if status == _TOO_MANY:
        return f"HTTP status {status}: too many requests"
    return f"HTTP status {status}"
