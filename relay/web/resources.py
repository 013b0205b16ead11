"""Resources: a body with its ETag, in every variant that clients may get."""

from __future__ import annotations

import asyncio
import re
from email.utils import formatdate
from functools import cached_property, lru_cache

from isal import igzip

from relay import clock
from relay.environment import Environment
from relay.web.responses import Headers, PreparedResponse

MIN_COMPRESSED = 1024
"""Bytes of a body worth compressing; a smaller one fits in one packet anyway."""

MAX_COMPRESSED_AT_ONCE = 256 * 1024
"""Bytes that are compressed on the event loop, in about 1 ms; more are compressed in a thread."""

COMPRESSION_LEVEL = 1
"""isal's level, of 0 to 3: output nearly as small as with 3, and fast."""

_QUOTED = re.compile(rb'(?:W/)?"([^"]*)"')


class Resource:
    """One body with its ETag, in all its variants.

    Args:
        pieces: of the body, in JSON, to be concatenated.
        etag: as sent; empty for what no cache may keep.
        headers: of all variants, besides the usual ones.
    """

    def __init__(self, pieces: tuple[bytes, ...], etag: bytes, headers: Headers) -> None:
        self.pieces = pieces
        self.size = sum(map(len, pieces))
        self.etag = etag
        self.compressible = self.size >= MIN_COMPRESSED
        self._headers = headers
        self.compressed: PreparedResponse | None = None
        self._compression: asyncio.Future[PreparedResponse] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.etag.decode('latin-1')} [{self.size} bytes]>"

    @property
    def _shared(self) -> Headers:
        vary: Headers = ((b"vary", b"Accept-Encoding"),) if self.compressible else ()
        cached = (b"etag", self.etag) if self.etag else (b"cache-control", b"no-store")
        return (cached, *self._headers, *vary)

    @property
    def _typed(self) -> Headers:
        return ((b"content-type", b"application/json"), *self._shared)

    @property
    def body(self) -> bytes:
        """The body in one piece."""
        return b"".join(self.pieces)

    @property
    def plain(self) -> PreparedResponse:
        """The uncompressed variant."""
        return PreparedResponse(200, self._typed, self.body)

    @cached_property
    def unchanged(self) -> PreparedResponse:
        """The 304 for a client that has this already."""
        return PreparedResponse(304, self._shared)

    @property
    def to_compress(self) -> int:
        """Number of bytes that `compress` has yet to compress."""
        return self.size

    def matches(self, if_none_match: bytes) -> bool:
        """Return whether an `If-None-Match` header names this."""
        return bool(self.etag) and is_known(self.etag, if_none_match)

    def compress(self) -> PreparedResponse:
        """Return the gzip variant. May run in a thread."""
        if self.compressed is None:
            # Without a time, all replicas produce the same bytes.
            body = igzip.compress(self.body, COMPRESSION_LEVEL, mtime=0)
            self.compressed = self.compressed_response(body)
        return self.compressed

    def compressed_response(self, body: bytes) -> PreparedResponse:
        """Return the variant with a compressed body."""
        return PreparedResponse(200, (*self._typed, (b"content-encoding", b"gzip")), body)

    async def compress_in_thread(self) -> PreparedResponse:
        """Compress in a thread; concurrent callers share one compression."""
        if self._compression is None:
            self._compression = asyncio.ensure_future(asyncio.to_thread(self.compress))
        # One caller may be cancelled while others wait for the same compression.
        return await asyncio.shield(self._compression)

    def variant(self, if_none_match: bytes, accept_encoding: bytes) -> PreparedResponse | None:
        """Return the variant for these headers; None if it must be compressed in a thread first."""
        if if_none_match and self.matches(if_none_match):
            return self.unchanged
        if not (self.compressible and accepts_gzip(accept_encoding)):
            return self.plain
        if self.to_compress <= MAX_COMPRESSED_AT_ONCE:
            return self.compress()
        return self.compressed


def is_known(etag: bytes, if_none_match: bytes) -> bool:
    """Return whether `If-None-Match` names an ETag: verbatim, quoted, with `W/`, in a list, or `*`.

    See endpoints 1.6.

    Args:
        etag: as sent.
        if_none_match: the request header; empty without one.
    """
    if if_none_match in (etag, b"*"):
        return True
    return etag.removeprefix(b"W/").strip(b'"') in _QUOTED.findall(if_none_match)


@lru_cache(maxsize=256)
def accepts_gzip(accept_encoding: bytes) -> bool:
    """Return whether gzip is acceptable, and weighted at least as high as `identity`."""
    weights: dict[bytes, float] = {}
    for part in accept_encoding.lower().split(b","):
        name, _, parameter = part.partition(b";")
        weights[name.strip()] = _weight(parameter.replace(b" ", b""))
    gzip = weights.get(b"gzip", weights.get(b"*", 0.0))
    return gzip > 0 and gzip >= weights.get(b"identity", 0.0)


def _weight(parameter: bytes) -> float:
    if not parameter:
        return 1.0
    try:
        return float(parameter.removeprefix(b"q="))
    except ValueError:
        return 0.0


def with_ttl(response: PreparedResponse, environment: Environment) -> PreparedResponse:
    """Return a response with an `Expires` header, if the environment has a TTL."""
    ttl = environment.spec.ttl
    if ttl <= 0:
        return response
    expires = formatdate(clock.unix() + ttl, usegmt=True).encode()
    return response.with_headers((b"vary", b"Authorization"), (b"expires", expires))
