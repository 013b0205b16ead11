"""Schema of a segment's JSON (evaluation 6.1). Unknown members are allowed."""

from __future__ import annotations

from msgspec import Struct

from relay.model.flag import Clause, Number


class SegmentTarget(Struct, rename="camel", frozen=True, gc=False):
    """Keys of one context kind to include in, or exclude from, the segment."""

    values: list[str] | None = None
    context_kind: str = ""


class SegmentRule(Struct, rename="camel", frozen=True, gc=False):
    """Clauses, all of which must match, and the share of contexts to include."""

    id: str = ""
    clauses: list[Clause] | None = None
    weight: Number | None = None
    bucket_by: str | None = None
    rollout_context_kind: str = ""


class Segment(Struct, rename="camel", frozen=True, gc=False):
    """A set of contexts."""

    key: str = ""
    version: Number = 0
    deleted: bool = False
    included: list[str] | None = None
    excluded: list[str] | None = None
    included_contexts: list[SegmentTarget] | None = None
    excluded_contexts: list[SegmentTarget] | None = None
    salt: str = ""
    rules: list[SegmentRule] | None = None
    unbounded: bool = False
    unbounded_context_kind: str = ""
    generation: Number | None = None
