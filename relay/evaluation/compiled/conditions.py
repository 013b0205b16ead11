"""Clauses and segments compiled to predicates over contexts, with their operands parsed once.

`Uncompilable` is raised for everything that would make an evaluation fail; the flag is then left to
the interpreter.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from msgspec import Struct

from relay.evaluation.bucketing import hash_prefix, share
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
from relay.evaluation.data import NOT_CONFIGURED, segment_reference
from relay.evaluation.operators import ZERO_TIME, is_number, regex, semantic_version, timestamp
from relay.evaluation.results import BigSegmentsStatus
from relay.model.context import DEFAULT_KIND, Individual, Reference, lookup, parse_reference
from relay.model.flag import Clause
from relay.model.segment import Segment, SegmentRule, SegmentTarget

MAX_SHARED_VALUES = 32
"""Values up to which equal clauses are shared between flags. Longer lists are hardly ever equal."""

Predicate = Callable[[EvalContext], bool]
Condition = Feature[bool] | bool
"""A predicate as a feature, or its result if that is the same for every context."""

Test = Callable[[Any], bool]
"""Returns whether one value of an attribute, not an array, matches any value of a clause."""


def all_of(conditions: Iterable[Condition]) -> Condition:
    """Return the condition that all conditions hold."""
    conditions = list(conditions)
    parts = _undecided(conditions, decisive=False)
    if any(condition is False for condition in conditions):
        return _constant(all_of(parts), result=False) if _consult(parts) else False
    if not parts:
        return True
    if len(parts) == 1:
        return parts[0]
    predicates = [part.value for part in parts]

    def all_hold(context: EvalContext) -> bool:
        for holds in predicates:  # noqa: SIM110  # a generator would take twice as long
            if not holds(context):
                return False
        return True

    return Feature(all_hold, triggers_of_all(parts), parts)


def any_of(conditions: Iterable[Condition]) -> Condition:
    """Return the condition that at least one condition holds."""
    conditions = list(conditions)
    parts = _undecided(conditions, decisive=True)
    if any(condition is True for condition in conditions):
        return _constant(any_of(parts), result=True) if _consult(parts) else True
    if not parts:
        return False
    if len(parts) == 1:
        return parts[0]
    predicates = [part.value for part in parts]

    def any_holds(context: EvalContext) -> bool:
        for holds in predicates:  # noqa: SIM110  # as above
            if holds(context):
                return True
        return False

    return Feature(any_holds, triggers_of_any(parts), parts)


def _undecided(conditions: Iterable[Condition], *, decisive: bool) -> list[Feature[bool]]:
    """Return the conditions that depend on the context, up to the first decisive constant."""
    parts: list[Feature[bool]] = []
    for condition in conditions:
        if condition is decisive:
            break
        if not isinstance(condition, bool):
            parts.append(condition)
    return parts


def _consult(parts: Iterable[Feature[bool]]) -> bool:
    return any(part.consults for part in parts)


def _constant(condition: Condition, *, result: bool) -> Condition:
    """Return a condition with a known result that looks at the same big segments as another."""
    if isinstance(condition, bool):
        return result
    evaluate = condition.value

    def known(context: EvalContext) -> bool:
        evaluate(context)
        return result

    return Feature(known, (), (condition,))


def negation_of(condition: Condition) -> Condition:
    """Return the condition that a condition does not hold."""
    if isinstance(condition, bool):
        return not condition
    holds = condition.value
    return Feature(lambda context: not holds(context), condition.triggers, (condition,))


def clause_condition(clause: Clause) -> Condition:
    """Return the condition that an attribute matches: all operators but `segmentMatch`.

    Raises:
        Uncompilable: the attribute is missing or not a valid reference.
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
    return Feature(predicate, (_clause_trigger(kind, path, clause),), is_simple=True)


_MATCHES = {match.value: match for match in Match}


