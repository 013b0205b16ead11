"""The interpreter: evaluation as the specification tells it, sentence by sentence (6.3 to 6.9).

It is the definition. `relay.evaluation.program` is faster and must give the same; `relay eval`
shows the steps that are noted here. Two kinds of error are told apart: `_Malformed` ends the whole
evaluation from any depth; an error that is the result of one flag only makes it a prerequisite that
is not satisfied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from relay.evaluation import bucketing
from relay.evaluation.data import Data, Membership
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
"""Flags that may be prerequisites of each other in a row, and segments that may be nested; more is
malformed. Python's stack holds both at once with room to spare; nobody has more than a handful."""

_UNKNOWN = Membership(BigSegmentsStatus.NOT_CONFIGURED)


class _Malformed(Exception):
    """A cycle, or a clause or segment that cannot be evaluated: the flag asked for is an error."""


class _Result(NamedTuple):
    """What a flag gives; `chain` is the number of flags that had to be evaluated in a row."""

    variation: int | None
    reason: Reason
    chain: int = 1


class _Contained(NamedTuple):
    """Whether a segment contains the context; `chain` as above, of segments."""

    answer: bool
    chain: int


_ERROR = _Result(None, Reason(ReasonKind.ERROR))


def evaluate(flag: Flag, context: Context, data: Data) -> EvaluationDetail:
    """Return what a live flag gives to a context, and why.

    Args:
        flag: with raw variations, as `relay.evaluation.items` parses it.
        context: not `has_empty_key`.
        data: everything else that the flag may depend on.
    """
    run = _Run(context, data)
    try:
        result = run.flag(flag, ())
    except _Malformed as e:
        run.trace("malformed: %s", str(e))
        result = _ERROR
    reason = replace(result.reason, big_segments=run.big_segments)
    return EvaluationDetail(
        result.variation,
        reason,
        tuple(run.prerequisites),
        is_experiment(flag, reason),
        tuple(run.steps),
    )


def is_experiment(flag: Flag, reason: Reason) -> bool:
    """Tell whether LaunchDarkly wants events of this evaluation in any case (6.8)."""
    if reason.kind is ReasonKind.FALLTHROUGH:
        return reason.in_experiment or flag.track_events_fallthrough
    if reason.kind is ReasonKind.RULE_MATCH:
        rules = flag.rules or ()
        return reason.in_experiment or rules[reason.rule_index].track_events
    return False


