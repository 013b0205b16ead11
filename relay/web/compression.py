"""Compressed bodies assembled from fragments; fragments that bodies share are compressed once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from isal import isal_zlib

from relay.evaluation.compiled.fragments import EvalBody, Fragment
from relay.web.resources import COMPRESSION_LEVEL, Resource
from relay.web.responses import Headers, PreparedResponse

# RFC 1952: without name and time, so that all replicas produce the same bytes.
_START = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
_LAST_BLOCK = b"\x03\0"
_SIZES = 2**32

_deflated: WeakKeyDictionary[Fragment, bytes] = WeakKeyDictionary()
"""Shared fragments, compressed."""


class EvaluationResource(Resource):
    """Response to an evaluation; only the unshared part of its body is compressed anew.

    Args:
        body: in JSON.
        headers: of all variants, besides the usual ones.
    """

    def __init__(self, body: EvalBody, headers: Headers) -> None:
        super().__init__(body.pieces, etag_of(body), headers)
        self._body = body

    @property
    def to_compress(self) -> int:
        """Number of bytes that `compress` has yet to compress."""
        return to_compress(self._body)

    def compress(self) -> PreparedResponse:
        """Return the gzip variant. May run in a thread."""
        return self.compressed_response(compressed(self._body))

    async def compress_in_thread(self) -> PreparedResponse:
        """Compress in a thread; the shared fragments are then compressed for other bodies, too."""
        return await asyncio.to_thread(self.compress)


def etag_of(body: EvalBody) -> bytes:
    """Return the ETag; replicas with equal flags return equal ones. Empty without a digest."""
    return b'"%b"' % body.digest.hex().encode() if body.digest else b""


def to_compress(body: EvalBody) -> int:
    """Return the number of bytes of a body that have not been compressed yet."""
    new = (len(fragment.text) for fragment in body.shared if fragment not in _deflated)
    return len(body.pieces[0]) + sum(new) + len(body.tail)


def compressed(body: EvalBody) -> bytes:
    """Return a body as gzip. May run in a thread."""
    shared = [_deflated.get(fragment) or _deflate_shared(fragment) for fragment in body.shared]
    tail = (_deflate(body.tail),) if body.tail else ()
    blocks = (_START, _deflate(body.pieces[0]), *shared, *tail, _LAST_BLOCK)
    return b"".join((*blocks, _trailer(body.pieces)))


def _deflate_shared(fragment: Fragment) -> bytes:
    deflated = _deflated[fragment] = _deflate(fragment.text)
    return deflated


def _deflate(text: bytes) -> bytes:
    """Return complete deflate blocks that refer to nothing before them."""
    stream = isal_zlib.compressobj(COMPRESSION_LEVEL, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)
    return stream.compress(text) + stream.flush(isal_zlib.Z_FULL_FLUSH)


def _trailer(pieces: Iterable[bytes]) -> bytes:
    checksum = size = 0
    for fragment in pieces:
        checksum = isal_zlib.crc32(fragment, checksum)
        size += len(fragment)
    return checksum.to_bytes(4, "little") + (size % _SIZES).to_bytes(4, "little")