def _clause_trigger(kind: str, path: Reference, clause: Clause) -> Trigger:
    match = _MATCHES.get(clause.op, Match.PRESENT)
    values = clause.values or ()
    # A negated clause holds for nearly every context that has the attribute.
    if match is Match.PRESENT or clause.negate or len(values) > MAX_SHARED_VALUES:
        return Trigger(kind, path, Match.PRESENT, ())
    types = (str, int, float) if match is Match.EQUAL else str
    return Trigger(kind, path, match, [each for each in values if isinstance(each, types)])


def _kind_matches(test: Test, negate: bool) -> Predicate:
    return lambda context: any(map(test, context.individuals)) is not negate


def _deep_value_matches(kind: str, path: Reference, test: Test, negate: bool) -> Predicate:
    def holds(context: EvalContext) -> bool:
        individual = context.individuals.get(kind)
        value = None if individual is None else lookup(individual, path)
        return value is not None and _matches(value, test) is not negate

    return holds


def _value_matches(kind: str, name: str, test: Test, negate: bool) -> Predicate:
    def holds(context: EvalContext) -> bool:
        individual = context.individuals.get(kind)
        if individual is None:
            return False
        value = individual.attributes.get(name)
        return value is not None and _matches(value, test) is not negate

    return holds


def _is_one_of(kind: str, name: str, strings: frozenset[str], negate: bool) -> Predicate:
    """Return `_value_matches` for `in` with strings, the most frequent clause, in fewer steps."""

    def test(value: Any) -> bool:
        return isinstance(value, str) and value in strings

    def holds(context: EvalContext) -> bool:
        individual = context.individuals.get(kind)
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
    """Return the test of an operator from `operators.OPERATORS`, with its operands parsed."""
    if op in _ORDERS:
        return _ordered_test(_ORDERS[op], values)
    if op == "in":
        return _equals_one_of(values)
    strings = tuple(value for value in values if isinstance(value, str))
    if op in _STRING_TESTS and strings:
        return _STRING_TESTS[op](strings)
    return _never


def _equals_one_of(values: Sequence[Any]) -> Test:
    """Return the test of `in`. Booleans stand apart because they equal 0 and 1 in Python."""
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


def _matches_pattern(patterns: tuple[str, ...]) -> Test:
    searches = [search for search in map(regex, patterns) if search is not None]
    if not searches:
        return _never

    def test(value: Any) -> bool:
        if not isinstance(value, str):
            return False
        text = value.encode()
        return any(search(text) is not None for search in searches)

    return test


_STRING_TESTS: dict[str, Callable[[tuple[str, ...]], Test]] = {
    "startsWith": _starts_with,
    "endsWith": _ends_with,
    "contains": _contains,
    "matches": _matches_pattern,
}


class _Order(Struct, frozen=True):
    """An operator on ordered values.

    Args:
        read: converts a value to a comparable one, or to None.
        compare: the operator.
        decisive: picks the operand that decides: less than any means less than the greatest.
    """

    read: Callable[[Any], Any]
    compare: Callable[[Any, Any], bool]
    decisive: Callable[[Iterable[Any]], Any]


_NUMBERS = (int, float)
"""Types of decoded JSON numbers; compared with `type()`, so that booleans are not among them."""


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


def _ordered_test(order: _Order, values: Sequence[Any]) -> Test:
    read, compare = order.read, order.compare
    if read is _number:
        return _ordered_number_test(order, [value for value in values if is_number(value)])
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


def _ordered_number_test(order: _Order, operands: Sequence[Any]) -> Test:
    """Return the test that `_ordered_test` would, in fewer steps."""
    if not operands:
        return _never
    compare, decisive = order.compare, order.decisive(operands)
    return lambda value: type(value) in _NUMBERS and compare(value, decisive)


SegmentCondition = Callable[[str], Condition]
"""Returns the condition of being in the segment with a key; False for an unknown segment."""


