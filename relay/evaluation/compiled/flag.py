"""One flag compiled to a function of a context; everything else is computed beforehand.

Each possible result of a flag is one `CompiledResult`, whose JSON is rendered on first use. Rare
cases (cycles, malformed references) are left to the interpreter, which defines the
results; `tests/evaluation/compiled/test_program.py` holds both to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha1
from typing import Any

import orjson
from msgspec import Struct
from msgspec.structs import replace

from relay.evaluation import bucketing
from relay.evaluation.compiled.conditions import ConditionCache, Predicate, SegmentCondition
from relay.evaluation.compiled.context import NOBODY, EvalContext, Uncompilable
from relay.evaluation.compiled.features import KEY, Feature, Match, Trigger
from relay.evaluation.compiled.hashing import Hashing, hashing, suffix_hash_of
from relay.evaluation.compiled.thresholds import NOTHING, threshold
from relay.evaluation.data import Data
from relay.evaluation.evaluator import evaluate, is_experiment
from relay.evaluation.results import (
    BigSegmentsStatus,
    EvaluationDetail,
    Reason,
    ReasonKind,
    render,
    render_put,
)
from relay.model.context import DEFAULT_KIND
from relay.model.flag import Flag, Number, Rollout, Target, VariationOrRollout


class BigSegmentUse(Struct, frozen=True):
    """The big segments that a flag may look at.

    Args:
        consulted: True if there are any.
        kinds: context kinds whose keys have to be looked up in a database.
    """

    consulted: bool = False
    kinds: frozenset[str] = frozenset()


NO_BIG_SEGMENTS = BigSegmentUse()


class CompiledResult:
    """One possible result of a flag. Its JSON is rendered on first use, and cached."""

    __slots__ = (
        "_flag",
        "_label",
        "_with_status",
        "detail",
        "plain",
        "plain_put",
        "reasoned",
        "reasoned_put",
        "variation",
    )

    def __init__(self, flag: Flag, label: bytes, detail: EvaluationDetail) -> None:
        self.detail = detail
        self.variation = detail.variation
        self.plain: bytes | None = None
        """The flag's member of the body without reasons; None until it is rendered."""
        self.reasoned: bytes | None = None
        """The flag's member of the body with reasons; None until it is rendered."""
        self.plain_put: bytes | None = None
        """The data of its `put-object` without reasons; None until it is rendered."""
        self.reasoned_put: bytes | None = None
        """The data of its `put-object` with reasons; None until it is rendered."""
        self._flag = flag
        self._label = label
        self._with_status: dict[BigSegmentsStatus, CompiledResult] = {}

    def after(self, status: BigSegmentsStatus) -> CompiledResult:
        """Return the same result, with the status of the big segments that were looked at."""
        result = self._with_status.get(status)
        if result is None:
            reason = replace(self.detail.reason, big_segments=status)
            detail = replace(self.detail, reason=reason)
            result = self._with_status[status] = CompiledResult(self._flag, self._label, detail)
        return result

    def make_plain(self) -> bytes:
        """Render the member without reasons."""
        entry = render(self._flag, self.detail, with_reasons=False)
        self.plain = plain = self._label + entry
        return plain

    def make_reasoned(self) -> bytes:
        """Render the member with reasons."""
        entry = render(self._flag, self.detail, with_reasons=True)
        self.reasoned = reasoned = self._label + entry
        return reasoned

    def member(self, *, with_reasons: bool) -> bytes:
        """Return the member of the body: `"key":{…}`."""
        if with_reasons:
            return self.reasoned or self.make_reasoned()
        return self.plain or self.make_plain()

    def entry(self, *, with_reasons: bool) -> bytes:
        """Return the value of the member, without the flag's key."""
        return self.member(with_reasons=with_reasons)[len(self._label) :]

    def put(self, *, with_reasons: bool) -> bytes:
        """Return the data of the `put-object` that sets the flag to this."""
        put = self.reasoned_put if with_reasons else self.plain_put
        if put is None:
            put = render_put(self._label[:-1], self._flag, self.detail, with_reasons=with_reasons)
            if with_reasons:
                self.reasoned_put = put
            else:
                self.plain_put = put
        return put

    @property
    def version(self) -> int:
        """Version of the flag."""
        return int(self._flag.version)

    @property
    def depends_on(self) -> object:
        """Key under which results of one flag have the same JSON without reasons."""
        forced = self.detail.reason if self.detail.experiment else None
        return self.variation, self.detail.prerequisites, self.detail.experiment, forced


