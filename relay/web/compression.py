"""Compressed bodies that are made of pieces: what many bodies share is compressed once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from isal import isal_zlib

from relay.evaluation.compiled.fragments import EvalBody, Fragment
from relay.web.resources import COMPRESSION_LEVEL, Resource
from relay.web.responses import Headers, PreparedResponse

# RFC 1952: no name and no time, so that the bytes are equal at all replicas.
_START = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
_LAST_BLOCK = b"\x03\0"
_SIZES = 2**32

_deflated: WeakKeyDictionary[Fragment, bytes] = WeakKeyDictionary()
"""Shared pieces, compressed."""


class EvaluationResource(Resource):
    """An evalx answer, of which only its own piece is compressed anew.

    Args:
        body: in JSON.
        headers: beside the usual ones, of all variants.
    """

    def __init__(self, body: EvalBody, headers: Headers) -> None:
        super().__init__(body.pieces, etag_of(body), headers)
        self._body = body

    @property
    def to_compress(self) -> int:
        """The bytes that were not compressed so far."""
        return to_compress(self._body)

    def compress(self) -> PreparedResponse:
        """Return the gzip variant. May run in a thread."""
        return self.compressed_answer(compressed(self._body))

    async def compress_in_thread(self) -> PreparedResponse:
        """Compress in a thread; what is shared is compressed for others, too."""
        return await asyncio.to_thread(self.compress)


def etag_of(body: EvalBody) -> bytes:
    """Return the ETag, equal at all replicas with equal flags."""
    return b'"%b"' % body.digest.hex().encode()


def to_compress(body: EvalBody) -> int:
    """Return the number of bytes of a body that were not compressed so far."""
    new = (len(piece.text) for piece in body.shared if piece not in _deflated)
    return len(body.pieces[0]) + sum(new)


def compressed(body: EvalBody) -> bytes:
    """Return a body in gzip. May run in a thread."""
    shared = [_deflated.get(piece) or _deflate_shared(piece) for piece in body.shared]
    blocks = (_START, _deflate(body.pieces[0]), *shared, _LAST_BLOCK)
    return b"".join((*blocks, _trailer(body.pieces)))


def _deflate_shared(piece: Fragment) -> bytes:
    deflated = _deflated[piece] = _deflate(piece.text)
    return deflated


def _deflate(text: bytes) -> bytes:
    """Return whole blocks that refer to nothing before them."""
    stream = isal_zlib.compressobj(COMPRESSION_LEVEL, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)
    return stream.compress(text) + stream.flush(isal_zlib.Z_FULL_FLUSH)


def _trailer(pieces: Iterable[bytes]) -> bytes:
    checksum = size = 0
    for piece in pieces:
        checksum = isal_zlib.crc32(piece, checksum)
        size += len(piece)
    return checksum.to_bytes(4, "little") + (size % _SIZES).to_bytes(4, "little")
