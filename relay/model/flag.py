"""Schema of a flag's JSON (evaluation 6.1).

Unknown members are allowed and ignored here; the item's verbatim bytes carry them on. Integers may
be written as `3.0`: ld-relay truncates them.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

Number = int | float


class Clause(Struct, rename="camel", frozen=True, gc=False):
    """One condition of a rule."""

    attribute: str = ""
    op: str = ""
    context_kind: str = ""
    values: list[Any] | None = None
    negate: bool = False


class WeightedVariation(Struct, rename="camel", frozen=True, gc=False):
    """One bucket of a rollout; `weight` in thousandths of a percent."""

    variation: Number = 0
    weight: Number = 0
    untracked: bool = False


class Rollout(Struct, rename="camel", frozen=True, gc=False):
    """A percentage rollout or an experiment."""

    variations: list[WeightedVariation] | None = None
    kind: str = ""
    context_kind: str = ""
    seed: Number | None = None
    bucket_by: str | None = None


class VariationOrRollout(Struct, rename="camel", frozen=True, gc=False):
    """A fixed variation or a rollout: the fallthrough, and the base of a rule."""

    variation: Number | None = None
    rollout: Rollout | None = None


class Rule(VariationOrRollout, rename="camel", frozen=True, gc=False):
    """Clauses, all of which must match, and the variation or rollout for them."""

    id: str = ""
    clauses: list[Clause] | None = None
    track_events: bool = False


class Target(Struct, rename="camel", frozen=True, gc=False):
    """Keys that get a variation individually."""

    variation: Number = 0
    values: list[str] | None = None
    context_kind: str = ""


class Prerequisite(Struct, rename="camel", frozen=True, gc=False):
    """Another flag that must be on and evaluate to this variation."""

    key: str = ""
    variation: Number = 0


class ClientSideAvailability(Struct, rename="camel", frozen=True, gc=False):
    """Client-side SDKs that may see the flag."""

    using_mobile_key: bool = False
    using_environment_id: bool = False


class Migration(Struct, rename="camel", frozen=True, gc=False):
    """Settings of a migration flag."""

    check_ratio: Number | None = None


class Flag(Struct, rename="camel", frozen=True, gc=False):
    """A feature flag."""

    key: str = ""
    version: Number = 0
    deleted: bool = False
    on: bool = False
    prerequisites: list[Prerequisite] | None = None
    targets: list[Target] | None = None
    context_targets: list[Target] | None = None
    rules: list[Rule] | None = None
    fallthrough: VariationOrRollout = VariationOrRollout()
    off_variation: Number | None = None
    variations: list[Any] | None = None
    client_side_availability: ClientSideAvailability | None = None
    client_side: bool | UnsetType = UNSET
    salt: str = ""
    track_events: bool = False
    track_events_fallthrough: bool = False
    debug_events_until_date: Number | None = None
    migration: Migration | None = None
    sampling_ratio: Number | None = None
    exclude_from_summaries: bool = False