Choose = Callable[[EvalContext], CompiledResult]
Decision = CompiledResult | Choose
"""One result for every context, or a function that chooses a result for a context."""

Features = tuple[Feature[Any], ...]


class CompiledFlag:
    """A live flag, ready for evaluation.

    Args:
        flag: the flag with raw variations.
        decision: its result, or the function that chooses one.
        results: all possible results; empty if unknown.
        features: the features that decide the result; None if others count, as in rollouts.
        interpreted: evaluated by the interpreter, as is every flag that depends on it.
        big_segments: what it may look at.
    """

    __slots__ = (
        "big_segments",
        "choose",
        "choose_plain",
        "constant",
        "constant_plain",
        "features",
        "flag",
        "interpreted",
        "usual",
    )

    def __init__(
        self,
        flag: Flag,
        decision: Decision,
        results: Sequence[CompiledResult],
        features: Features | None = None,
        *,
        interpreted: bool = False,
        big_segments: BigSegmentUse = NO_BIG_SEGMENTS,
    ) -> None:
        self.flag = flag
        self.big_segments = big_segments
        self.features = features
        self.interpreted = interpreted
        self.constant = decision if isinstance(decision, CompiledResult) else None
        """The only result, if there is just one."""
        self.choose: Choose = _as_function(decision)
        self.choose_plain = self.choose
        """Returns a result for a context whose JSON without reasons is right."""
        if big_segments.consulted and not interpreted and self.constant is None:
            self.choose = _with_status(self.choose)
            if any(each.detail.experiment for each in results):
                self.choose_plain = self.choose  # their reasons are always sent
        """Returns the result for a context."""
        self.usual = None if features is None else self.choose(NOBODY)
        """The result if all features have their usual values; None unless features decide."""
        self.constant_plain = self.constant or _common_result(results)
        if big_segments.consulted and any(each.detail.experiment for each in results):
            self.constant_plain = self.constant  # their reasons are always sent
        """A result whose JSON without reasons is that of every context, if there is one."""
        if self.constant_plain is not None:
            self.constant_plain.make_plain()

    def __repr__(self) -> str:
        return f"<CompiledFlag {self.flag.key!r} version {self.flag.version}>"

    def constant_result(self, *, with_reasons: bool) -> CompiledResult | None:
        """Return a result whose JSON is that of every context; None if it varies."""
        return self.constant if with_reasons else self.constant_plain


def _common_result(results: Sequence[CompiledResult]) -> CompiledResult | None:
    if not results:
        return None
    first = results[0].depends_on
    return results[0] if all(each.depends_on == first for each in results[1:]) else None


def _with_status(choose: Choose) -> Choose:
    """Return a choice of results with the status of the big segments that were looked at."""

    def choose_with_status(context: EvalContext) -> CompiledResult:
        before, context.consulted = context.consulted, None
        result = choose(context)
        status = context.consulted
        if before is not None:
            context.consult(before)  # a flag that requires this one mentions all
        return result if status is None else result.after(status)

    return choose_with_status


def interpret_flag(
    key: str, flag: Flag, data: Data, big_segments: BigSegmentUse = NO_BIG_SEGMENTS
) -> CompiledFlag:
    """Return a flag that the interpreter evaluates."""
    label = label_of(key)

    def choose(context: EvalContext) -> CompiledResult:
        known = replace(data, memberships=context.memberships)
        return CompiledResult(flag, label, evaluate(flag, context.context, known))

    return CompiledFlag(flag, choose, (), interpreted=True, big_segments=big_segments)


