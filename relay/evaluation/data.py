"""Flags and segments as evaluation reads them: parsed, but variations stay the text they came as.

A variation's value is passed on and never looked at, and no number in it may change on the way.
That is why flags are parsed here once more: the check at their arrival (`relay.model.item`) looks
into variations, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import msgspec
from msgspec import Raw

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


@dataclass(frozen=True, slots=True)
class Membership:
    """What a store of big segments knows about the key of a context.

    Args:
        status: whether and how well the store could answer.
        segments: whether the key is in (or explicitly out of) segments, by `key.g<generation>`.
    """

    status: BigSegmentsStatus
    segments: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Data:
    """All that an evaluation may look up.

    Args:
        flag: returns the live flag of a key, or None.
        segment: returns the live segment of a key, or None.
        memberships: in big segments, by the key of a context; what is missing is unknown because
            no store of big segments is configured.
    """

    flag: Callable[[str], Flag | None]
    segment: Callable[[str], Segment | None]
    memberships: Mapping[str, Membership] = field(default_factory=dict)

    @classmethod
    def of(cls, payload: Payload) -> Data:
        """Return the data of a payload. Items are parsed when they are needed, once."""

        @cache
        def flag(key: str) -> Flag | None:
            item = payload.get(Kind.FLAG, key)
            return parse_flag(item.json) if item and item.json else None

        @cache
        def segment(key: str) -> Segment | None:
            item = payload.get(Kind.SEGMENT, key)
            return parse_segment(item.json) if item and item.json else None

        return cls(flag, segment)
