"""Index from attribute values to the features that they may change.

Most conditions of most flags do not hold for most contexts. Instead of evaluating all of them, the
index finds candidates: by the whole value, and by its prefixes and suffixes of every length that
conditions use. Candidates must be complete but may be wrong: they are evaluated afterwards. For
values that recur, such as countries and versions, the features that depend on nothing else are
cached.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from relay.evaluation.compiled.context import EvalContext
from relay.evaluation.compiled.features import Feature, Match, Trigger
from relay.model.context import Reference, lookup

MAX_LENGTH = 32
"""Characters of a prefix or suffix to look up, which bounds the number of lengths to try. Longer
ones are found by their first or last characters."""

MAX_ENTRIES = 32
"""Values up to which a feature is entered under each of them; longer lists are tested as sets."""

MAX_CACHED_LENGTH = 64
"""Characters up to which a value's effect is cached."""

MAX_CACHED = 64 * 1024
"""Features in all cached effects together: some 3 MB."""

VALUE_SIZE = 8
"""Cost of a cached effect beside its features, in features."""

FeatureSet = set[Feature[Any]]
Unusual = dict[Feature[Any], Any]
"""Features that do not have their usual value, with their values."""


class Index:
    """Index of the features of a program's flags; all are added before the first look-up.

    Args:
        previous: the index of an earlier program, whose entries are reused.
    """

    def __init__(self, previous: Index | None = None) -> None:
        self._features: FeatureSet = set()
        self._old = _Entries() if previous is None else previous.reusable()
        self._new = _Entries()

    @property
    def size(self) -> int:
        """Number of features in the index, those of earlier programs included."""
        return len(self._old.features) + len(self._new.features)

    def add(self, features: Iterable[Feature[Any]]) -> None:
        """Add features; those already present are skipped."""
        for feature in features:
            if feature not in self._features:
                self._features.add(feature)
                if feature not in self._old.features:
                    self._new.add(feature)

    def unusual(self, context: EvalContext) -> Unusual:
        """Return the unusual features of a context; some may belong to an earlier program."""
        unusual = self._old.unusual(context)
        if self._new.features:
            unusual |= self._new.unusual(context)
        return unusual

    def reusable(self) -> _Entries:
        """Return the entries for the next index to reuse: those of which it will need most."""
        used = len(self._features) - len(self._new.features)
        if used < len(self._new.features):
            return self._new
        return self._old if 2 * used >= len(self._old.features) else _Entries()


class _Effect(NamedTuple):
    """The effect of one attribute value on the features.

    Args:
        unusual: features that depend on this attribute only.
        mixed: features that may be unusual, depending on other attributes.
    """

    unusual: Unusual
    mixed: tuple[Feature[Any], ...]

    @property
    def size(self) -> int:
        """Its cost in the cache, as counted by `MAX_CACHED`."""
        return VALUE_SIZE + len(self.unusual) + len(self.mixed)


class _Entries:
    """Features by attribute, shared by the indexes of successive programs."""

    def __init__(self) -> None:
        self.features: FeatureSet = set()
        self._always: list[tuple[Feature[Any], Callable[[EvalContext], Any], Any]] = []
        """Features without triggers, with their functions and usual values."""
        self._tables: dict[tuple[str, Reference], _Table] = {}
        self._effects: dict[tuple[object, ...], _Effect] = {}
        """Cache of effects by table and value."""
        self._size = 0

    def add(self, feature: Feature[Any]) -> None:
        self.features.add(feature)
        if feature.triggers is None:
            self._always.append((feature, feature.value, feature.usual))
            return
        for trigger in feature.triggers:
            attribute = trigger.kind, trigger.path
            table = self._tables.get(attribute)
            if table is None:
                table = self._tables[attribute] = _Table()
            table.add(trigger, feature)

    def unusual(self, context: EvalContext) -> Unusual:
        unusual = {
            feature: value
            for feature, value_of, usual in self._always
            if (value := value_of(context)) is not usual
        }
        candidates: FeatureSet = set()
        for (kind, path), table in self._tables.items():
            individual = context.individuals.get(kind)
            value = None if individual is None else lookup(individual, path)
            if value is None:
                continue
            key = table.key(value)
            if key is None:
                table.collect(value, candidates)
                continue
            effect = self._effects.get(key)
            if effect is None:
                effect = self._cache_effect(key, table, value, context)
            else:
                table.hits += 1
            unusual.update(effect.unusual)
            candidates.update(effect.mixed)
        for feature in candidates:
            value = feature.value(context)
            if value is not feature.usual:
                unusual[feature] = value
        return unusual

    def _cache_effect(
        self, key: tuple[object, ...], table: _Table, value: Any, context: EvalContext
    ) -> _Effect:
        candidates: FeatureSet = set()
        table.collect(value, candidates)
        simple = [feature for feature in candidates if feature.is_simple]
        values = {feature: feature.value(context) for feature in simple}
        unusual = {
            feature: value for feature, value in values.items() if value is not feature.usual
        }
        effect = _Effect(unusual, tuple(candidates.difference(simple)))
        table.misses += 1
        self._size += effect.size
        if self._size > MAX_CACHED:
            self._clear_cache()
        else:
            self._effects[key] = effect
        return effect

    def _clear_cache(self) -> None:
        self._effects.clear()
        self._size = 0
        for table in self._tables.values():
            table.check_hit_rate()


