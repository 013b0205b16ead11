"""Flag delivery protocol v1: parsing of upstream messages, encoding for server-side SDKs.

Parsing: `parse` (streams 2.6) and `parse_all` (body of `/sdk/latest-all`), both also in steps, so
that a large payload does not block the event loop. Encoding: the formats of the streams `/all` and
`/flags` (streams 2.2), and the JSON that polls share with them. Items are forwarded verbatim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import msgspec
import orjson
from msgspec import UNSET, Raw, Struct, UnsetType

from relay.errors import InvalidData
from relay.model.flag import Number
from relay.model.item import InvalidItem, Item, Kind
from relay.model.item import parse as parse_item
from relay.model.payload import Change, ChangeSet, Payload
from relay.protocol.sse import encode
from relay.steps import Steps, finish

T = TypeVar("T")


class _Data(Struct):
    flags: dict[str, Raw] | UnsetType | None = UNSET
    segments: dict[str, Raw] | UnsetType | None = UNSET


class _Put(Struct):
    data: _Data


class _Patch(Struct):
    path: str
    data: Raw


class _Delete(Struct):
    path: str
    version: Number


_PUT = msgspec.json.Decoder(_Put)
_PATCH = msgspec.json.Decoder(_Patch)
_DELETE = msgspec.json.Decoder(_Delete)
_DATA = msgspec.json.Decoder(_Data)
_ARCHIVED = msgspec.json.Decoder(_Data | None)


def parse(name: str, data: bytes) -> ChangeSet | None:
    """Return the change set of a stream message; None if the message is unknown.

    Unusable items are reported in `ChangeSet.invalid`; the others remain valid.

    Args:
        name: SSE event name.
        data: SSE data with joined lines.

    Raises:
        InvalidData: the whole message is broken and must not be applied.
    """
    return finish(in_steps(name, data))


def in_steps(name: str, data: bytes) -> Steps[ChangeSet | None]:
    """Do the same as `parse`, with a step for each item."""
    match name:
        case "put":
            return (yield from _parse_data(decode(_PUT, "put message", data).data, "put message"))
        case "patch":
            patch = decode(_PATCH, "patch message", data)
            return _patch_changes(patch.path, bytes(patch.data))
        case "delete":
            delete = decode(_DELETE, "delete message", data)
            return _delete_changes(delete.path, int(delete.version))
    return None


def parse_all(body: bytes) -> ChangeSet:
    """Return the full change set of a `/sdk/latest-all` body.

    Raises:
        InvalidData: the whole body is broken.
    """
    return finish(all_in_steps(body))


def all_in_steps(body: bytes) -> Steps[ChangeSet]:
    """Do the same as `parse_all`, with a step for each item."""
    subject = "body of /sdk/latest-all"
    return (yield from _parse_data(decode(_DATA, subject, body), subject))


def parse_archived(data: bytes) -> ChangeSet:
    """Return the full change set of an archive's data: kinds that are missing or null are empty.

    Raises:
        InvalidData: the data as a whole are broken.
    """
    subject = "data"
    kinds = decode(_ARCHIVED, subject, data) or _Data()
    flags, segments = kinds.flags or {}, kinds.segments or {}
    return finish(_parse_data(_Data(flags, segments), subject))


def decode(decoder: msgspec.json.Decoder[T], subject: str, data: bytes) -> T:
    """Decode JSON of upstream.

    Raises:
        InvalidData: it is broken, or something else than it should be.
    """
    try:
        return decoder.decode(_replace_invalid_utf8(data))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise InvalidData(subject, str(e)) from e


def _replace_invalid_utf8(data: bytes) -> bytes:
    """Replace invalid UTF-8, as the SSE standard demands, because items are forwarded verbatim."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return data.decode(errors="replace").encode()
    return data


def _parse_data(data: _Data, subject: str) -> Steps[ChangeSet]:
    if data.flags is UNSET and data.segments is UNSET:
        raise InvalidData(subject, "it has neither flags nor segments")
    items: list[Item] = []
    invalid: list[InvalidItem] = []
    for kind, raw_items in ((Kind.FLAG, data.flags), (Kind.SEGMENT, data.segments)):
        for key, json in (raw_items or {}).items():
            try:
                items.append(parse_item(kind, key, bytes(json)))
            except InvalidData as e:
                invalid.append(InvalidItem(kind, key, e.reason))
            yield
    return ChangeSet(tuple(items), full=True, invalid=tuple(invalid))


