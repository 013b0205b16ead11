"""Archives of environments: a tar file, plain or compressed (offline-and-autoconfig 7.3).

Each environment has two members, its metadata and its data. A checksum covers all of them.
"""

from __future__ import annotations

import hashlib
import io
import math
import posixpath
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping

import orjson
from isal import isal_zlib
from msgspec import Struct

from relay.errors import InvalidData, UnusableArchive
from relay.model.environment import EnvironmentSpec
from relay.model.payload import ChangeSet, Payload
from relay.protocol.environments import (
    EnvironmentDescription,
    decoded,
    describe,
    members_of,
    text_in,
)
from relay.protocol.fdv1 import archived, parse_archived
from relay.protocol.gzip import CORRUPT, GZIP

MAX_MEMBER = 200 * 1024 * 1024
"""Bytes of a member that are too many: the limit of ld-relay."""

MAX_CONTENT = 2 * 1024 * 1024 * 1024
"""Maximum number of bytes of an archive after decompression: more is meant to fill the memory."""

CHECKSUM = "checksum.md5"

_GZIP_MAGIC = b"\x1f\x8b"
_AT_ONCE = 64 * 1024
"""Bytes that are decompressed at once."""
_CUT_OFF = ("unexpected end of data", "truncated header")
"""Messages of `tarfile`."""
_SUFFIX, _DATA_SUFFIX = ".json", "-data.json"


class Metadata(Struct, frozen=True):
    """Description of an environment, and the name of the state of its data."""

    environment: EnvironmentDescription
    data_id: str = ""


class Entry(Struct, frozen=True):
    """One environment of an archive, not understood yet."""

    name: str
    """Name of the environment's members: its ID."""
    raw_metadata: bytes
    raw_data: bytes

    def metadata(self) -> Metadata:
        """Return the metadata.

        Raises:
            InvalidData: they are unusable, or those of another environment.
        """
        members = members_of("metadata", decoded("metadata", self.raw_metadata))
        environment = describe(members.get("env"))
        if environment.id != self.name:
            text = f'the envID is "{environment.id}", not that of the member\'s name'
            raise InvalidData("metadata", text)
        if not environment.sdk_key:
            raise InvalidData("metadata", "there is no SDK key")
        return Metadata(environment, text_in("metadata", members, "dataid"))

    def data(self) -> ChangeSet:
        """Return the data; unusable items are in `ChangeSet.invalid`.

        Raises:
            InvalidData: the data as a whole are unusable.
        """
        return parse_archived(self.raw_data)


def entry_of(spec: EnvironmentSpec, payload: Payload) -> Entry:
    """Return the entry of an environment; it gets another version and data ID if it changes.

    Raises:
        ValueError: the environment has no client-side ID.
    """
    if spec.environment_id is None:
        raise ValueError(f'environment "{spec.name}" has no client-side ID, which archives need')
    data = archived(payload)
    environment: dict[str, object] = {
        "envID": spec.environment_id.value,
        "envKey": spec.environment_key or spec.name,
        "envName": spec.environment_name or spec.name,
        "mobKey": spec.mobile_key.value if spec.mobile_key else "",
        "projKey": spec.project_key,
        "projName": spec.project_name or spec.project_key,
        "sdkKey": {"value": spec.sdk_key.value},
        "defaultTtl": math.ceil(spec.ttl / 60),
        "secureMode": spec.secure_mode,
    }
    environment["version"] = zlib.crc32(orjson.dumps(environment))
    data_id = hashlib.sha256(data).hexdigest()[:32]
    metadata = orjson.dumps({"env": environment, "dataId": data_id})
    return Entry(spec.environment_id.value, metadata, data)


def read(content: bytes) -> tuple[Entry, ...]:
    """Return the environments of an archive, in the order of their names.

    Raises:
        UnusableArchive: it is broken, or does not match its checksum; in ld-relay's words.
    """
    members = _members(content)
    checksum = members.pop(CHECKSUM, None)
    if checksum is None:
        text = f'unable to read "{CHECKSUM}" from archive: open {CHECKSUM}'
        raise UnusableArchive(f"{text}: no such file or directory")
    entries = tuple(_entries(members))
    found = md5(entries)
    if found != checksum:
        text = "checksum of environments did not match"
        raise UnusableArchive(f'{text}: expected "{checksum.hex()}", got "{found.hex()}"')
    return entries


