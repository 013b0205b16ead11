"""The interpreter: evaluates one flag the way the specification reads (evaluation 6.3 to 6.9).

This is the definition of a result: `relay.evaluation.compiled` is faster and must return the
same bytes. `relay eval` prints the trace recorded here. There are two kinds of error: `_Malformed`
ends the whole evaluation from any depth, while an error result of a single flag only makes it an
unsatisfied prerequisite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from relay.evaluation import bucketing
from relay.evaluation.data import NOT_CONFIGURED, Data, segment_reference
from relay.evaluation.operators import OPERATORS
from relay.evaluation.results import (
    BigSegmentsStatus,
    EvaluationDetail,
    Reason,
    ReasonKind,
    TraceStep,
)
from relay.model.context import DEFAULT_KIND, Context, Reference, lookup, parse_reference
from relay.model.flag import Clause, Flag, Number, Prerequisite, Rollout, Target, VariationOrRollout
from relay.model.segment import Segment, SegmentRule, SegmentTarget

MAX_CHAIN = 50
"""Longest chain of prerequisites, and deepest nesting of segments; beyond that a flag is malformed.
Python's stack has ample space for both at once, and real environments nest only a few levels."""


class _Malformed(Exception):
    """A cycle, or a clause or segment that cannot be evaluated: the whole evaluation fails."""


class _Result(NamedTuple):
    """Result of a flag; `chain` is the length of its longest chain of prerequisites, itself too."""

    variation: int | None
    reason: Reason
    chain: int = 1


class _SegmentResult(NamedTuple):
    """Result of a segment; `chain` is its deepest nesting of segments, itself included."""

    contains: bool
    chain: int


_ERROR = _Result(None, Reason(ReasonKind.ERROR))


def evaluate(flag: Flag, context: Context, data: Data) -> EvaluationDetail:
    """Evaluate a live flag for a context.

    Args:
        flag: with raw variations (see `relay.evaluation.data.parse_flag`).
        context: must not be one that `has_empty_key`.
        data: everything else that the flag may depend on.
    """
    evaluation = _Evaluation(context, data)
    try:
        result = evaluation.evaluate_flag(flag, ())
    except _Malformed as e:
        evaluation.trace("malformed: %s", str(e))
        result = _ERROR
    reason = replace(result.reason, big_segments=evaluation.big_segments)
    return EvaluationDetail(
        result.variation,
        reason,
        tuple(evaluation.prerequisites),
        is_experiment(flag, reason),
        tuple(evaluation.steps),
    )


def is_experiment(flag: Flag, reason: Reason) -> bool:
    """Return whether events of this evaluation are always sent (evaluation 6.8)."""
    if reason.kind is ReasonKind.FALLTHROUGH:
        return reason.in_experiment or flag.track_events_fallthrough
    if reason.kind is ReasonKind.RULE_MATCH:
        rules = flag.rules or ()
        return reason.in_experiment or rules[reason.rule_index].track_events
    return False


