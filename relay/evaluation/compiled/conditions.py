"""Clauses and segments as predicates over subjects, with their operands prepared once.

Only what is sound is compiled: `Uncompilable` is raised for whatever makes an evaluation fail or
asks for more than the data at hand, and the flag is left to the interpreter.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from relay.evaluation.bucketing import salted, share
from relay.evaluation.compiled.context import EvalContext, Uncompilable
from relay.evaluation.compiled.features import (
    KEY,
    Feature,
    Match,
    Trigger,
    Triggers,
    triggers_of_all,
    triggers_of_any,
)
from relay.evaluation.compiled.hashing import hashing
from relay.evaluation.compiled.thresholds import threshold
from relay.evaluation.operators import ZERO_TIME, is_number, regex, semantic_version, timestamp
from relay.model.context import DEFAULT_KIND, Individual, Reference, lookup, parse_reference
from relay.model.flag import Clause
from relay.model.segment import Segment, SegmentRule, SegmentTarget

MAX_SHARED_VALUES = 32
"""Values of a clause that may be another flag's, too. Longer lists are particular."""

Predicate = Callable[[EvalContext], bool]
Condition = Feature[bool] | bool
"""A predicate as a feature, or its result if that is the same for every subject."""

Test = Callable[[Any], bool]
"""Whether one value of an attribute, not an array, matches any value of a clause."""


def all_of(conditions: Iterable[Condition]) -> Condition:
    """Return whether all conditions hold."""
    open_ones = [condition for condition in conditions if condition is not True]
    if not open_ones:
        return True
    parts = [condition for condition in open_ones if condition is not False]
    if len(parts) < len(open_ones):
        return False
    if len(parts) == 1:
        return parts[0]
    predicates = [part.value for part in parts]

    def every(subject: EvalContext) -> bool:
        for holds in predicates:  # noqa: SIM110  # a generator would take twice as long
            if not holds(subject):
                return False
        return True

    return Feature(every, triggers_of_all(parts), parts)


def any_of(conditions: Iterable[Condition]) -> Condition:
    """Return whether at least one condition holds."""
    open_ones = [condition for condition in conditions if condition is not False]
    if not open_ones:
        return False
    parts = [condition for condition in open_ones if condition is not True]
    if len(parts) < len(open_ones):
        return True
    if len(parts) == 1:
        return parts[0]
    predicates = [part.value for part in parts]

    def some(subject: EvalContext) -> bool:
        for holds in predicates:  # noqa: SIM110  # as above
            if holds(subject):
                return True
        return False

    return Feature(some, triggers_of_any(parts), parts)


def negated(condition: Condition) -> Condition:
    """Return whether the condition does not hold."""
    if isinstance(condition, bool):
        return not condition
    holds = condition.value
    return Feature(lambda subject: not holds(subject), condition.triggers, (condition,))


def clause_condition(clause: Clause) -> Condition:
    """Return whether a context's attribute matches: all operators but `segmentMatch`.

    Raises:
        Uncompilable: the attribute is missing or no valid reference.
    """
    path = parse_reference(clause.attribute, literal=not clause.context_kind)
    if path is None:
        raise Uncompilable
    values = clause.values or []
    test = _test(clause.op, values)
    if test is _never and not clause.negate:
        return False
    if clause.attribute == "kind":
        return Feature(_kind_matches(test, clause.negate))
    kind = clause.context_kind or DEFAULT_KIND
    if len(path) > 1:
        predicate = _deep_value_matches(kind, path, test, clause.negate)
    elif clause.op == "in" and all(isinstance(value, str) for value in values):
        predicate = _is_one_of(kind, path[0], frozenset(values), clause.negate)
    else:
        predicate = _value_matches(kind, path[0], test, clause.negate)
    return Feature(predicate, (_trigger(kind, path, clause),), is_simple=True)


_MATCHES = {match.value: match for match in Match}