class ConditionCache:
    """Interned conditions: equal conditions are one object for as long as any flag uses it.

    Clauses are keyed by their JSON. Combinations are keyed by the `id()` of their parts, as equal
    parts are usually the same object; that is sound because every feature keeps its parts alive, so
    no id in a key is reused while the entry exists. The cache holds its values weakly: a condition
    vanishes with the last compiled flag that uses it.
    """

    def __init__(self) -> None:
        self._shared: WeakValueDictionary[object, Feature[bool]] = WeakValueDictionary()

    def clauses(self, clauses: Iterable[Clause] | None, in_segment: SegmentCondition) -> Condition:
        """Return the condition that all clauses match.

        Raises:
            Uncompilable: a clause is malformed, or refers to an uncompilable segment.
        """
        parts = [self._clause(clause, in_segment) for clause in clauses or ()]
        return self._combine("all", parts, all_of)

    def segment(self, segment: Segment, in_segment: SegmentCondition) -> Condition:
        """Return the condition of being in the segment (evaluation 6.7).

        Raises:
            Uncompilable: it has a malformed rule.
        """
        if segment.unbounded and segment.generation is None:
            return Feature(_is_not_configured, (), by_chance=True, consults=True)
        rules = [self._segment_rule(segment, rule, in_segment) for rule in segment.rules or ()]
        if segment.unbounded:
            return _big_segment(segment, any_of(rules))
        lists = _KeyLists(
            frozenset(segment.included or ()),
            _keys_by_kind(segment.included_contexts),
            frozenset(segment.excluded or ()),
            _keys_by_kind(segment.excluded_contexts),
        )
        return lists.followed_by(any_of(rules))

    def _clause(self, clause: Clause, in_segment: SegmentCondition) -> Condition:
        values = clause.values or ()
        if clause.op == "segmentMatch":
            parts = [in_segment(key) for key in values if isinstance(key, str)]
            if clause.negate:
                return self._combine("none", parts, lambda parts: negation_of(any_of(parts)))
            return self._combine("any", parts, any_of)
        if len(values) > MAX_SHARED_VALUES:
            return clause_condition(clause)
        key = msgspec.json.encode(clause)
        return self._shared.get(key) or self._share(key, clause_condition(clause))

    def _segment_rule(
        self, segment: Segment, rule: SegmentRule, in_segment: SegmentCondition
    ) -> Condition:
        clauses = self.clauses(rule.clauses, in_segment)
        if rule.weight is None:
            return clauses
        return all_of([clauses, Feature(_is_in_share(segment, rule), by_chance=True)])

    def _combine(
        self,
        operation: str,
        parts: list[Condition],
        combine: Callable[[list[Condition]], Condition],
    ) -> Condition:
        # No id is reused while the entry exists: a feature keeps its parts alive.
        key = (operation, *(part if isinstance(part, bool) else id(part) for part in parts))
        return self._shared.get(key) or self._share(key, combine(parts))

    def _share(self, key: object, condition: Condition) -> Condition:
        if not isinstance(condition, bool):
            self._shared[key] = condition
        return condition


def _keys_by_kind(
    targets: Sequence[SegmentTarget] | None,
) -> tuple[tuple[str, frozenset[str]], ...]:
    keys = ((each.context_kind or DEFAULT_KIND, each.values) for each in targets or ())
    return tuple((kind, frozenset(values)) for kind, values in keys if values)