class _Evaluation:
    """State of one evaluation. Evaluates each prerequisite and each segment at most once."""

    def __init__(self, context: Context, data: Data) -> None:
        self.prerequisites: list[str] = []
        self.big_segments: BigSegmentsStatus | None = None
        self.steps: list[TraceStep] = []
        self._context = context
        self._data = data
        self._depth = 0
        self._nested = 0  # deepest chain of segments found so far within the current one
        self._flags: dict[str, _Result] = {}
        self._segments: dict[str, _SegmentResult] = {}

    def trace(self, text: str, *arguments: object) -> None:
        """Add a step to the trace."""
        self.steps.append(TraceStep(self._depth, text, arguments))

    # Section 6.3: flags

    def evaluate_flag(self, flag: Flag, chain: tuple[str, ...]) -> _Result:
        """Evaluate a flag; `chain` lists the flags that led to it, the requested one first.

        Raises:
            _Malformed: a cycle, or a clause in a rule that cannot be evaluated.
        """
        if not flag.on:
            self.trace('flag "%s" is off', flag.key)
            return _off_result(flag, Reason(ReasonKind.OFF))
        failed, length = self._find_failed_prerequisite(flag, (*chain, flag.key))
        if failed is not None:
            reason = Reason(ReasonKind.PREREQUISITE_FAILED, prerequisite=failed)
            return _off_result(flag, reason)._replace(chain=length)
        return self._evaluate_targets_and_rules(flag)._replace(chain=length)

    def _evaluate_targets_and_rules(self, flag: Flag) -> _Result:
        """Evaluate targets, rules and fallthrough of a flag whose prerequisites are satisfied."""
        target = self._targeted_variation(flag)
        if target is not None:
            self.trace("its key is listed for variation %d", int(target))
            return _variation_result(flag, target, Reason(ReasonKind.TARGET_MATCH))
        for index, rule in enumerate(flag.rules or ()):
            self.trace('rule %d "%s"', index, rule.id)
            if self._all_match(rule.clauses, ()):
                reason = Reason(ReasonKind.RULE_MATCH, rule_index=index, rule_id=rule.id)
                return self._evaluate_choice(flag, rule, reason)
        self.trace("no rule matches: fallthrough")
        return self._evaluate_choice(flag, flag.fallthrough, Reason(ReasonKind.FALLTHROUGH))

    # Section 6.4: prerequisites

    def _find_failed_prerequisite(
        self, flag: Flag, chain: tuple[str, ...]
    ) -> tuple[str | None, int]:
        """Return the key of the first failing prerequisite or None, and the length of the chain."""
        length = 1
        for prerequisite in flag.prerequisites or ():
            required = self._data.flag(prerequisite.key)
            if required is None:
                self.trace('prerequisite "%s" does not exist', prerequisite.key)
                return prerequisite.key, length
            result = self._evaluate_prerequisite(prerequisite, required, chain)
            length = max(length, 1 + result.chain)
            if len(chain) == 1:
                self.prerequisites.append(prerequisite.key)
            if not (required.on and result.variation == int(prerequisite.variation)):
                self.trace('prerequisite "%s" fails', prerequisite.key)
                return prerequisite.key, length
        return None, length

    def _evaluate_prerequisite(
        self, prerequisite: Prerequisite, flag: Flag, chain: tuple[str, ...]
    ) -> _Result:
        """Evaluate a prerequisite, or return its earlier result.

        Raises:
            _Malformed: it is in a cycle or the chain is too long.
        """
        key = prerequisite.key
        if key in chain:
            raise _Malformed(f'prerequisite "{key}" depends on itself')
        known = self._flags.get(key)
        if len(chain) + (known.chain if known else 1) > MAX_CHAIN:
            raise _Malformed(f"more than {MAX_CHAIN} flags depend on each other in a row")
        if known is None:
            self.trace('prerequisite "%s" must give variation %d', key, int(prerequisite.variation))
            self._depth += 1
            known = self.evaluate_flag(flag, chain)
            self._depth -= 1
            self._flags[key] = known
        self.trace('prerequisite "%s" gives variation %s', key, known.variation)
        return known

    # Section 6.5: targets

    def _targeted_variation(self, flag: Flag) -> Number | None:
        """Return the variation that a target assigns to the context; None if no target does."""
        if not flag.context_targets:
            return next(
                (each.variation for each in flag.targets or () if self._is_listed(each)), None
            )
        for target in flag.context_targets:
            effective: Target | None = target
            # A target for users without keys stands for the user target of the same variation.
            if target.context_kind in {"", DEFAULT_KIND} and not target.values:
                effective = _target_of_variation(flag.targets or (), target.variation)
            if effective is not None and self._is_listed(effective):
                return target.variation
        return None

    def _is_listed(self, target: Target | SegmentTarget) -> bool:
        return self._has_key(target.context_kind, target.values)

    def _has_key(self, kind: str, keys: Sequence[str] | None) -> bool:
        individual = self._context.get(kind)
        return individual is not None and individual.key in (keys or ())

    # Section 6.6: clauses

    def _all_match(self, clauses: Sequence[Clause] | None, enclosing: tuple[str, ...]) -> bool:
        """Return whether all clauses match; `enclosing` are the segments around them."""
        return all(self._clause_matches(clause, enclosing) for clause in clauses or ())

    def _clause_matches(self, clause: Clause, enclosing: tuple[str, ...]) -> bool:
        if clause.op == "segmentMatch":
            matches = self._in_any_segment(clause.values or (), enclosing) != clause.negate
        else:
            matches = self._attribute_matches(clause)
        self.trace(
            "%s %s %s%s: %s",
            f"{clause.context_kind or DEFAULT_KIND} {clause.attribute}".rstrip(),
            clause.op,
            clause.values or [],
            " (negated)" if clause.negate else "",
            "matches" if matches else "does not match",
        )
        return matches

    def _attribute_matches(self, clause: Clause) -> bool:
        path = parse_reference(clause.attribute, literal=not clause.context_kind)
        if path is None:
            raise _Malformed(f'invalid attribute reference "{clause.attribute}"')
        if clause.attribute == "kind":
            return any(_matches_any(clause, kind) for kind in self._context.kinds) != clause.negate
        individual = self._context.get(clause.context_kind)
        value = lookup(individual, path) if individual is not None else None
        if value is None:
            return False
        values = value if isinstance(value, list) else [value]
        return any(_matches_any(clause, each) for each in values) != clause.negate

    # Section 6.7: segments

    def _in_any_segment(self, keys: Sequence[Any], enclosing: tuple[str, ...]) -> bool:
        for key in keys:
            segment = self._data.segment(key) if isinstance(key, str) else None
            if segment is not None and self._in_segment(key, segment, enclosing):
                return True
        return False

    def _in_segment(self, key: str, segment: Segment, enclosing: tuple[str, ...]) -> bool:
        """Return whether a segment contains the context; `enclosing` are the segments around it."""
        if segment.key in enclosing:
            raise _Malformed(f'segment "{segment.key}" depends on itself')
        known = self._segments.get(key)
        if len(enclosing) + (known.chain if known else 1) > MAX_CHAIN:
            raise _Malformed(f"more than {MAX_CHAIN} segments are nested")
        if known is None:
            self.trace('segment "%s"', key)
            self._depth += 1
            outside, self._nested = self._nested, 0
            contains = self._evaluate_segment(segment, (*enclosing, segment.key))
            known = _SegmentResult(contains, 1 + self._nested)
            self._nested = outside
            self._depth -= 1
            self._segments[key] = known
        self._nested = max(self._nested, known.chain)
        self.trace(
            'segment "%s" %s', key, "contains it" if known.contains else "does not contain it"
        )
        return known.contains

    def _evaluate_segment(self, segment: Segment, enclosing: tuple[str, ...]) -> bool:
        if segment.unbounded:
            membership, has_rules = self._membership_in_store(segment)
        else:
            membership, has_rules = self._membership_in_lists(segment), True
        if membership is not None or not has_rules:
            return bool(membership)
        return any(
            self._segment_rule_matches(segment, rule, enclosing) for rule in segment.rules or ()
        )

    def _membership_in_lists(self, segment: Segment) -> bool | None:
        """Return True if the lists include the context, False if they exclude it, else None."""
        only_user = not self._context.is_multi and self._context.get(DEFAULT_KIND) is not None
        included = () if only_user else segment.included_contexts or ()
        excluded = () if only_user else segment.excluded_contexts or ()
        if self._has_key(DEFAULT_KIND, segment.included) or any(map(self._is_listed, included)):
            return True
        if self._has_key(DEFAULT_KIND, segment.excluded) or any(map(self._is_listed, excluded)):
            return False
        return None

    def _membership_in_store(self, segment: Segment) -> tuple[bool | None, bool]:
        """Return the membership in a big segment, if known, and whether rules apply otherwise."""
        if segment.generation is None:
            self._note_big_segments(BigSegmentsStatus.NOT_CONFIGURED)
            return None, False
        individual = self._context.get(segment.unbounded_context_kind)
        if individual is None:
            return None, False
        membership = self._data.memberships.get(individual.key, NOT_CONFIGURED)
        self._note_big_segments(membership.status)
        return membership.segments.get(segment_reference(segment)), True

    def _note_big_segments(self, status: BigSegmentsStatus) -> None:
        self.trace("big segments: %s", status.value)
        self.big_segments = status.worse(self.big_segments)

    def _segment_rule_matches(
        self, segment: Segment, rule: SegmentRule, enclosing: tuple[str, ...]
    ) -> bool:
        if not self._all_match(rule.clauses, enclosing):
            return False
        if rule.weight is None:
            return True
        kind = rule.rollout_context_kind
        by, valid = _bucket_by(rule.bucket_by, kind)
        if not valid:
            raise _Malformed(f'invalid attribute reference "{rule.bucket_by}"')
        if self._context.get(kind) is None:
            return False
        prefix = bucketing.hash_prefix(segment.key, segment.salt)
        position = bucketing.bucket(self._context, kind, by, prefix, include_secondary=True)
        self.trace("bucket %s of %s", position, bucketing.share(rule.weight))
        return position < bucketing.share(rule.weight)

    # Section 6.9: variation or rollout

    def _evaluate_choice(self, flag: Flag, choice: VariationOrRollout, reason: Reason) -> _Result:
        if choice.variation is not None:
            return _variation_result(flag, choice.variation, reason)
        rollout = choice.rollout
        if rollout is None or not rollout.variations:
            self.trace("it has neither a variation nor a rollout")
            return _ERROR
        by, valid = _bucket_by(rollout.bucket_by, rollout.context_kind)
        if rollout.kind == "experiment":
            by = None
        elif not valid:
            self.trace('invalid attribute reference "%s"', rollout.bucket_by)
            return _ERROR
        return self._evaluate_rollout(flag, rollout, rollout.variations, by, reason)

    def _evaluate_rollout(
        self,
        flag: Flag,
        rollout: Rollout,
        variations: Sequence[Any],
        by: Reference | None,
        reason: Reason,
    ) -> _Result:
        experiment = rollout.kind == "experiment"
        prefix = bucketing.hash_prefix(flag.key, flag.salt, rollout.seed)
        position = bucketing.bucket(
            self._context, rollout.context_kind, by, prefix, include_secondary=not experiment
        )
        index, reached = bucketing.choose(position, variations)
        chosen = variations[index]
        self.trace("bucket %s: number %d of the rollout", position, index)
        lacks_kind = self._context.get(rollout.context_kind) is None
        in_experiment = experiment and not chosen.untracked and not (lacks_kind and reached)
        return _variation_result(
            flag, chosen.variation, replace(reason, in_experiment=in_experiment)
        )


def _off_result(flag: Flag, reason: Reason) -> _Result:
    if flag.off_variation is None:
        return _Result(None, reason)
    return _variation_result(flag, flag.off_variation, reason)


def _variation_result(flag: Flag, variation: Number, reason: Reason) -> _Result:
    index = int(variation)
    return _Result(index, reason) if 0 <= index < len(flag.variations or ()) else _ERROR


def _target_of_variation(targets: Sequence[Target], variation: Number) -> Target | None:
    return next((each for each in targets if int(each.variation) == int(variation)), None)


def _matches_any(clause: Clause, value: object) -> bool:
    """Return whether a value matches any value of a clause."""
    matches = OPERATORS.get(clause.op)
    return matches is not None and any(matches(value, each) for each in clause.values or ())


def _bucket_by(text: str | None, kind: str) -> tuple[Reference | None, bool]:
    """Return the attribute to hash, None for the key, and whether the reference is valid."""
    if not text:
        return None, True
    path = parse_reference(text, literal=not kind)
    return path, path is not None