def _trigger(kind: str, path: Reference, clause: Clause) -> Trigger:
    match = _MATCHES.get(clause.op, Match.PRESENT)
    values = clause.values or ()
    # A negated clause holds for nearly everybody who has the attribute.
    if match is Match.PRESENT or clause.negate or len(values) > MAX_SHARED_VALUES:
        return Trigger(kind, path, Match.PRESENT, ())
    wanted = (str, int, float) if match is Match.EQUAL else str
    return Trigger(kind, path, match, [each for each in values if isinstance(each, wanted)])


def _kind_matches(test: Test, negate: bool) -> Predicate:
    return lambda subject: any(map(test, subject.individuals)) is not negate


def _deep_value_matches(kind: str, path: Reference, test: Test, negate: bool) -> Predicate:
    def holds(subject: EvalContext) -> bool:
        individual = subject.individuals.get(kind)
        value = None if individual is None else lookup(individual, path)
        return value is not None and _matches(value, test) is not negate

    return holds


def _value_matches(kind: str, name: str, test: Test, negate: bool) -> Predicate:
    def holds(subject: EvalContext) -> bool:
        individual = subject.individuals.get(kind)
        if individual is None:
            return False
        value = individual.attributes.get(name)
        return value is not None and _matches(value, test) is not negate

    return holds


def _is_one_of(kind: str, name: str, strings: frozenset[str], negate: bool) -> Predicate:
    """Return what most clauses of most flags are, in fewer steps than `_value_matches`."""

    def test(value: Any) -> bool:
        return isinstance(value, str) and value in strings

    def holds(subject: EvalContext) -> bool:
        individual = subject.individuals.get(kind)
        if individual is None:
            return False
        value = individual.attributes.get(name)
        if isinstance(value, str):
            return (value in strings) is not negate
        return value is not None and _matches(value, test) is not negate

    return holds


def _matches(value: Any, test: Test) -> bool:
    return any(map(test, value)) if isinstance(value, list) else test(value)


def _never(_value: object) -> bool:
    return False


def _test(op: str, values: Sequence[Any]) -> Test:
    """Return an operator with its operands read, as `operators.OPERATORS` defines it."""
    if op in _ORDERS:
        return _ordered(_ORDERS[op], values)
    if op == "in":
        return _equals_one_of(values)
    strings = tuple(value for value in values if isinstance(value, str))
    if op in _OF_STRINGS and strings:
        return _OF_STRINGS[op](strings)
    return _never


def _equals_one_of(values: Sequence[Any]) -> Test:
    """Booleans stand apart because Python takes them for numbers."""
    booleans = frozenset(value for value in values if isinstance(value, bool))
    scalars = frozenset(value for value in values if isinstance(value, str) or is_number(value))
    if not booleans and not scalars:
        return _never

    def test(value: Any) -> bool:
        if isinstance(value, bool):
            return value in booleans
        return isinstance(value, str | int | float) and value in scalars

    return test


def _starts_with(strings: tuple[str, ...]) -> Test:
    return lambda value: isinstance(value, str) and value.startswith(strings)


def _ends_with(strings: tuple[str, ...]) -> Test:
    return lambda value: isinstance(value, str) and value.endswith(strings)


def _contains(strings: tuple[str, ...]) -> Test:
    return lambda value: isinstance(value, str) and any(text in value for text in strings)


def _finds(patterns: tuple[str, ...]) -> Test:
    searches = [search for search in map(regex, patterns) if search is not None]
    if not searches:
        return _never

    def test(value: Any) -> bool:
        if not isinstance(value, str):
            return False
        text = value.encode()
        return any(search(text) is not None for search in searches)

    return test


_OF_STRINGS: dict[str, Callable[[tuple[str, ...]], Test]] = {
    "startsWith": _starts_with,
    "endsWith": _ends_with,
    "contains": _contains,
    "matches": _finds,
}


@dataclass(frozen=True, slots=True)
class _Order:
    """An operator on values that have an order.

    Args:
        read: makes something comparable of a value, or None.
        compare: the operator.
        decisive: picks the operand that decides for all: less than any is less than the greatest.
    """

    read: Callable[[Any], Any]
    compare: Callable[[Any, Any], bool]
    decisive: Callable[[Iterable[Any]], Any]