def write(entries: Iterable[Entry]) -> bytes:
    """Return an archive, compressed, that `read` and ld-relay understand.

    The same entries give the same bytes.
    """
    entries = sorted(entries, key=lambda entry: entry.name)
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            _add(tar, entry.name + _SUFFIX, entry.raw_metadata)
            _add(tar, entry.name + _DATA_SUFFIX, entry.raw_data)
        _add(tar, CHECKSUM, md5(entries))
    compressor = zlib.compressobj(wbits=GZIP)
    return compressor.compress(output.getvalue()) + compressor.flush()


def md5(entries: Iterable[Entry]) -> bytes:
    """Return the checksum of entries: that of their members in the order of the names."""
    members = {}
    for entry in entries:
        members[entry.name + _SUFFIX] = entry.raw_metadata
        members[entry.name + _DATA_SUFFIX] = entry.raw_data
    digest = hashlib.md5(usedforsecurity=False)
    for _, content in sorted(members.items(), key=lambda member: member[0].encode()):
        digest.update(content)
    return digest.digest()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _entries(members: Mapping[str, bytes]) -> Iterator[Entry]:
    for member in sorted(members, key=str.encode):
        if member.endswith(_DATA_SUFFIX):
            continue
        name = member.removesuffix(_SUFFIX)
        data = members.get(name + _DATA_SUFFIX)
        if data is None:
            text = f"unable to compute checksum of environments: open {name}{_DATA_SUFFIX}"
            raise UnusableArchive(f"{text}: no such file or directory")
        yield Entry(name, members[member], data)


def _members(content: bytes) -> dict[str, bytes]:
    """Return the checksum and the JSON members by name; the later of two with a name counts."""
    stream = _Inflated(content) if content.startswith(_GZIP_MAGIC) else io.BytesIO(content)
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                name = _name(member)
                if name is not None:
                    file = tar.extractfile(member)
                    members[name] = b"" if file is None else file.read()
                    if len(members[name]) < member.size:
                        raise UnusableArchive("unexpected EOF")
    except (tarfile.TarError, ValueError, OverflowError) as e:
        if str(e) == "empty file":
            return {}
        text = "unexpected EOF" if str(e) in _CUT_OFF else "archive/tar: invalid tar header"
        raise UnusableArchive(text) from e
    except CORRUPT as e:
        raise UnusableArchive(f"the archive cannot be decompressed: {e}") from e
    if CHECKSUM not in members and stream.tell() % tarfile.BLOCKSIZE:
        raise UnusableArchive("unexpected EOF")  # within a header, which `tarfile` overlooks
    return members


def _name(member: tarfile.TarInfo) -> str | None:
    """Return the name of a member that belongs to an environment; None for others.

    Raises:
        UnusableArchive: the member is too large, or lies in a folder.
    """
    if not member.isfile():
        return None
    name = posixpath.normpath("/" + member.name).lstrip("/")
    if member.size >= MAX_MEMBER:
        text = f'it contained a file "{name}" with a size >= {MAX_MEMBER} bytes'
        raise UnusableArchive(f"detected malformed or malicious archive file; {text}")
    if "/" in name:
        raise UnusableArchive(f'the archive contains a file in a folder, "{name}"')
    return name if name == CHECKSUM or name.endswith(_SUFFIX) else None


class _Inflated(io.RawIOBase):
    """Content of concatenated gzip streams; what follows the last one is ignored.

    Args:
        compressed: the gzip streams.
    """

    def __init__(self, compressed: bytes) -> None:
        self._compressed = compressed
        self._position = 0
        self._inflater = isal_zlib.decompressobj(GZIP)
        self._part = b""
        self._total = 0

    def read(self, size: int = -1, /) -> bytes:
        """Return at most `size` bytes; none at the end.

        Raises:
            UnusableArchive: a stream is cut off, or there is too much.
        """
        if not self._part:
            self._part = self._next()
        taken, self._part = self._part[:size], self._part[size:]
        return taken

    def tell(self) -> int:
        """Return the number of bytes that were decompressed."""
        return self._total

    def _next(self) -> bytes:
        while True:
            if self._inflater.eof:
                if not self._compressed.startswith(_GZIP_MAGIC, self._position):
                    return b""
                self._inflater = isal_zlib.decompressobj(GZIP)
            chunk = self._compressed[self._position : self._position + _AT_ONCE]
            part = self._inflater.decompress(chunk, _AT_ONCE)
            unused = self._inflater.unused_data if self._inflater.eof else b""
            self._position += len(chunk) - len(self._inflater.unconsumed_tail) - len(unused)
            self._total += len(part)
            if self._total > MAX_CONTENT:
                text = f"it contained more than {MAX_CONTENT} bytes"
                raise UnusableArchive(f"detected malformed or malicious archive file; {text}")
            if part:
                return part
            if not chunk and not self._inflater.eof:
                raise UnusableArchive("unexpected EOF")
