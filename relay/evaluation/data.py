"""Flags and segments parsed for evaluation; variations stay the raw JSON that upstream sent.

A variation's value is passed through unread, so that no number in it changes on the way. Flags are
therefore parsed a second time here: the validation on arrival (`relay.model.item`) decodes the
variations, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import msgspec
from msgspec import Raw, Struct, field

from relay.evaluation.results import BigSegmentsStatus
from relay.model.flag import Flag
from relay.model.item import Kind
from relay.model.payload import Payload
from relay.model.segment import Segment


class _RawFlag(Flag, rename="camel", frozen=True):
    variations: list[Raw] | None = None


_FLAG = msgspec.json.Decoder(_RawFlag)
_SEGMENT = msgspec.json.Decoder(Segment)


def parse_flag(json: bytes) -> Flag:
    """Return a flag whose variations are `msgspec.Raw`; `json` is that of a valid `Item`."""
    return _FLAG.decode(json)


def parse_segment(json: bytes) -> Segment:
    """Return a segment; `json` is that of a valid `Item`."""
    return _SEGMENT.decode(json)


def segment_reference(segment: Segment) -> str:
    """Return the name of a big segment in memberships; it must have a generation."""
    return f"{segment.key}.g{int(segment.generation or 0)}"


class Membership(Struct, frozen=True):
    """Big-segment memberships of one context key.

    Args:
        status: health of the big-segment store for this answer.
        segments: True for included keys, False for excluded ones, by `key.g<generation>`.
    """

    status: BigSegmentsStatus
    segments: Mapping[str, bool] = field(default_factory=dict)


NO_MEMBERSHIPS: Mapping[str, Membership] = {}
"""Memberships without a big-segment store."""

NOT_CONFIGURED = Membership(BigSegmentsStatus.NOT_CONFIGURED)
"""Membership of a context key without a big-segment store."""


class Data(Struct, frozen=True):
    """Everything that an evaluation may look up.

    Args:
        flag: returns the live flag with a key, or None.
        segment: returns the live segment with a key, or None.
        memberships: big-segment memberships by context key; a missing key means that no
            big-segment store is configured.
    """

    flag: Callable[[str], Flag | None]
    segment: Callable[[str], Segment | None]
    memberships: Mapping[str, Membership] = field(default_factory=dict)

    @classmethod
    def of(cls, payload: Payload) -> Data:
        """Return the data of a payload; each item is parsed once, on first use."""

        @cache
        def flag(key: str) -> Flag | None:
            item = payload.get(Kind.FLAG, key)
            return parse_flag(item.json) if item and item.json else None

        @cache
        def segment(key: str) -> Segment | None:
            item = payload.get(Kind.SEGMENT, key)
            return parse_segment(item.json) if item and item.json else None

        return cls(flag, segment)