_NUMBERS = (int, float)
"""The types that JSON has for numbers; booleans have one of their own."""


def _number(value: Any) -> Any:
    return value if is_number(value) else None


_ORDERS = {
    "lessThan": _Order(_number, operator.lt, max),
    "lessThanOrEqual": _Order(_number, operator.le, max),
    "greaterThan": _Order(_number, operator.gt, min),
    "greaterThanOrEqual": _Order(_number, operator.ge, min),
    "before": _Order(timestamp, operator.lt, max),
    "after": _Order(timestamp, operator.gt, min),
    "semVerEqual": _Order(semantic_version, operator.contains, frozenset),
    "semVerLessThan": _Order(semantic_version, operator.lt, max),
    "semVerGreaterThan": _Order(semantic_version, operator.gt, min),
}


def _ordered(order: _Order, values: Sequence[Any]) -> Test:
    read, compare = order.read, order.compare
    if read is _number:
        return _ordered_numbers(order, [value for value in values if is_number(value)])
    operands = [each for each in map(read, values) if each is not None]
    if read is timestamp:
        operands = [each for each in operands if each != ZERO_TIME]
    if not operands:
        return _never
    decisive = order.decisive(operands)
    if compare is operator.contains:
        return lambda value: read(value) in decisive

    def test(value: Any) -> bool:
        comparable = read(value)
        return comparable is not None and compare(comparable, decisive)

    return test


def _ordered_numbers(order: _Order, operands: Sequence[Any]) -> Test:
    """Return what `_ordered` would, in fewer steps."""
    if not operands:
        return _never
    compare, decisive = order.compare, order.decisive(operands)
    return lambda value: type(value) in _NUMBERS and compare(value, decisive)


SegmentCondition = Callable[[str], Condition]
"""Gives the condition of being in the segment of a key; False for an unknown one."""


class ConditionCache:
    """Conditions that many flags have. Equal ones are the same object as long as one has them."""

    def __init__(self) -> None:
        self._shared: WeakValueDictionary[object, Feature[bool]] = WeakValueDictionary()

    def clauses(self, clauses: Iterable[Clause] | None, in_segment: SegmentCondition) -> Condition:
        """Return whether all clauses match.

        Raises:
            Uncompilable: a clause is malformed, or asks for such a segment.
        """
        parts = [self._clause(clause, in_segment) for clause in clauses or ()]
        return self._made_of("all", parts, all_of)

    def segment(self, segment: Segment, in_segment: SegmentCondition) -> Condition:
        """Return whether a subject is in the segment (evaluation 6.7).

        Raises:
            Uncompilable: the segment is a big one, or has something malformed.
        """
        if segment.unbounded:
            raise Uncompilable
        rules = [self._segment_rule(segment, rule, in_segment) for rule in segment.rules or ()]
        listed = _Lists(
            frozenset(segment.included or ()),
            _of_kinds(segment.included_contexts),
            frozenset(segment.excluded or ()),
            _of_kinds(segment.excluded_contexts),
        )
        return listed.before(any_of(rules))

    def _clause(self, clause: Clause, in_segment: SegmentCondition) -> Condition:
        values = clause.values or ()
        if clause.op == "segmentMatch":
            parts = [in_segment(key) for key in values if isinstance(key, str)]
            if clause.negate:
                return self._made_of("none", parts, lambda them: negated(any_of(them)))
            return self._made_of("any", parts, any_of)
        if len(values) > MAX_SHARED_VALUES:
            return clause_condition(clause)
        name = msgspec.json.encode(clause)
        return self._shared.get(name) or self._share(name, clause_condition(clause))

    def _segment_rule(
        self, segment: Segment, rule: SegmentRule, in_segment: SegmentCondition
    ) -> Condition:
        clauses = self.clauses(rule.clauses, in_segment)
        if rule.weight is None:
            return clauses
        return all_of([clauses, Feature(_admission(segment, rule), by_chance=True)])

    def _made_of(
        self, how: str, parts: list[Condition], make: Callable[[list[Condition]], Condition]
    ) -> Condition:
        # Parts are the same objects if they are equal, and live as long as what is made of them.
        name = (how, *(part if isinstance(part, bool) else id(part) for part in parts))
        return self._shared.get(name) or self._share(name, make(parts))

    def _share(self, name: object, condition: Condition) -> Condition:
        if not isinstance(condition, bool):
            self._shared[name] = condition
        return condition