def label_of(key: str) -> bytes:
    """Return the start of a flag's member of the body: its key as JSON and a colon."""
    return orjson.dumps(key) + b":"


def compile_flag(
    key: str,
    flag: Flag,
    prerequisite: Callable[[str], CompiledFlag | None],
    conditions: ConditionCache,
    in_segment: SegmentCondition,
    *,
    big_segments: BigSegmentUse = NO_BIG_SEGMENTS,
) -> CompiledFlag:
    """Compile a live flag.

    Args:
        key: the key of its item, which may differ from the flag's own.
        flag: the flag with raw variations.
        prerequisite: returns the compiled flag with a key, or None.
        conditions: the environment's conditions.
        in_segment: returns the condition of being in a segment.
        big_segments: what the flag may look at.

    Raises:
        Uncompilable: only the interpreter can evaluate this flag.
    """
    compilation = _Compilation(key, flag, prerequisite, conditions, in_segment)
    return compilation.compile(big_segments)


class _Compilation:
    """Compilation of one flag: collects its results and features on the way."""

    def __init__(
        self,
        key: str,
        flag: Flag,
        prerequisite: Callable[[str], CompiledFlag | None],
        conditions: ConditionCache,
        in_segment: SegmentCondition,
    ) -> None:
        self._flag = flag
        self._label = label_of(key)
        self._prerequisite = prerequisite
        self._conditions = conditions
        self._in_segment = in_segment
        self._evaluated: tuple[str, ...] = ()
        """Keys of the prerequisites evaluated before the next result can occur."""
        self._results: list[CompiledResult] = []
        self._features: dict[Feature[Any], None] | None = {}

    def compile(self, big_segments: BigSegmentUse) -> CompiledFlag:
        decision = self._compile_decision()
        features = None if self._features is None else tuple(self._features)
        return CompiledFlag(
            self._flag, decision, self._results, features, big_segments=big_segments
        )

    def _compile_decision(self) -> Decision:
        if not self._flag.on:
            return self._off_result(Reason(ReasonKind.OFF))
        requirements: list[tuple[Choose, int, CompiledResult]] = []
        for each in self._flag.prerequisites or ():
            failed = Reason(ReasonKind.PREREQUISITE_FAILED, prerequisite=each.key)
            required = self._prerequisite(each.key)
            if required is None:
                return _require(requirements, self._off_result(failed))
            if required.interpreted:
                raise Uncompilable
            self._evaluated = (*self._evaluated, each.key)
            expected = int(each.variation)
            if not required.flag.on or (
                required.constant is not None and required.constant.variation != expected
            ):
                return _require(requirements, self._off_result(failed))
            if required.constant is None:
                self._depend_on(required.features)
                requirements.append((required.choose, expected, self._off_result(failed)))
        return _require(requirements, self._compile_targets())

    def _depend_on(self, features: Features | None) -> None:
        """Add features that decide the result; None if something other than features does."""
        if features is None:
            self._features = None
        elif self._features is not None:
            self._features.update(dict.fromkeys(features))

    # Results

    def _add_result(self, variation: int | None, reason: Reason) -> CompiledResult:
        """Add a possible result, reached after the prerequisites evaluated so far."""
        experiment = is_experiment(self._flag, reason)
        detail = EvaluationDetail(variation, reason, self._evaluated, experiment)
        result = CompiledResult(self._flag, self._label, detail)
        self._results.append(result)
        return result

    def _error_result(self) -> CompiledResult:
        return self._add_result(None, Reason(ReasonKind.ERROR))

    def _off_result(self, reason: Reason) -> CompiledResult:
        if self._flag.off_variation is None:
            return self._add_result(None, reason)
        return self._variation_result(self._flag.off_variation, reason)

    def _variation_result(self, variation: Number, reason: Reason) -> CompiledResult:
        index = int(variation)
        if 0 <= index < len(self._flag.variations or ()):
            return self._add_result(index, reason)
        return self._error_result()

    # Targets and rules

    def _compile_targets(self) -> Decision:
        groups = [(kind, results) for kind, results in self._target_groups() if results]
        decision = self._compile_rules()
        for kind, results in reversed(groups):
            target = _target_feature(kind, results)
            self._depend_on((target,))
            decision = _target_or_else(target.value, decision)
        return decision

    def _target_groups(self) -> list[tuple[str, dict[str, CompiledResult]]]:
        """Return context kinds and their results by key, in order of precedence."""
        groups: list[tuple[str, dict[str, CompiledResult]]] = []
        for target, variation in _targets(self._flag):
            result = self._variation_result(variation, Reason(ReasonKind.TARGET_MATCH))
            kind = target.context_kind or DEFAULT_KIND
            if not groups or groups[-1][0] != kind:
                groups.append((kind, {}))
            for key in target.values or ():
                groups[-1][1].setdefault(key, result)
        return groups

    def _compile_rules(self) -> Decision:
        steps: list[tuple[Predicate, Decision]] = []
        for index, rule in enumerate(self._flag.rules or ()):
            condition = self._conditions.clauses(rule.clauses, self._in_segment)
            if condition is False:
                continue
            reason = Reason(ReasonKind.RULE_MATCH, rule_index=index, rule_id=rule.id)
            decision = self._compile_choice(rule, reason)
            if condition is True:
                # Later rules can never match, so they are not compiled, even if malformed.
                return _first(steps, decision)
            self._depend_on(None if condition.by_chance else (condition,))
            steps.append((condition.value, decision))
        return _first(
            steps,
            self._compile_choice(self._flag.fallthrough, Reason(ReasonKind.FALLTHROUGH)),
        )

    # Variation or rollout

    def _compile_choice(self, choice: VariationOrRollout, reason: Reason) -> Decision:
        if choice.variation is not None:
            return self._variation_result(choice.variation, reason)
        rollout = choice.rollout
        if rollout is None or not rollout.variations:
            return self._error_result()
        return self._compile_rollout(rollout, reason)

    def _compile_rollout(self, rollout: Rollout, reason: Reason) -> Decision:
        flag, experiment = self._flag, rollout.kind == "experiment"
        prefix = bucketing.hash_prefix(flag.key, flag.salt, rollout.seed)
        hash_arguments = rollout.context_kind, rollout.bucket_by, prefix
        digest_of = hashing(*hash_arguments, experiment=experiment)
        bounds, upper_bound = [], 0.0
        for each in rollout.variations or ():
            upper_bound = bucketing.to_float32(upper_bound + bucketing.share(each.weight))
            share_reason = Reason(
                reason.kind,
                rule_index=reason.rule_index,
                rule_id=reason.rule_id,
                in_experiment=experiment and not each.untracked,
            )
            bounds.append(
                (threshold(upper_bound), self._variation_result(each.variation, share_reason))
            )
        # Without an individual of the kind, the bucket is 0 and the context is in no experiment.
        first = next((i for i, (bound, _) in enumerate(bounds) if bound > NOTHING), None)
        if first is None:
            return bounds[-1][1]
        without_kind = self._variation_result((rollout.variations or ())[first].variation, reason)
        if len(bounds) == 1 and not experiment:
            return without_kind
        self._depend_on(None)
        suffix_hash = suffix_hash_of(*hash_arguments, experiment=experiment)
        if suffix_hash is not None and len(bounds[1:]) == 1:
            return _bucket_in_two(*suffix_hash, bounds, without_kind)
        return _bucket(digest_of, bounds, without_kind)


