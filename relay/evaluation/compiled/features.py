"""Features: what the result of a flag depends on, and which contexts they may tell apart at all."""

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
    """A way in which an attribute may match one of several values."""

    EQUAL = "in"
    START = "startsWith"
    END = "endsWith"
    PRESENT = ""

    __hash__ = object.__hash__  # as in `Audience`


class Trigger(NamedTuple):
    """Values of an attribute, or of a member of an array, one of which a context must have.

    Args:
        kind: of the individual.
        path: to the attribute.
        match: how it has to match.
        values: any of which it has to match; only strings unless `match` is EQUAL. There are none
            for PRESENT, which says that the attribute has to be there.
    """

    kind: str
    path: Reference
    match: Match
    values: Collection[Any]


Triggers = tuple[Trigger, ...] | None
"""A feature has its usual value where none of them holds; None if there is no telling."""


class Feature(Generic[T_co]):
    """Something that contexts have in common with many others: a condition, or being targeted.

    Args:
        value: computes it; what it returns is compared by identity.
        triggers: without which the value is that of a context without individuals.
        parts: what it is made of, which live as long as it does.
        is_simple: whether it depends on nothing but the attribute of its only trigger.
        by_chance: whether it depends on hashes, so that nearly each context is another case; so
            does what has such a part.
    """

    __slots__ = ("__weakref__", "_parts", "by_chance", "is_simple", "triggers", "usual", "value")

    def __init__(
        self,
        value: Callable[[EvalContext], T_co],
        triggers: Triggers = None,
        parts: Sequence[Feature[Any]] = (),
        *,
        is_simple: bool = False,
        by_chance: bool = False,
    ) -> None:
        self.value = value
        self.triggers = triggers
        self.is_simple = is_simple
        self.by_chance: bool = by_chance or any(part.by_chance for part in parts)
        self._parts = parts
        self.usual = value(NOBODY)
        """The value for a context without individuals, and for most others."""


def triggers_of_all(parts: Sequence[Feature[bool]]) -> Triggers:
    """Return the triggers of a condition that holds if all parts do.

    Where it usually does not, because of one part, it takes that part to make it hold.
    """
    decisive = [part.triggers for part in parts if not part.usual and part.triggers is not None]
    if decisive:
        return min(decisive, key=_size)
    return triggers_of_any(parts)


def triggers_of_any(parts: Sequence[Feature[bool]]) -> Triggers:
    """Return the triggers of a condition that any of its parts may change."""
    triggers: list[Trigger] = []
    for part in parts:
        if part.triggers is None:
            return None
        triggers.extend(part.triggers)
    return tuple(triggers)


def _size(triggers: tuple[Trigger, ...]) -> float:
    return sum(
        math.inf if trigger.match is Match.PRESENT else len(trigger.values) for trigger in triggers
    )