class _Table:
    """The features that depend on one attribute."""

    __slots__ = (
        "_by_prefix",
        "_by_suffix",
        "_by_value",
        "_on_presence",
        "_recurs",
        "_value_sets",
        "hits",
        "misses",
    )

    def __init__(self) -> None:
        self._by_value: dict[Any, list[Feature[Any]]] = {}
        self._value_sets: list[tuple[Collection[Any], Feature[Any]]] = []
        self._by_prefix: dict[int, dict[str, list[Feature[Any]]]] = {}
        """Features by length of the prefix, then by its text."""
        self._by_suffix: dict[int, dict[str, list[Feature[Any]]]] = {}
        """Features by length of the suffix, then by its text."""
        self._on_presence: list[Feature[Any]] = []
        self._recurs = True
        self.hits = 0
        self.misses = 0

    def add(self, trigger: Trigger, feature: Feature[Any]) -> None:
        match, values = trigger.match, trigger.values
        if match is Match.PRESENT:
            self._on_presence.append(feature)
        elif match is Match.EQUAL and len(values) > MAX_ENTRIES:
            self._value_sets.append((values, feature))
        elif match is Match.EQUAL:
            for value in values:
                self._by_value.setdefault(value, []).append(feature)
        else:
            is_prefix = match is Match.START
            by_length = self._by_prefix if is_prefix else self._by_suffix
            for value in values:
                text = value[:MAX_LENGTH] if is_prefix else value[-MAX_LENGTH:]
                by_length.setdefault(len(text), {}).setdefault(text, []).append(feature)

    def collect(self, value: Any, candidates: FeatureSet) -> None:
        """Add the features that a value may change."""
        candidates.update(self._on_presence)
        if isinstance(value, list):
            for each in value:
                self._collect(each, candidates)
        else:
            self._collect(value, candidates)

    def _collect(self, value: Any, candidates: FeatureSet) -> None:
        if not isinstance(value, str | int | float):
            return
        candidates.update(self._by_value.get(value, ()))
        candidates.update([feature for values, feature in self._value_sets if value in values])
        if isinstance(value, str):
            for length, by_prefix in self._by_prefix.items():
                candidates.update(by_prefix.get(value[:length], ()))
            size = len(value)
            for length, by_suffix in self._by_suffix.items():
                # Not value[-length:], which is the whole value if the length is 0.
                candidates.update(by_suffix.get(value[max(0, size - length) :], ()))

    def key(self, value: Any) -> tuple[object, ...] | None:
        """Return the cache key of the effect of a value; None if it is not to be cached."""
        if not self._recurs:
            return None
        if isinstance(value, str):
            return (self, value) if len(value) <= MAX_CACHED_LENGTH else None
        # True, 1 and 1.0 are equal in Python, but not to flags.
        return (self, type(value), value) if isinstance(value, int | float) else None

    def check_hit_rate(self) -> None:
        """Stop caching the effects of values if most of them did not recur."""
        self._recurs = self._recurs and self.hits >= self.misses
        self.hits = self.misses = 0