class _Run:
    """One evaluation. Each other flag and each segment is evaluated once, however often needed."""

    def __init__(self, context: Context, data: Data) -> None:
        self.prerequisites: list[str] = []
        self.big_segments: BigSegmentsStatus | None = None
        self.steps: list[TraceStep] = []
        self._context = context
        self._data = data
        self._depth = 0
        self._nested = 0  # the longest chain of segments within the one that is being evaluated
        self._flags: dict[str, _Result] = {}
        self._segments: dict[str, _Contained] = {}

    def trace(self, text: str, *arguments: object) -> None:
        """Add a step."""
        self.steps.append(TraceStep(self._depth, text, arguments))

    # Section 6.3: flags

    def flag(self, flag: Flag, chain: tuple[str, ...]) -> _Result:
        """Evaluate a flag that is needed by the flags of `chain`, the one asked for first.

        Raises:
            _Malformed: a cycle, or a clause in a rule that cannot be evaluated.
        """
        if not flag.on:
            self.trace('flag "%s" is off', flag.key)
            return _off(flag, Reason(ReasonKind.OFF))
        failed, length = self._failed_prerequisite(flag, (*chain, flag.key))
        if failed is not None:
            reason = Reason(ReasonKind.PREREQUISITE_FAILED, prerequisite=failed)
            return _off(flag, reason)._replace(chain=length)
        return self._targeted(flag)._replace(chain=length)

    def _targeted(self, flag: Flag) -> _Result:
        """Evaluate a flag whose prerequisites are satisfied."""
        target = self._target(flag)
        if target is not None:
            self.trace("its key is listed for variation %d", int(target))
            return _variation(flag, target, Reason(ReasonKind.TARGET_MATCH))
        for index, rule in enumerate(flag.rules or ()):
            self.trace('rule %d "%s"', index, rule.id)
            if self._matches(rule.clauses, ()):
                reason = Reason(ReasonKind.RULE_MATCH, rule_index=index, rule_id=rule.id)
                return self._outcome(flag, rule, reason)
        self.trace("no rule matches: fallthrough")
        return self._outcome(flag, flag.fallthrough, Reason(ReasonKind.FALLTHROUGH))

    # Section 6.4: prerequisites

    def _failed_prerequisite(self, flag: Flag, chain: tuple[str, ...]) -> tuple[str | None, int]:
        """Return the key of the first prerequisite that fails, and the length of the chain."""
        length = 1
        for prerequisite in flag.prerequisites or ():
            needed = self._data.flag(prerequisite.key)
            if needed is None:
                self.trace('prerequisite "%s" does not exist', prerequisite.key)
                return prerequisite.key, length
            result = self._needed(prerequisite, needed, chain)
            length = max(length, 1 + result.chain)
            if len(chain) == 1:
                self.prerequisites.append(prerequisite.key)
            if not (needed.on and result.variation == int(prerequisite.variation)):
                self.trace('prerequisite "%s" fails', prerequisite.key)
                return prerequisite.key, length
        return None, length

    def _needed(self, prerequisite: Prerequisite, flag: Flag, chain: tuple[str, ...]) -> _Result:
        """Evaluate a prerequisite."""
        key = prerequisite.key
        if key in chain:
            raise _Malformed(f'prerequisite "{key}" depends on itself')
        known = self._flags.get(key)
        if len(chain) + (known.chain if known else 1) > MAX_CHAIN:
            raise _Malformed(f"more than {MAX_CHAIN} flags depend on each other in a row")
        if known is None:
            self.trace('prerequisite "%s" must give variation %d', key, int(prerequisite.variation))
            self._depth += 1
            known = self.flag(flag, chain)
            self._depth -= 1
            self._flags[key] = known
        self.trace('prerequisite "%s" gives variation %s', key, known.variation)
        return known

    # Section 6.5: targets

    def _target(self, flag: Flag) -> Number | None:
        """Return the variation for which a key of the context is listed."""
        if not flag.context_targets:
            return next((each.variation for each in flag.targets or () if self._lists(each)), None)
        for target in flag.context_targets:
            listed: Target | None = target
            if target.context_kind in {"", DEFAULT_KIND} and not target.values:
                listed = _of_variation(flag.targets or (), target.variation)
            if listed is not None and self._lists(listed):
                return target.variation
        return None

    def _lists(self, target: Target | SegmentTarget) -> bool:
        return self._has_key(target.context_kind, target.values)

    def _has_key(self, kind: str, keys: Sequence[str] | None) -> bool:
        individual = self._context.get(kind)
        return individual is not None and individual.key in (keys or ())

    # Section 6.6: clauses

    def _matches(self, clauses: Sequence[Clause] | None, segments: tuple[str, ...]) -> bool:
        """Tell whether all clauses match; `segments` are those within which this is asked."""
        return all(self._clause(clause, segments) for clause in clauses or ())

    def _clause(self, clause: Clause, segments: tuple[str, ...]) -> bool:
        if clause.op == "segmentMatch":
            matches = self._in_any(clause.values or (), segments) != clause.negate
        else:
            matches = self._attribute(clause)
        self.trace(
            "%s %s %s%s: %s",
            f"{clause.context_kind or DEFAULT_KIND} {clause.attribute}".rstrip(),
            clause.op,
            clause.values or [],
            " (negated)" if clause.negate else "",
            "matches" if matches else "does not match",
        )
        return matches

    def _attribute(self, clause: Clause) -> bool:
        path = parse_reference(clause.attribute, literal=not clause.context_kind)
        if path is None:
            raise _Malformed(f'invalid attribute reference "{clause.attribute}"')
        if clause.attribute == "kind":
            return any(_any(clause, kind) for kind in self._context.kinds) != clause.negate
        individual = self._context.get(clause.context_kind)
        value = lookup(individual, path) if individual is not None else None
        if value is None:
            return False
        values = value if isinstance(value, list) else [value]
        return any(_any(clause, each) for each in values) != clause.negate

    # Section 6.7: segments

    def _in_any(self, keys: Sequence[Any], within: tuple[str, ...]) -> bool:
        for key in keys:
            segment = self._data.segment(key) if isinstance(key, str) else None
            if segment is not None and self._in(key, segment, within):
                return True
        return False

    def _in(self, key: str, segment: Segment, within: tuple[str, ...]) -> bool:
        """Tell whether a segment contains the context; `within` are the segments that ask."""
        if segment.key in within:
            raise _Malformed(f'segment "{segment.key}" depends on itself')
        known = self._segments.get(key)
        if len(within) + (known.chain if known else 1) > MAX_CHAIN:
            raise _Malformed(f"more than {MAX_CHAIN} segments are nested")
        if known is None:
            self.trace('segment "%s"', key)
            self._depth += 1
            outside, self._nested = self._nested, 0
            answer = self._contains(segment, (*within, segment.key))
            known = _Contained(answer, 1 + self._nested)
            self._nested = outside
            self._depth -= 1
            self._segments[key] = known
        self._nested = max(self._nested, known.chain)
        self.trace('segment "%s" %s', key, "contains it" if known.answer else "does not contain it")
        return known.answer

    def _contains(self, segment: Segment, chain: tuple[str, ...]) -> bool:
        if segment.unbounded:
            listed, has_rules = self._listed_in_store(segment)
        else:
            listed, has_rules = self._listed(segment), True
        if listed is not None or not has_rules:
            return bool(listed)
        return any(self._admits(segment, rule, chain) for rule in segment.rules or ())

    def _listed(self, segment: Segment) -> bool | None:
        """Return what a segment's lists say; None for nothing."""
        only_user = not self._context.is_multi and self._context.get(DEFAULT_KIND) is not None
        included = () if only_user else segment.included_contexts or ()
        excluded = () if only_user else segment.excluded_contexts or ()
        if self._has_key(DEFAULT_KIND, segment.included) or any(map(self._lists, included)):
            return True
        if self._has_key(DEFAULT_KIND, segment.excluded) or any(map(self._lists, excluded)):
            return False
        return None

    def _listed_in_store(self, segment: Segment) -> tuple[bool | None, bool]:
        """Return what the store of big segments says, and whether rules count if it is silent."""
        if segment.generation is None:
            self._consulted(BigSegmentsStatus.NOT_CONFIGURED)
            return None, False
        individual = self._context.get(segment.unbounded_context_kind)
        if individual is None:
            return None, False
        membership = self._data.memberships.get(individual.key, _UNKNOWN)
        self._consulted(membership.status)
        return membership.segments.get(f"{segment.key}.g{int(segment.generation)}"), True

    def _consulted(self, status: BigSegmentsStatus) -> None:
        self.trace("big segments: %s", status.value)
        self.big_segments = status.worse(self.big_segments)

    def _admits(self, segment: Segment, rule: SegmentRule, chain: tuple[str, ...]) -> bool:
        if not self._matches(rule.clauses, chain):
            return False
        if rule.weight is None:
            return True
        kind = rule.rollout_context_kind
        by, valid = _bucket_by(rule.bucket_by, kind)
        if not valid:
            raise _Malformed(f'invalid attribute reference "{rule.bucket_by}"')
        if self._context.get(kind) is None:
            return False
        prefix = bucketing.salted(segment.key, segment.salt)
        position = bucketing.bucket(self._context, kind, by, prefix, plain=True)
        self.trace("bucket %s of %s", position, bucketing.share(rule.weight))
        return position < bucketing.share(rule.weight)

    # Section 6.9: variation or rollout

    def _outcome(self, flag: Flag, outcome: VariationOrRollout, reason: Reason) -> _Result:
        if outcome.variation is not None:
            return _variation(flag, outcome.variation, reason)
        rollout = outcome.rollout
        if rollout is None or not rollout.variations:
            self.trace("it has neither a variation nor a rollout")
            return _ERROR
        by, valid = _bucket_by(rollout.bucket_by, rollout.context_kind)
        if rollout.kind == "experiment":
            by = None
        elif not valid:
            self.trace('invalid attribute reference "%s"', rollout.bucket_by)
            return _ERROR
        return self._rolled_out(flag, rollout, rollout.variations, by, reason)

    def _rolled_out(
        self,
        flag: Flag,
        rollout: Rollout,
        variations: Sequence[Any],
        by: Reference | None,
        reason: Reason,
    ) -> _Result:
        experiment = rollout.kind == "experiment"
        prefix = bucketing.salted(flag.key, flag.salt, rollout.seed)
        position = bucketing.bucket(
            self._context, rollout.context_kind, by, prefix, plain=not experiment
        )
        index, reached = bucketing.choose(position, variations)
        chosen = variations[index]
        self.trace("bucket %s: number %d of the rollout", position, index)
        lacks_kind = self._context.get(rollout.context_kind) is None
        takes_part = experiment and not chosen.untracked and not (lacks_kind and reached)
        return _variation(flag, chosen.variation, replace(reason, in_experiment=takes_part))


def _off(flag: Flag, reason: Reason) -> _Result:
    if flag.off_variation is None:
        return _Result(None, reason)
    return _variation(flag, flag.off_variation, reason)


def _variation(flag: Flag, variation: Number, reason: Reason) -> _Result:
    index = int(variation)
    return _Result(index, reason) if 0 <= index < len(flag.variations or ()) else _ERROR


def _of_variation(targets: Sequence[Target], variation: Number) -> Target | None:
    return next((each for each in targets if int(each.variation) == int(variation)), None)


def _any(clause: Clause, value: object) -> bool:
    """Tell whether a value matches any value of a clause."""
    matches = OPERATORS.get(clause.op)
    return matches is not None and any(matches(value, each) for each in clause.values or ())


def _bucket_by(text: str | None, kind: str) -> tuple[Reference | None, bool]:
    """Return the attribute that is hashed, None for the key, and whether it is valid."""
    if not text:
        return None, True
    path = parse_reference(text, literal=not kind)
    return path, path is not None