def _targets(flag: Flag) -> Iterable[tuple[Target, Number]]:
    """Yield targets and their variations in order of precedence (evaluation 6.5)."""
    if not flag.context_targets:
        yield from ((each, each.variation) for each in flag.targets or ())
        return
    for target in flag.context_targets:
        if target.context_kind in {"", DEFAULT_KIND} and not target.values:
            users = (u for u in flag.targets or () if int(u.variation) == int(target.variation))
            yield from ((user, target.variation) for user in list(users)[:1])
        else:
            yield target, target.variation


def _require(
    requirements: Sequence[tuple[Choose, int, CompiledResult]], decision: Decision
) -> Decision:
    """Return `decision` if all prerequisites are satisfied, else the first failure."""
    if not requirements:
        return decision
    decide_next = _as_function(decision)

    def choose(context: EvalContext) -> CompiledResult:
        for required, expected, failed in requirements:
            if required(context).variation != expected:
                return failed
        return decide_next(context)

    return choose


def _target_feature(
    kind: str, results: dict[str, CompiledResult]
) -> Feature[CompiledResult | None]:
    def result_of(context: EvalContext) -> CompiledResult | None:
        individual = context.individuals.get(kind)
        return None if individual is None else results.get(individual.key)

    trigger = Trigger(kind, KEY, Match.EQUAL, results.keys())
    return Feature(result_of, (trigger,), is_simple=True)