class _KeyLists(Struct, frozen=True):
    """Keys that a segment includes or excludes regardless of its rules."""

    included: frozenset[str]
    included_contexts: tuple[tuple[str, frozenset[str]], ...]
    excluded: frozenset[str]
    excluded_contexts: tuple[tuple[str, frozenset[str]], ...]

    def followed_by(self, rules: Condition) -> Condition:
        """Return the condition in which the lists take precedence over the rules."""
        if not (self.included or self.included_contexts or self.excluded or self.excluded_contexts):
            return rules
        has_other_kinds = self.included_contexts or self.excluded_contexts
        rules_value = rules if isinstance(rules, bool) else rules.value
        contains = (
            self._contains_any_kind(rules_value)
            if has_other_kinds
            else self._contains_user(rules_value)
        )
        parts = () if isinstance(rules, bool) else (rules,)
        return Feature(contains, self._triggers(rules), parts)

    def _triggers(self, rules: Condition) -> Triggers:
        rule_triggers = () if isinstance(rules, bool) else rules.triggers
        if rule_triggers is None:
            return None
        keys_by_kind = [(DEFAULT_KIND, self.included), *self.included_contexts]
        if rules if isinstance(rules, bool) else rules.usual:
            keys_by_kind += [(DEFAULT_KIND, self.excluded), *self.excluded_contexts]
        key_triggers = (
            Trigger(kind, KEY, Match.EQUAL, keys) for kind, keys in keys_by_kind if keys
        )
        return (*key_triggers, *rule_triggers)

    def _contains_user(self, rules: Predicate | bool) -> Predicate:
        included, excluded = self.included, self.excluded

        def contains(context: EvalContext) -> bool:
            user = context.individuals.get(DEFAULT_KIND)
            if user is not None:
                if user.key in included:
                    return True
                if user.key in excluded:
                    return False
            return rules if isinstance(rules, bool) else rules(context)

        return contains

    def _contains_any_kind(self, rules: Predicate | bool) -> Predicate:
        included, excluded = self.included, self.excluded

        def contains(context: EvalContext) -> bool:
            individuals = context.individuals
            user = individuals.get(DEFAULT_KIND)
            # A context that is just a user is looked up in the user lists only.
            check_other_kinds = not context.is_just_a_user
            if user is not None and user.key in included:
                return True
            if check_other_kinds and _is_listed(individuals, self.included_contexts):
                return True
            if user is not None and user.key in excluded:
                return False
            if check_other_kinds and _is_listed(individuals, self.excluded_contexts):
                return False
            return rules if isinstance(rules, bool) else rules(context)

        return contains


def _is_not_configured(context: EvalContext) -> bool:
    context.consult(BigSegmentsStatus.NOT_CONFIGURED)
    return False


def _big_segment(segment: Segment, rules: Condition) -> Condition:
    """Return the condition of being in a big segment: a membership takes precedence over rules."""
    kind = segment.unbounded_context_kind or DEFAULT_KIND
    reference = segment_reference(segment)
    decided = rules if isinstance(rules, bool) else None
    evaluate = (lambda _context: False) if isinstance(rules, bool) else rules.value

    def contains(context: EvalContext) -> bool:
        individual = context.individuals.get(kind)
        if individual is None:
            return False
        membership = context.memberships.get(individual.key, NOT_CONFIGURED)
        context.consult(membership.status)
        member = membership.segments.get(reference)
        if member is not None:
            return member
        return evaluate(context) if decided is None else decided

    parts = () if isinstance(rules, bool) else (rules,)
    # Members are many, and hardly two contexts are in the same segments.
    return Feature(contains, None, parts, by_chance=True, consults=True)


def _is_listed(
    individuals: Mapping[str, Individual], lists: Iterable[tuple[str, frozenset[str]]]
) -> bool:
    for kind, keys in lists:
        individual = individuals.get(kind)
        if individual is not None and individual.key in keys:
            return True
    return False


def _is_in_share(segment: Segment, rule: SegmentRule) -> Predicate:
    """Return the predicate that a context is within the share of a weighted rule."""
    prefix = hash_prefix(segment.key, segment.salt)
    digest_of = hashing(rule.rollout_context_kind, rule.bucket_by, prefix, experiment=False)
    bound = threshold(share(rule.weight or 0))

    def is_admitted(context: EvalContext) -> bool:
        digest = digest_of(context)
        return digest is not None and digest < bound

    return is_admitted
