"""An index from values of attributes to the features that they may change.

Most conditions of most flags do not hold for most contexts. Instead of asking them all, those that
may hold are looked up: by a whole value, and by starts and ends of each length that conditions
have. What is found need not be right, only complete: the features themselves are asked then. For
values that come again, as countries and versions do, what depends on nothing else is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from relay.evaluation.compiled.context import EvalContext
from relay.evaluation.compiled.features import Feature, Match, Trigger
from relay.model.context import Reference, lookup

MAX_LENGTH = 32
"""Characters of a start or an end that are looked up, so that there are no more lengths than this.
Longer ones are found by as much of them."""

MAX_ENTRIES = 32
"""Values under which a feature is entered. Where there are more, they are asked as a set."""

MAX_TEXT = 64
"""Characters of a value that is remembered."""

MAX_REMEMBERED = 64 * 1024
"""Features that are remembered for values, all together: some 3 MB."""

VALUE_SIZE = 8
"""What remembering a value costs beside that, in features."""

Found = set[Feature[Any]]
Unusual = dict[Feature[Any], Any]
"""Features that do not have their usual value, and the value of each."""


class Index:
    """The features of the flags of a program. Complete before it is used.

    Args:
        before: the index of an earlier program; what was entered there is not entered again.
    """

    def __init__(self, before: Index | None = None) -> None:
        self._features: Found = set()
        self._old = _Entries() if before is None else before.lasting()
        self._new = _Entries()

    @property
    def size(self) -> int:
        """The number of features that may be unusual, those of earlier programs included."""
        return len(self._old.features) + len(self._new.features)

    def add(self, features: Iterable[Feature[Any]]) -> None:
        """Enter features; those that are known already do not count."""
        for feature in features:
            if feature not in self._features:
                self._features.add(feature)
                if feature not in self._old.features:
                    self._new.enter(feature)

    def unusual(self, subject: EvalContext) -> Unusual:
        """Return what is unusual about a subject. Some may be features of an earlier program."""
        unusual = self._old.unusual(subject)
        if self._new.features:
            unusual |= self._new.unusual(subject)
        return unusual

    def lasting(self) -> _Entries:
        """Return the entries that the next index goes on with: those of which it will use most."""
        used = len(self._features) - len(self._new.features)
        if used < len(self._new.features):
            return self._new
        return self._old if 2 * used >= len(self._old.features) else _Entries()


class _Effect(NamedTuple):
    """The consequences of one value of an attribute.

    Args:
        unusual: features that depend on nothing else.
        mixed: features that may be unusual, as they depend on other attributes, too.
    """

    unusual: Unusual
    mixed: tuple[Feature[Any], ...]

    @property
    def size(self) -> int:
        """The cost of remembering it, as `MAX_REMEMBERED` counts."""
        return VALUE_SIZE + len(self.unusual) + len(self.mixed)


class _Entries:
    """What has been entered at some time, for the indexes of several programs."""

    def __init__(self) -> None:
        self.features: Found = set()
        self._always: list[tuple[Feature[Any], Callable[[EvalContext], Any], Any]] = []
        """Those without triggers, with their functions and usual values."""
        self._tables: dict[tuple[str, Reference], _Table] = {}
        self._effects: dict[tuple[object, ...], _Effect] = {}
        """By table and value."""
        self._size = 0

    def enter(self, feature: Feature[Any]) -> None:
        self.features.add(feature)
        if feature.triggers is None:
            self._always.append((feature, feature.value, feature.usual))
            return
        for trigger in feature.triggers:
            place = trigger.kind, trigger.path
            table = self._tables.get(place)
            if table is None:
                table = self._tables[place] = _Table()
            table.enter(trigger, feature)

    def unusual(self, subject: EvalContext) -> Unusual:
        unusual = {
            feature: value
            for feature, value_of, usual in self._always
            if (value := value_of(subject)) is not usual
        }
        found: Found = set()
        for (kind, path), table in self._tables.items():
            individual = subject.individuals.get(kind)
            value = None if individual is None else lookup(individual, path)
            if value is None:
                continue
            key = table.key(value)
            if key is None:
                table.find(value, found)
                continue
            effect = self._effects.get(key)
            if effect is None:
                effect = self._learn(key, table, value, subject)
            else:
                table.hits += 1
            unusual.update(effect.unusual)
            found.update(effect.mixed)
        for feature in found:
            value = feature.value(subject)
            if value is not feature.usual:
                unusual[feature] = value
        return unusual

    def _learn(
        self, key: tuple[object, ...], table: _Table, value: Any, subject: EvalContext
    ) -> _Effect:
        found: Found = set()
        table.find(value, found)
        simple = [feature for feature in found if feature.is_simple]
        values = {feature: feature.value(subject) for feature in simple}
        unusual = {
            feature: value for feature, value in values.items() if value is not feature.usual
        }
        effect = _Effect(unusual, tuple(found.difference(simple)))
        table.misses += 1
        self._size += effect.size
        if self._size > MAX_REMEMBERED:
            self._forget()
        else:
            self._effects[key] = effect
        return effect

    def _forget(self) -> None:
        self._effects.clear()
        self._size = 0
        for table in self._tables.values():
            table.judge()


class _Table:
    """The features that depend on one attribute."""

    __slots__ = ("_ends", "_others", "_repeats", "_sets", "_starts", "_wholes", "hits", "misses")

    def __init__(self) -> None:
        self._wholes: dict[Any, list[Feature[Any]]] = {}
        self._sets: list[tuple[Collection[Any], Feature[Any]]] = []
        self._starts: dict[int, dict[str, list[Feature[Any]]]] = {}
        """By length, then by text."""
        self._ends: dict[int, dict[str, list[Feature[Any]]]] = {}
        self._others: list[Feature[Any]] = []
        self._repeats = True
        self.hits = 0
        self.misses = 0

    def enter(self, trigger: Trigger, feature: Feature[Any]) -> None:
        match, values = trigger.match, trigger.values
        if match is Match.PRESENT:
            self._others.append(feature)
        elif match is Match.EQUAL and len(values) > MAX_ENTRIES:
            self._sets.append((values, feature))
        elif match is Match.EQUAL:
            for value in values:
                self._wholes.setdefault(value, []).append(feature)
        else:
            start = match is Match.START
            by_length = self._starts if start else self._ends
            for value in values:
                text = value[:MAX_LENGTH] if start else value[-MAX_LENGTH:]
                by_length.setdefault(len(text), {}).setdefault(text, []).append(feature)

    def find(self, value: Any, found: Found) -> None:
        """Add the features that a value may change."""
        found.update(self._others)
        if isinstance(value, list):
            for each in value:
                self._find(each, found)
        else:
            self._find(value, found)

    def _find(self, value: Any, found: Found) -> None:
        if not isinstance(value, str | int | float):
            return
        found.update(self._wholes.get(value, ()))
        found.update([feature for values, feature in self._sets if value in values])
        if isinstance(value, str):
            for length, starts in self._starts.items():
                found.update(starts.get(value[:length], ()))
            size = len(value)
            for length, ends in self._ends.items():
                # Not value[-length:], which is all of it where the length is 0.
                found.update(ends.get(value[max(0, size - length) :], ()))

    def key(self, value: Any) -> tuple[object, ...] | None:
        """Return the name under which the effect of a value is remembered; None if it is not."""
        if not self._repeats:
            return None
        if isinstance(value, str):
            return (self, value) if len(value) <= MAX_TEXT else None
        # True, 1 and 1.0 are equal, but not to flags.
        return (self, type(value), value) if isinstance(value, int | float) else None

    def judge(self) -> None:
        """Give up remembering if most values did not come again."""
        self._repeats = self._repeats and self.hits >= self.misses
        self.hits = self.misses = 0
