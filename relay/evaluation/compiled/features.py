"""Features: the properties of a context that decide flags, and the values that may change them.

A feature is a condition or a list of targets. For most contexts it has its usual value, the one for
a context without individuals. Its triggers tell which contexts may have another one, so that an
index (`relay.evaluation.compiled.index`) finds those without evaluating every feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar

from relay.evaluation.compiled.context import NOBODY, EvalContext
from relay.model.context import Reference

T_co = TypeVar("T_co", covariant=True)


KEY: Reference = ("key",)


class Match(Enum):
    """The ways in which an attribute can match one of several values."""

    EQUAL = "in"
    START = "startsWith"
    END = "endsWith"
    PRESENT = ""

    __hash__ = object.__hash__  # as in `SDKKind`


class Trigger(NamedTuple):
    """A match of one attribute, or of a member if it is an array, that may change a feature.

    Args:
        kind: context kind of the individual.
        path: path to the attribute.
        match: the way of matching.
        values: the attribute must match one of these; only strings unless `match` is EQUAL. Empty
            for PRESENT, which matches any value.
    """

    kind: str
    path: Reference
    match: Match
    values: Collection[Any]


Triggers = tuple[Trigger, ...] | None
"""A feature has its usual value if no trigger matches; None if that cannot be predicted."""


class Feature(Generic[T_co]):
    """A property that many contexts share: a condition, or being targeted.

    Args:
        value: computes the value for a context; values are compared by identity.
        triggers: the matches without which the value is the usual one.
        parts: the features it is composed of; kept alive, as `ConditionCache` holds them weakly.
        is_simple: it depends only on the attribute of its single trigger.
        by_chance: it depends on a hash, so that nearly every context is a case of its own; true
            as well if that holds for any of its parts.
        consults: it may look at big segments, which the reason of a flag mentions; true as well if
            that holds for any of its parts.
    """

    __slots__ = (
        "__weakref__",
        "_parts",
        "by_chance",
        "consults",
        "is_simple",
        "triggers",
        "usual",
        "value",
    )

    def __init__(
        self,
        value: Callable[[EvalContext], T_co],
        triggers: Triggers = None,
        parts: Sequence[Feature[Any]] = (),
        *,
        is_simple: bool = False,
        by_chance: bool = False,
        consults: bool = False,
    ) -> None:
        self.value = value
        self.triggers = triggers
        self.is_simple = is_simple
        self.by_chance: bool = by_chance or any(part.by_chance for part in parts)
        self.consults: bool = consults or any(part.consults for part in parts)
        self._parts = parts
        self.usual = value(NOBODY)
        """The value for a context without individuals, and for most other contexts."""


def triggers_of_all(parts: Sequence[Feature[bool]]) -> Triggers:
    """Return the triggers of a condition that holds if all parts hold.

    If a part usually does not hold, the whole needs that part: its triggers alone are enough. Of
    several such parts, the one with the fewest values is chosen.
    """
    decisive = [part.triggers for part in parts if not part.usual and part.triggers is not None]
    if decisive:
        return min(decisive, key=_selectivity)
    return triggers_of_any(parts)


def triggers_of_any(parts: Sequence[Feature[bool]]) -> Triggers:
    """Return the triggers of a condition that a change of any part may change."""
    triggers: list[Trigger] = []
    for part in parts:
        if part.triggers is None:
            return None
        triggers.extend(part.triggers)
    return tuple(triggers)


def _selectivity(triggers: tuple[Trigger, ...]) -> float:
    return sum(
        math.inf if trigger.match is Match.PRESENT else len(trigger.values) for trigger in triggers
    )
