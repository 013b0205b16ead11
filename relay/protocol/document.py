"""Published documents: all data of an environment in one text, for whoever reads a single object.

The text is the body of `/sdk/latest-all`. So it is also what LaunchDarkly's edge SDKs read under
`LD-Env-<client-side ID>`, and a file in the SDKs' file-data format. If items were deleted, their
versions follow in a member `deleted`, which no SDK reads: a relay that is behind would otherwise
bring them back. Equal payloads give equal bytes.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from urllib.parse import quote

import msgspec
from isal import isal_zlib
from msgspec import Struct

from relay.errors import InvalidData
from relay.model.flag import Number
from relay.model.item import Item, Kind
from relay.model.payload import ChangeSet, Payload
from relay.protocol import fdv1
from relay.protocol.gzip import CORRUPT, GZIP
from relay.steps import Steps

MAX_SIZE = 512 * 1024 * 1024
"""Maximum size of a document in bytes: several times the largest upstream message."""

COMPRESSION_LEVEL = 6
"""Level of zlib: a document is written once and read often."""

_GZIP_MAGIC = b"\x1f\x8b"


class _Deleted(Struct):
    deleted: Mapping[str, Mapping[str, Number]] = {}


_DELETED = msgspec.json.Decoder(_Deleted)


def name(environment_id: str, payload_filter: str = "") -> str:
    """Return the name of an environment's document: the key that edge SDKs read.

    Args:
        environment_id: client-side ID.
        payload_filter: key of the payload filter whose part of the data it holds; edge SDKs read it
            with `ID~FILTER` in place of the ID.
    """
    part = f"~{payload_filter}" if payload_filter else ""
    return "LD-Env-" + quote(environment_id + part, safe="~")


def text(payload: Payload) -> bytes:
    """Return the document of a payload."""
    data = fdv1.archived(payload)
    deleted: dict[str, dict[str, int]] = {}
    for item in payload:
        if item.deleted:
            deleted.setdefault(item.kind.value, {})[item.key] = item.version
    if not deleted:
        return data
    return b'%b,"deleted":%b}' % (data[:-1], msgspec.json.encode(deleted, order="sorted"))


def compressed(document: bytes) -> bytes:
    """Return a document in gzip; equal documents give equal bytes."""
    return gzip.compress(document, COMPRESSION_LEVEL, mtime=0)


def decompressed(content: bytes) -> bytes:
    """Return a document as text, be it in gzip or not.

    Raises:
        InvalidData: the gzip is corrupt, cut off, or too long.
    """
    if not content.startswith(_GZIP_MAGIC):
        return content
    decompressor = isal_zlib.decompressobj(wbits=GZIP)
    try:
        document = decompressor.decompress(content, MAX_SIZE)
    except CORRUPT as e:
        raise InvalidData("document", f"its gzip is corrupt: {e}") from e
    if decompressor.unconsumed_tail:
        raise InvalidData("document", f"longer than {MAX_SIZE} bytes")
    if not decompressor.eof:
        raise InvalidData("document", "its gzip is cut off")
    return document


def read(content: bytes) -> Steps[ChangeSet]:
    """Return the full change set of a document, tombstones included, with a step for each item.

    Args:
        content: a document, in gzip or not.

    Raises:
        InvalidData: it is no document.
    """
    document = decompressed(content)
    data = yield from fdv1.all_in_steps(document)
    return ChangeSet((*data.items, *_tombstones(document)), full=True, invalid=data.invalid)


def _tombstones(document: bytes) -> Iterator[Item]:
    try:
        deleted = _DELETED.decode(document).deleted
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise InvalidData("document", f"deleted: {e}") from e
    for kind in Kind:
        for key, version in deleted.get(kind.value, {}).items():
            yield Item(kind, key, int(version), None)
