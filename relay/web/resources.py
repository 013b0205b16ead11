"""Resources: a body with its ETag, in all variants that clients may get."""

from __future__ import annotations

import asyncio
import re
import time
from email.utils import formatdate
from functools import cached_property, lru_cache

from isal import igzip

from relay.environment import Environment
from relay.web.responses import Headers, PreparedResponse

MIN_COMPRESSED = 1024
"""Bytes of a body worth compressing: below, it fits one packet anyway."""


MAX_COMPRESSED_AT_ONCE = 256 * 1024
"""Bytes that are compressed on the event loop, in about 1 ms; more is done in a thread."""


COMPRESSION_LEVEL = 1
"""isal's 1 of 0 to 3: nearly as small as 3, and fast."""


_QUOTED = re.compile(rb'(?:W/)?"([^"]*)"')


class Resource:
    """One body with its ETag, in all its variants.

    Args:
        pieces: of the body, in JSON.
        etag: as it is sent.
        headers: beside the usual ones, of all variants.
    """

    def __init__(self, pieces: tuple[bytes, ...], etag: bytes, headers: Headers) -> None:
        self.pieces = pieces
        self.size = sum(map(len, pieces))
        self.etag = etag
        self.compressible = self.size >= MIN_COMPRESSED
        self._headers = headers
        self.compressed: PreparedResponse | None = None
        self._compression: asyncio.Future[PreparedResponse] | None = None

    @property
    def _shared(self) -> Headers:
        vary: Headers = ((b"vary", b"Accept-Encoding"),) if self.compressible else ()
        return ((b"etag", self.etag), *self._headers, *vary)

    @property
    def _typed(self) -> Headers:
        return ((b"content-type", b"application/json"), *self._shared)

    @property
    def body(self) -> bytes:
        """The body in one piece."""
        return b"".join(self.pieces)

    @property
    def plain(self) -> PreparedResponse:
        """The variant that is not compressed."""
        return PreparedResponse(200, self._typed, self.body)

    @cached_property
    def unchanged(self) -> PreparedResponse:
        """What a client is told that has it."""
        return PreparedResponse(304, self._shared)

    @property
    def to_compress(self) -> int:
        """The bytes that `compress` would have to look at."""
        return self.size

    def matches(self, if_none_match: bytes) -> bool:
        """Whether the client has this."""
        return is_known(self.etag, if_none_match)

    def compress(self) -> PreparedResponse:
        """Return the gzip variant. May run in a thread."""
        if self.compressed is None:
            # Without a time the bytes are equal at all replicas.
            body = igzip.compress(self.body, COMPRESSION_LEVEL, mtime=0)
            self.compressed = self.compressed_answer(body)
        return self.compressed

    def compressed_answer(self, body: bytes) -> PreparedResponse:
        """Return the variant with a compressed body."""
        return PreparedResponse(200, (*self._typed, (b"content-encoding", b"gzip")), body)

    async def compress_in_thread(self) -> PreparedResponse:
        """Compress in a thread, once for all who ask meanwhile."""
        if self._compression is None:
            self._compression = asyncio.ensure_future(asyncio.to_thread(self.compress))
        # Who asks may go; others wait for the same.
        return await asyncio.shield(self._compression)

    def variant(self, if_none_match: bytes, accept_encoding: bytes) -> PreparedResponse | None:
        """Return what answers these headers; None while it waits to be compressed aside."""
        if if_none_match and self.matches(if_none_match):
            return self.unchanged
        if not (self.compressible and accepts_gzip(accept_encoding)):
            return self.plain
        if self.to_compress <= MAX_COMPRESSED_AT_ONCE:
            return self.compress()
        return self.compressed


def is_known(etag: bytes, if_none_match: bytes) -> bool:
    """Whether a client has what an ETag names: old exact form, list, `W/`, `*` (endpoints 1.6).

    Args:
        etag: as it is sent.
        if_none_match: the client's header; empty if there is none.
    """
    if if_none_match in (etag, b"*"):
        return True
    return etag.removeprefix(b"W/").strip(b'"') in _QUOTED.findall(if_none_match)


@lru_cache(maxsize=256)
def accepts_gzip(accept_encoding: bytes) -> bool:
    """Whether an `Accept-Encoding` header prefers gzip to nothing, or likes it as much."""
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


def with_ttl(answer: PreparedResponse | None, environment: Environment) -> PreparedResponse | None:
    """Return an answer with the time until which caches may keep it, if there is one."""
    ttl = environment.spec.ttl
    if answer is None or ttl <= 0:
        return answer
    expires = formatdate(time.time() + ttl, usegmt=True).encode()
    return answer.with_headers((b"vary", b"Authorization"), (b"expires", expires))