def _patch_changes(path: str, json: bytes) -> ChangeSet | None:
    target = _parse_path(path)
    if target is None:
        return None
    kind, key = target
    try:
        return ChangeSet((parse_item(kind, key, json),))
    except InvalidData as e:
        return ChangeSet((), invalid=(InvalidItem(kind, key, e.reason),))


def _delete_changes(path: str, version: int) -> ChangeSet | None:
    target = _parse_path(path)
    return None if target is None else ChangeSet((Item(*target, version, None),))


def _parse_path(path: str) -> tuple[Kind, str] | None:
    """Return the kind and key of a path; None for unknown kinds.

    Raises:
        InvalidData: the path has a known kind but no key.
    """
    for kind in Kind:
        prefix = f"/{kind.value}/"
        if path.startswith(prefix):
            if path == prefix:
                raise InvalidData("message", f'path "{path}" has no key')
            return kind, path[len(prefix) :]
    return None


def all_data(payload: Payload) -> bytes:
    """Return `{"flags":{…},"segments":{…}}`: the body of `/sdk/latest-all`, the data of a put."""
    return b"".join(_all_data(payload))


def archived(payload: Payload) -> bytes:
    """Return the data of a payload for an archive: equal payloads give equal bytes."""
    kinds = (b"".join(_members(_sorted(payload.live(kind)))) for kind in (Kind.FLAG, Kind.SEGMENT))
    return b'{"flags":%b,"segments":%b}' % tuple(kinds)


def _sorted(items: Iterable[Item]) -> Iterable[Item]:
    return sorted(items, key=lambda item: item.key)


def all_flags(payload: Payload) -> bytes:
    """Return `{"<key>":<flag>,…}`: the body of `/sdk/flags`, the data of a put on `/flags`."""
    return b"".join(_members(payload.live(Kind.FLAG)))


# Parts are joined once, at the end, to avoid copies of large payloads.


def _all_data(payload: Payload) -> Iterator[bytes]:
    yield b'{"flags":'
    yield from _members(payload.live(Kind.FLAG))
    yield b',"segments":'
    yield from _members(payload.live(Kind.SEGMENT))
    yield b"}"


def _members(items: Iterable[Item]) -> Iterator[bytes]:
    """Yield the parts of a JSON object with live items by key."""
    separator = b"{"
    for item in items:
        if item.json is not None:
            yield separator
            yield orjson.dumps(item.key)
            yield b":"
            yield item.json
            separator = b","
    yield b"{}" if separator == b"{" else b"}"


def _item_message(path: str, item: Item) -> bytes:
    """Return the message for an item: a patch, or a delete for a tombstone."""
    target = orjson.dumps(path)
    if item.json is None:
        return encode(b"delete", b'{"path":', target, b',"version":%d}' % item.version)
    return encode(b"patch", b'{"path":', target, b',"data":', item.json, b"}")


class AllFormat:
    """Format of the stream `/all`: flags and segments."""

    def opening(self, payload: Payload) -> bytes:
        """Return the put that begins a stream."""
        return encode(b"put", b'{"path":"/","data":', *_all_data(payload), b"}")

    def update(self, change: Change) -> bytes:
        """Return patches and deletes for the changed items."""
        return b"".join(
            _item_message(f"/{item.kind.value}/{item.key}", item) for item in change.visible
        )


class FlagsFormat:
    """Format of the stream `/flags` for old SDKs: flags only, with a bare map in its put."""

    def opening(self, payload: Payload) -> bytes:
        """Return the put that begins a stream."""
        return encode(b"put", *_members(payload.live(Kind.FLAG)))

    def update(self, change: Change) -> bytes:
        """Return patches and deletes for the changed flags; empty if there are none."""
        flags = (item for item in change.visible if item.kind is Kind.FLAG)
        return b"".join(_item_message(f"/{item.key}", item) for item in flags)