def _target_or_else(
    result_of: Callable[[EvalContext], CompiledResult | None], otherwise: Decision
) -> Decision:
    def choose(context: EvalContext) -> CompiledResult:
        result = result_of(context)
        if result is not None:
            return result
        return otherwise if isinstance(otherwise, CompiledResult) else otherwise(context)

    return choose


def _first(steps: Sequence[tuple[Predicate, Decision]], otherwise: Decision) -> Decision:
    """Return the decision of the first condition that holds, else `otherwise`."""
    if not steps:
        return otherwise
    if len(steps) == 1:
        return _either(*steps[0], otherwise)
    branches = [(holds, _as_function(decision)) for holds, decision in steps]
    last = _as_function(otherwise)

    def choose(context: EvalContext) -> CompiledResult:
        for holds, decide in branches:
            if holds(context):
                return decide(context)
        return last(context)

    return choose


def _as_function(decision: Decision) -> Choose:
    if isinstance(decision, CompiledResult):
        return lambda _context: decision
    return decision


def _either(holds: Predicate, then: Decision, otherwise: Decision) -> Choose:
    if isinstance(then, CompiledResult) and isinstance(otherwise, CompiledResult):
        return lambda context: then if holds(context) else otherwise
    if_so, if_not = _as_function(then), _as_function(otherwise)
    return lambda context: if_so(context) if holds(context) else if_not(context)


def _bucket_in_two(
    kind: str,
    start: bytes,
    bounds: Sequence[tuple[bytes, CompiledResult]],
    without_kind: CompiledResult,
) -> Choose:
    """Return what `_bucket` would for two variations and the plain key: little more than SHA-1."""
    (bound, first), (_, last) = bounds

    def either(context: EvalContext) -> CompiledResult:
        suffix = context.suffixes.get(kind)
        if suffix is None:
            return without_kind
        return first if sha1(start + suffix, usedforsecurity=False).digest() < bound else last

    return either


def _bucket(
    digest_of: Hashing, bounds: Sequence[tuple[bytes, CompiledResult]], without_kind: CompiledResult
) -> Choose:
    """Return the result of the first bound above the digest; the last one if there is none."""
    *firsts, (_, last) = bounds
    if len(firsts) == 1:
        ((bound, first),) = firsts

        def either(context: EvalContext) -> CompiledResult:
            digest = digest_of(context)
            if digest is None:
                return without_kind
            return first if digest < bound else last

        return either

    def choose(context: EvalContext) -> CompiledResult:
        digest = digest_of(context)
        if digest is None:
            return without_kind
        for bound, result in firsts:
            if digest < bound:
                return result
        return last

    return choose
