"""The first flag delivery protocol: messages from upstream, and what server-side SDKs get.

Reading: `parse` (streams 2.6) and `parse_all` (the body of `/sdk/latest-all`), both also in steps,
for whoever must not be held up by a large payload. Writing: the formats
of the streams `/all` and `/flags` (streams 2.2) and the JSON that polls share with them. Items go
out in the bytes in which they came in.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

import msgspec
import orjson
from msgspec import UNSET, Raw, Struct, UnsetType

from relay.errors import InvalidData
from relay.model.flag import Number
from relay.model.item import InvalidItem, Item, Kind
from relay.model.item import parse as parse_item
from relay.model.payload import Change, ChangeSet, Payload

T = TypeVar("T")

Steps = Generator[None, None, T]
"""Work that pauses after each item; what it returns is the result."""


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


def parse(name: str, data: bytes) -> ChangeSet | None:
    """Return what a message of upstream's stream changes; None if it is none of ours.

    An item that cannot be used is set apart in `ChangeSet.invalid`; the rest stands.

    Args:
        name: the SSE event name.
        data: the SSE data, lines joined.

    Raises:
        InvalidData: the message as a whole is broken; nothing of it may be applied.
    """
    return _result(in_steps(name, data))


def in_steps(name: str, data: bytes) -> Steps[ChangeSet | None]:
    """Do in steps what `parse` does at once."""
    match name:
        case "put":
            return (yield from _changes(_decoded(_PUT, "put message", data).data, "put message"))
        case "patch":
            patch = _decoded(_PATCH, "patch message", data)
            return _patched(patch.path, bytes(patch.data))
        case "delete":
            delete = _decoded(_DELETE, "delete message", data)
            return _deleted(delete.path, int(delete.version))
    return None


def parse_all(body: bytes) -> ChangeSet:
    """Return the full change set of a `/sdk/latest-all` body.

    Raises:
        InvalidData: the body as a whole is broken.
    """
    return _result(all_in_steps(body))


def all_in_steps(body: bytes) -> Steps[ChangeSet]:
    """Do in steps what `parse_all` does at once."""
    what = "body of /sdk/latest-all"
    return (yield from _changes(_decoded(_DATA, what, body), what))


def _result(steps: Steps[T]) -> T:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def _decoded(decoder: msgspec.json.Decoder[T], what: str, data: bytes) -> T:
    try:
        return decoder.decode(_valid_utf8(data))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise InvalidData(what, str(e)) from e


def _valid_utf8(data: bytes) -> bytes:
    """Replace what is not UTF-8, as the SSE standard demands: we pass items on unparsed."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return data.decode(errors="replace").encode()
    return data


def _changes(data: _Data, what: str) -> Steps[ChangeSet]:
    if data.flags is UNSET and data.segments is UNSET:
        raise InvalidData(what, "it has neither flags nor segments")
    items: list[Item] = []
    invalid: list[InvalidItem] = []
    for kind, members in ((Kind.FLAG, data.flags), (Kind.SEGMENT, data.segments)):
        for key, json in (members or {}).items():
            try:
                items.append(parse_item(kind, key, bytes(json)))
            except InvalidData as e:
                invalid.append(InvalidItem(kind, key, e.reason))
            yield
    return ChangeSet(tuple(items), full=True, invalid=tuple(invalid))


def _patched(path: str, json: bytes) -> ChangeSet | None:
    target = _target(path)
    if target is None:
        return None
    kind, key = target
    try:
        return ChangeSet((parse_item(kind, key, json),))
    except InvalidData as e:
        return ChangeSet((), invalid=(InvalidItem(kind, key, e.reason),))


def _deleted(path: str, version: int) -> ChangeSet | None:
    target = _target(path)
    return None if target is None else ChangeSet((Item(*target, version, None),))


def _target(path: str) -> tuple[Kind, str] | None:
    """Return the kind and key that a path names; None for kinds that we do not know.

    Raises:
        InvalidData: the path names a kind of ours but no key.
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


def all_flags(payload: Payload) -> bytes:
    """Return `{"<key>":<flag>,…}`: the body of `/sdk/flags`, the data of a put on `/flags`."""
    return b"".join(_members(payload.live(Kind.FLAG)))


# Parts are joined once, at the end: payloads of megabytes are not copied from step to step.


def _all_data(payload: Payload) -> Iterator[bytes]:
    yield b'{"flags":'
    yield from _members(payload.live(Kind.FLAG))
    yield b',"segments":'
    yield from _members(payload.live(Kind.SEGMENT))
    yield b"}"


def _members(items: Iterable[Item]) -> Iterator[bytes]:
    """Yield the parts of the JSON object that holds live items by key."""
    before = b"{"
    for item in items:
        if item.json is not None:
            yield before
            yield orjson.dumps(item.key)
            yield b":"
            yield item.json
            before = b","
    yield b"{}" if before == b"{" else b"}"


def _patch(path: str, item: Item) -> bytes:
    """Return the message for one item: a patch, or a delete for a tombstone."""
    if item.json is None:
        data = b'{"path":%b,"version":%d}' % (orjson.dumps(path), item.version)
        return b"event: delete\ndata: %b\n\n" % data
    return b'event: patch\ndata: {"path":%b,"data":%b}\n\n' % (orjson.dumps(path), item.json)


class AllFormat:
    """The stream `/all`: flags and segments."""

    def opening(self, payload: Payload) -> bytes:
        """Return the put that begins a stream."""
        begin, end = b'event: put\ndata: {"path":"/","data":', b"}\n\n"
        return b"".join((begin, *_all_data(payload), end))

    def update(self, change: Change) -> bytes:
        """Return patches and deletes for what changed."""
        return b"".join(_patch(f"/{item.kind.value}/{item.key}", item) for item in change.visible)


class FlagsFormat:
    """The stream `/flags` of old SDKs: flags only, and a bare map in its put."""

    def opening(self, payload: Payload) -> bytes:
        """Return the put that begins a stream."""
        return b"".join((b"event: put\ndata: ", *_members(payload.live(Kind.FLAG)), b"\n\n"))

    def update(self, change: Change) -> bytes:
        """Return patches and deletes for the flags that changed; empty if none did."""
        flags = (item for item in change.visible if item.kind is Kind.FLAG)
        return b"".join(_patch(f"/{item.key}", item) for item in flags)
