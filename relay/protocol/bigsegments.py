"""Patches of big segments: what LaunchDarkly sends, and which of them come next (datastore 4.9).

A patch leads from one version of an environment's big segments to the next. Versions are opaque. A
poll answers with an array of patches, and so does each event of the stream.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Generator, Iterable, Iterator
from hashlib import sha256
from urllib.parse import quote

import msgspec
from msgspec import Struct

from relay.errors import InvalidData
from relay.model.item import Item, Kind
from relay.protocol.urls import join

MAX_PATCH = 128 * 1024 * 1024
"""Maximum bytes of one patch, as for one message of a stream."""

PIECE = 64 * 1024
"""Bytes that are read between two pauses: less than a millisecond."""

WORTH_A_RETRY = 2
"""Divisor: an incomplete patch is searched for its end again when half as many bytes have come as
there were, so that the work stays proportional to its size."""


class Members(Struct, frozen=True, gc=False):
    """Hashes of the context keys that a patch adds to a set, and those that it removes."""

    add: list[str] | None = None
    remove: list[str] | None = None


class _Changes(Struct, frozen=True, gc=False):
    included: Members = Members()
    excluded: Members = Members()


class Patch(Struct, frozen=True, rename="camel", gc=False):
    """Change of one big segment; `segment_id` is `KEY.gGENERATION`."""

    segment_id: str
    version: str = ""
    previous_version: str = ""
    changes: _Changes = _Changes()

    @property
    def included(self) -> Members:
        """Changes of the contexts that the segment includes."""
        return self.changes.included

    @property
    def excluded(self) -> Members:
        """Changes of the contexts that the segment excludes."""
        return self.changes.excluded

    def follows(self, cursor: str | None) -> bool:
        """Return whether this patch is the next one after a version.

        Args:
            cursor: version of what is stored; None if nothing is, so that anything comes next.
        """
        return cursor is None or cursor == self.previous_version


class _RawMembers(Struct, frozen=True):
    add: msgspec.Raw = msgspec.Raw(b"null")
    remove: msgspec.Raw = msgspec.Raw(b"null")


class _RawChanges(Struct, frozen=True):
    included: _RawMembers = _RawMembers()
    excluded: _RawMembers = _RawMembers()


class _RawPatch(Struct, frozen=True, rename="camel"):
    segment_id: str
    version: str = ""
    previous_version: str = ""
    changes: _RawChanges = _RawChanges()


_PATCH = msgspec.json.Decoder(Patch)
_RAW_PATCH = msgspec.json.Decoder(_RawPatch)
_HASHES: msgspec.json.Decoder[list[str] | None] = msgspec.json.Decoder(list[str] | None)

_TEXT = re.compile(rb'[^"\[\]{}]*+(?:"(?:[^"\\]++|\\.)*+"[^"\[\]{}]*+)*+', re.DOTALL)
"""Text up to a bracket outside of strings, or to a string that is incomplete."""

_TO_BRACKET = re.compile(
    rb'([^"\[\]{}]*+)((?:"(?:[^"\\]++|\\.)*+"[^"\[\]{}]*+)*+)([\[\]{}])', re.DOTALL
)
"""Text without strings, then text with strings, up to the next bracket outside of strings."""


class PatchReader:
    """Incremental reader of an array of patches, which holds one patch in memory at a time.

    It pauses now and then, and yields None for that: a patch may have any number of members.
    """

    def __init__(self) -> None:
        self._text = b""
        """Text that is not read yet, from the beginning of an incomplete patch on."""
        self._position = 0
        """Position in the text up to which brackets have been counted."""
        self._depth = 0
        self._elements = 0
        self._complete = False
        self._following: list[bytes] = []
        """Text that came after `_text`, not searched yet."""
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[Patch | None]:
        """Yield the patches that a chunk completes; None to pause.

        Raises:
            InvalidData: this is not an array of patches.
        """
        self._following.append(chunk)
        self._size += len(chunk)
        if self._size < len(self._text) // WORTH_A_RETRY:
            return
        yield from self._read()

    def finish(self) -> Iterator[Patch | None]:
        """Yield the last patches; None to pause.

        Raises:
            InvalidData: the array is incomplete.
        """
        yield from self._read()
        if not self._complete:
            raise InvalidData("big segment patches", "the answer is cut off")

    def _read(self) -> Iterator[Patch | None]:
        text = b"".join((self._text, *self._following))
        self._following, self._size = [], 0
        position, start = self._position, 0
        while not self._complete:
            if self._depth > 2:  # noqa: PLR2004 - within the members of a patch
                position = yield from _skip(text, position)
            found = _TO_BRACKET.match(text, position)
            if found is None:
                break
            position = found.end()
            if found[3] in b"[{":
                self._open(found)
                if self._depth == 2:  # noqa: PLR2004 - a patch in the array
                    start = position - 1
            else:
                self._close(found)
                if self._depth == 1:
                    yield (yield from _decoded(text[start:position]))
                    start = position
        if self._depth < 2:  # noqa: PLR2004 - as above
            start = position
        self._text, self._position = text[start:], position - start
        if len(self._text) > MAX_PATCH:
            raise InvalidData("big segment patch", f"it is longer than {MAX_PATCH} bytes")
        if self._complete and self._text.strip():
            raise _unexpected(self._text)

    def _open(self, found: re.Match[bytes]) -> None:
        if self._depth == 0:
            expected, bracket = b"", b"["
        elif self._depth == 1:
            expected, bracket = b"," if self._elements else b"", b"{"
            self._elements += 1
        else:
            expected, bracket = None, found[3]
        is_expected = expected is None or (not found[2] and found[1].strip() == expected)
        if not is_expected or found[3] != bracket:
            raise _unexpected(found[0])
        self._depth += 1

    def _close(self, found: re.Match[bytes]) -> None:
        if self._depth <= 1 and (
            found[3] != b"]" or found[2] or found[1].strip() or not self._depth
        ):
            raise _unexpected(found[0])
        self._depth -= 1
        self._complete = self._depth == 0


def _unexpected(text: bytes) -> InvalidData:
    shown = text[:40].decode(errors="replace")
    return InvalidData("big segment patches", f"an array of patches was expected, not {shown!r}")


def _skip(text: bytes, position: int) -> Generator[None, None, int]:
    """Return the end of the strings from a position on, which no bracket interrupts; pause."""
    end = position + PIECE
    while end < len(text):
        found = _TEXT.match(text, position, end)
        reached = found.end() if found else position
        if reached > position and text[reached : reached + 1] in b"[]{}":
            return reached
        # A string that is longer than a piece is looked at again with more of it.
        end = reached + PIECE if reached > position else 2 * end - position
        position = reached
        yield
    return position


def _decoded(json: bytes) -> Generator[None, None, Patch]:
    """Return a patch; pause while it is decoded."""
    try:
        if len(json) <= PIECE:
            return _PATCH.decode(json)
        raw = _RAW_PATCH.decode(json)
        yield
        included = yield from _members(raw.changes.included)
        excluded = yield from _members(raw.changes.excluded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise InvalidData("big segment patch", str(e)) from e
    changes = _Changes(included, excluded)
    return Patch(raw.segment_id, raw.version, raw.previous_version, changes)


def _members(raw: _RawMembers) -> Generator[None, None, Members]:
    add = yield from _hashes(bytes(raw.add))
    remove = yield from _hashes(bytes(raw.remove))
    return Members(add, remove)


def _hashes(json: bytes) -> Generator[None, None, list[str] | None]:
    """Return an array of strings, decoded in pieces."""
    hashes: list[str] = []
    start = 1
    while (end := json.find(b'",', start + PIECE)) > 0:
        try:
            hashes += _HASHES.decode(b"[%b]" % json[start : end + 1]) or ()
        except msgspec.MsgspecError:
            break  # that was within a string, or there are others than strings
        start = end + 2
        yield
    else:
        if start > 1:
            return hashes + (_HASHES.decode(b"[" + json[start:]) or [])
    return _HASHES.decode(json)


class _Boundless(Struct, frozen=True):
    unbounded: bool = False


_SEGMENT = msgspec.json.Decoder(_Boundless)


def include_big_segment(items: Iterable[Item]) -> bool:
    """Return whether a live big segment is among some valid items."""
    return any(
        item.kind is Kind.SEGMENT
        and item.json is not None
        and b'"unbounded"' in item.json
        and _SEGMENT.decode(item.json).unbounded
        for item in items
    )


def context_hash(key: str) -> str:
    """Return the hash of a context key by which memberships are stored."""
    return b64encode(sha256(key.encode(errors="surrogatepass")).digest()).decode()


def revisions_url(base: str, after: str | None) -> str:
    """Return the URL of the patches after a version; of all if that is empty or None."""
    query = f"?after={quote(after, safe='')}" if after else ""
    return join(base, "/sdk/big-segments/revisions") + query