def _of_kinds(targets: Sequence[SegmentTarget] | None) -> tuple[tuple[str, frozenset[str]], ...]:
    keys = ((each.context_kind or DEFAULT_KIND, each.values) for each in targets or ())
    return tuple((kind, frozenset(values)) for kind, values in keys if values)


@dataclass(frozen=True, slots=True)
class _Lists:
    """Keys that are in a segment, or out of it, whatever its rules say."""

    included: frozenset[str]
    included_contexts: tuple[tuple[str, frozenset[str]], ...]
    excluded: frozenset[str]
    excluded_contexts: tuple[tuple[str, frozenset[str]], ...]

    def before(self, rules: Condition) -> Condition:
        """Return the condition in which the lists count before the rules."""
        if not (self.included or self.included_contexts or self.excluded or self.excluded_contexts):
            return rules
        full = self.included_contexts or self.excluded_contexts
        otherwise = rules if isinstance(rules, bool) else rules.value
        contains = self._full(otherwise) if full else self._of_users(otherwise)
        parts = () if isinstance(rules, bool) else (rules,)
        return Feature(contains, self._triggers(rules), parts)

    def _triggers(self, rules: Condition) -> Triggers:
        of_rules = () if isinstance(rules, bool) else rules.triggers
        if of_rules is None:
            return None
        listed = [(DEFAULT_KIND, self.included), *self.included_contexts]
        if rules if isinstance(rules, bool) else rules.usual:
            listed += [(DEFAULT_KIND, self.excluded), *self.excluded_contexts]
        keys = (Trigger(kind, KEY, Match.EQUAL, keys) for kind, keys in listed if keys)
        return (*keys, *of_rules)

    def _of_users(self, rules: Predicate | bool) -> Predicate:
        included, excluded = self.included, self.excluded

        def contains(subject: EvalContext) -> bool:
            user = subject.individuals.get(DEFAULT_KIND)
            if user is not None:
                if user.key in included:
                    return True
                if user.key in excluded:
                    return False
            return rules if isinstance(rules, bool) else rules(subject)

        return contains

    def _full(self, rules: Predicate | bool) -> Predicate:
        included, excluded = self.included, self.excluded

        def contains(subject: EvalContext) -> bool:
            individuals = subject.individuals
            user = individuals.get(DEFAULT_KIND)
            # A context that is just a user is looked for in the lists of users only.
            others = not subject.is_just_a_user
            if user is not None and user.key in included:
                return True
            if others and _is_listed(individuals, self.included_contexts):
                return True
            if user is not None and user.key in excluded:
                return False
            if others and _is_listed(individuals, self.excluded_contexts):
                return False
            return rules if isinstance(rules, bool) else rules(subject)

        return contains


def _is_listed(
    individuals: Mapping[str, Individual], lists: Iterable[tuple[str, frozenset[str]]]
) -> bool:
    for kind, keys in lists:
        individual = individuals.get(kind)
        if individual is not None and individual.key in keys:
            return True
    return False


def _admission(segment: Segment, rule: SegmentRule) -> Predicate:
    """Return whether a subject is in the share that a rule admits."""
    prefix = salted(segment.key, segment.salt)
    hashed = hashing(rule.rollout_context_kind, rule.bucket_by, prefix, experiment=False)
    bound = threshold(share(rule.weight or 0))

    def admitted(subject: EvalContext) -> bool:
        digest = hashed(subject)
        return digest is not None and digest < bound

    return admitted
