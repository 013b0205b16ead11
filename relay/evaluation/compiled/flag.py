"""One flag as a function of a subject: what does not depend on the context is done beforehand.

Each way in which an evaluation can end is one `CompiledResult`, whose JSON is made when it first
occurs. What is rare (cycles, big segments, malformed references) is left to the interpreter, which
is the definition; `tests/evaluation/compiled/test_program.py` holds both to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha1
from typing import Any

import orjson

from relay.evaluation import bucketing
from relay.evaluation.compiled.conditions import ConditionCache, Predicate, SegmentCondition
from relay.evaluation.compiled.context import NOBODY, EvalContext, Uncompilable
from relay.evaluation.compiled.features import KEY, Feature, Match, Trigger
from relay.evaluation.compiled.hashing import Hashing, hashing, suffix_hash_of
from relay.evaluation.compiled.thresholds import NOTHING, threshold
from relay.evaluation.data import Data
from relay.evaluation.evaluator import evaluate, is_experiment
from relay.evaluation.results import EvaluationDetail, Reason, ReasonKind, render
from relay.model.context import DEFAULT_KIND
from relay.model.flag import Flag, Number, Rollout, Target
from relay.model.flag import VariationOrRollout as Wanted


class CompiledResult:
    """One result of one flag. Its JSON is made when it is first asked for, and kept."""

    __slots__ = ("_flag", "_label", "evaluation", "plain", "reasoned", "variation")

    def __init__(self, flag: Flag, label: bytes, evaluation: EvaluationDetail) -> None:
        self.evaluation = evaluation
        self.variation = evaluation.variation
        self.plain: bytes | None = None
        """The member of the body, without reasons; None until it is first made."""
        self.reasoned: bytes | None = None
        """The same with reasons."""
        self._flag = flag
        self._label = label

    def make_plain(self) -> bytes:
        """Make the member without reasons."""
        entry = render(self._flag, self.evaluation, with_reasons=False)
        self.plain = plain = self._label + entry
        return plain

    def make_reasoned(self) -> bytes:
        """Make the member with reasons."""
        entry = render(self._flag, self.evaluation, with_reasons=True)
        self.reasoned = reasoned = self._label + entry
        return reasoned

    def member(self, *, with_reasons: bool) -> bytes:
        """Return the member of the body: `"key":{…}`."""
        if with_reasons:
            return self.reasoned or self.make_reasoned()
        return self.plain or self.make_plain()

    def entry(self, *, with_reasons: bool) -> bytes:
        """Return the member's value."""
        return self.member(with_reasons=with_reasons)[len(self._label) :]

    @property
    def depends_on(self) -> object:
        """What the JSON without reasons depends on, within one flag."""
        forced = self.evaluation.reason if self.evaluation.experiment else None
        return self.variation, self.evaluation.prerequisites, self.evaluation.experiment, forced


Choose = Callable[[EvalContext], CompiledResult]
Decision = CompiledResult | Choose
"""What a flag gives: one outcome for everybody, or a function that chooses one."""

Features = tuple[Feature[Any], ...]


class CompiledFlag:
    """A live flag, ready to be evaluated.

    Args:
        flag: with raw variations.
        decision: what it gives.
        outcomes: all that may occur; none if they are not known.
        features: those that decide; None if there is more to it, as with rollouts.
        interpreted: whether this is left to the interpreter; so is what depends on it.
    """

    __slots__ = ("choose", "constant", "features", "flag", "interpreted", "same", "usual")

    def __init__(
        self,
        flag: Flag,
        decision: Decision,
        outcomes: Sequence[CompiledResult],
        features: Features | None = None,
        *,
        interpreted: bool = False,
    ) -> None:
        self.flag = flag
        self.features = features
        self.interpreted = interpreted
        self.constant = decision if isinstance(decision, CompiledResult) else None
        """The outcome of every context, if there is just one."""
        self.choose: Choose = _as_function(decision)
        """Gives the outcome of a context."""
        self.usual = None if features is None else self.choose(NOBODY)
        """The outcome where all features have their usual values, if features decide."""
        self.same = self.constant or _all_alike(outcomes)
        """An outcome whose JSON without reasons is that of every context, if there is one."""
        if self.same is not None:
            self.same.make_plain()

    def settled(self, *, with_reasons: bool) -> CompiledResult | None:
        """Return an outcome that has the JSON of every context; None if contexts matter."""
        return self.constant if with_reasons else self.same


def _all_alike(outcomes: Sequence[CompiledResult]) -> CompiledResult | None:
    if not outcomes:
        return None
    first = outcomes[0].depends_on
    return outcomes[0] if all(each.depends_on == first for each in outcomes[1:]) else None


def interpreted(key: str, flag: Flag, data: Data) -> CompiledFlag:
    """Return a flag that the interpreter evaluates."""
    label = label_of(key)

    def choose(subject: EvalContext) -> CompiledResult:
        return CompiledResult(flag, label, evaluate(flag, subject.context, data))

    return CompiledFlag(flag, choose, (), interpreted=True)


def label_of(key: str) -> bytes:
    """Return what stands before an entry in the body."""
    return orjson.dumps(key) + b":"


def compiled(
    key: str,
    flag: Flag,
    prerequisite: Callable[[str], CompiledFlag | None],
    vocabulary: ConditionCache,
    in_segment: SegmentCondition,
) -> CompiledFlag:
    """Return the compiled form of a live flag.

    Args:
        key: under which the flag is filed.
        flag: with raw variations.
        prerequisite: gives the compiled flag of a key, or None.
        vocabulary: of the environment's conditions.
        in_segment: gives the condition of being in a segment.

    Raises:
        Uncompilable: only the interpreter can evaluate this.
    """
    return _Compilation(key, flag, prerequisite, vocabulary, in_segment).run()


class _Compilation:
    """The compiling of one flag."""

    def __init__(
        self,
        key: str,
        flag: Flag,
        prerequisite: Callable[[str], CompiledFlag | None],
        vocabulary: ConditionCache,
        in_segment: SegmentCondition,
    ) -> None:
        self._flag = flag
        self._label = label_of(key)
        self._prerequisite = prerequisite
        self._vocabulary = vocabulary
        self._in_segment = in_segment
        self._evaluated: tuple[str, ...] = ()
        """Prerequisites that have been evaluated when the outcome that comes next occurs."""
        self._outcomes: list[CompiledResult] = []
        self._features: dict[Feature[Any], None] | None = {}

    def run(self) -> CompiledFlag:
        decision = self._decision()
        features = None if self._features is None else tuple(self._features)
        return CompiledFlag(self._flag, decision, self._outcomes, features)

    def _decision(self) -> Decision:
        if not self._flag.on:
            return self._off(Reason(ReasonKind.OFF))
        needs: list[tuple[Choose, int, CompiledResult]] = []
        for each in self._flag.prerequisites or ():
            failed = Reason(ReasonKind.PREREQUISITE_FAILED, prerequisite=each.key)
            needed = self._prerequisite(each.key)
            if needed is None:
                return _require(needs, self._off(failed))
            if needed.interpreted:
                raise Uncompilable
            self._evaluated = (*self._evaluated, each.key)
            wanted = int(each.variation)
            if not needed.flag.on or (
                needed.constant is not None and needed.constant.variation != wanted
            ):
                return _require(needs, self._off(failed))
            if needed.constant is None:
                self._depend_on(needed.features)
                needs.append((needed.choose, wanted, self._off(failed)))
        return _require(needs, self._targeted())

    def _depend_on(self, features: Features | None) -> None:
        """Note what decides, besides; None for something else than features."""
        if features is None:
            self._features = None
        elif self._features is not None:
            self._features.update(dict.fromkeys(features))

    # Outcomes

    def _outcome(self, variation: int | None, reason: Reason) -> CompiledResult:
        experiment = is_experiment(self._flag, reason)
        evaluation = EvaluationDetail(variation, reason, self._evaluated, experiment)
        outcome = CompiledResult(self._flag, self._label, evaluation)
        self._outcomes.append(outcome)
        return outcome

    def _error(self) -> CompiledResult:
        return self._outcome(None, Reason(ReasonKind.ERROR))

    def _off(self, reason: Reason) -> CompiledResult:
        if self._flag.off_variation is None:
            return self._outcome(None, reason)
        return self._variation(self._flag.off_variation, reason)

    def _variation(self, variation: Number, reason: Reason) -> CompiledResult:
        index = int(variation)
        if 0 <= index < len(self._flag.variations or ()):
            return self._outcome(index, reason)
        return self._error()

    # Targets and rules

    def _targeted(self) -> Decision:
        listed = [(kind, keys) for kind, keys in self._targets() if keys]
        decision = self._ruled()
        for kind, keys in reversed(listed):
            targeted = _targeted(kind, keys)
            self._depend_on((targeted,))
            decision = _target(targeted.value, decision)
        return decision

    def _targets(self) -> list[tuple[str, dict[str, CompiledResult]]]:
        """Return, in the order in which they count, context kinds and the outcomes of keys."""
        groups: list[tuple[str, dict[str, CompiledResult]]] = []
        for target, variation in _targets(self._flag):
            outcome = self._variation(variation, Reason(ReasonKind.TARGET_MATCH))
            kind = target.context_kind or DEFAULT_KIND
            if not groups or groups[-1][0] != kind:
                groups.append((kind, {}))
            for key in target.values or ():
                groups[-1][1].setdefault(key, outcome)
        return groups

    def _ruled(self) -> Decision:
        steps: list[tuple[Predicate, Decision]] = []
        for index, rule in enumerate(self._flag.rules or ()):
            condition = self._vocabulary.clauses(rule.clauses, self._in_segment)
            if condition is False:
                continue
            reason = Reason(ReasonKind.RULE_MATCH, rule_index=index, rule_id=rule.id)
            decision = self._wanted(rule, reason)
            if condition is True:
                # Later rules never count, but what is malformed in them does not, either.
                return _first(steps, decision)
            self._depend_on(None if condition.by_chance else (condition,))
            steps.append((condition.value, decision))
        return _first(steps, self._wanted(self._flag.fallthrough, Reason(ReasonKind.FALLTHROUGH)))

    # Variation or rollout

    def _wanted(self, wanted: Wanted, reason: Reason) -> Decision:
        if wanted.variation is not None:
            return self._variation(wanted.variation, reason)
        rollout = wanted.rollout
        if rollout is None or not rollout.variations:
            return self._error()
        return self._rollout(rollout, reason)

    def _rollout(self, rollout: Rollout, reason: Reason) -> Decision:
        flag, experiment = self._flag, rollout.kind == "experiment"
        prefix = bucketing.hash_prefix(flag.key, flag.salt, rollout.seed)
        hashed = rollout.context_kind, rollout.bucket_by, prefix
        digest = hashing(*hashed, experiment=experiment)
        bounds, reached = [], 0.0
        for each in rollout.variations or ():
            reached = bucketing.to_float32(reached + bucketing.share(each.weight))
            taking_part = Reason(
                reason.kind,
                rule_index=reason.rule_index,
                rule_id=reason.rule_id,
                in_experiment=experiment and not each.untracked,
            )
            bounds.append((threshold(reached), self._variation(each.variation, taking_part)))
        # Without an individual of the kind, the bucket is 0, and it is no part of an experiment.
        first = next((i for i, (bound, _) in enumerate(bounds) if bound > NOTHING), None)
        if first is None:
            return bounds[-1][1]
        lacking = self._variation((rollout.variations or ())[first].variation, reason)
        if len(bounds) == 1 and not experiment:
            return lacking
        self._depend_on(None)
        usual = suffix_hash_of(*hashed, experiment=experiment)
        if usual is not None and len(bounds[1:]) == 1:
            return _split(*usual, bounds, lacking)
        return _bucket(digest, bounds, lacking)


def _targets(flag: Flag) -> Iterable[tuple[Target, Number]]:
    """Yield targets and their variations in the order in which they count (evaluation 6.5)."""
    if not flag.context_targets:
        yield from ((each, each.variation) for each in flag.targets or ())
        return
    for target in flag.context_targets:
        if target.context_kind in {"", DEFAULT_KIND} and not target.values:
            users = (u for u in flag.targets or () if int(u.variation) == int(target.variation))
            yield from ((user, target.variation) for user in list(users)[:1])
        else:
            yield target, target.variation


def _require(needs: Sequence[tuple[Choose, int, CompiledResult]], then: Decision) -> Decision:
    """Return `then` if all prerequisites give what is wanted, else the outcome of the first."""
    if not needs:
        return then
    go_on = _as_function(then)

    def choose(subject: EvalContext) -> CompiledResult:
        for needed, wanted, failed in needs:
            if needed(subject).variation != wanted:
                return failed
        return go_on(subject)

    return choose


def _targeted(kind: str, outcomes: dict[str, CompiledResult]) -> Feature[CompiledResult | None]:
    def targeted(subject: EvalContext) -> CompiledResult | None:
        individual = subject.individuals.get(kind)
        return None if individual is None else outcomes.get(individual.key)

    trigger = Trigger(kind, KEY, Match.EQUAL, outcomes.keys())
    return Feature(targeted, (trigger,), is_simple=True)


def _target(
    targeted: Callable[[EvalContext], CompiledResult | None], otherwise: Decision
) -> Decision:
    def choose(subject: EvalContext) -> CompiledResult:
        listed = targeted(subject)
        if listed is not None:
            return listed
        return otherwise if isinstance(otherwise, CompiledResult) else otherwise(subject)

    return choose


def _first(steps: Sequence[tuple[Predicate, Decision]], otherwise: Decision) -> Decision:
    """Return the decision of the first condition that holds."""
    if not steps:
        return otherwise
    if len(steps) == 1:
        return _either(*steps[0], otherwise)
    ways = [(holds, _as_function(decision)) for holds, decision in steps]
    last = _as_function(otherwise)

    def choose(subject: EvalContext) -> CompiledResult:
        for holds, decide in ways:
            if holds(subject):
                return decide(subject)
        return last(subject)

    return choose


def _as_function(decision: Decision) -> Choose:
    if isinstance(decision, CompiledResult):
        return lambda _subject: decision
    return decision


def _either(holds: Predicate, then: Decision, otherwise: Decision) -> Choose:
    if isinstance(then, CompiledResult) and isinstance(otherwise, CompiledResult):
        return lambda subject: then if holds(subject) else otherwise
    if_so, if_not = _as_function(then), _as_function(otherwise)
    return lambda subject: if_so(subject) if holds(subject) else if_not(subject)


def _split(
    kind: str, start: bytes, bounds: Sequence[tuple[bytes, CompiledResult]], lacking: CompiledResult
) -> Choose:
    """Return what `_bucket` would for the usual rollout, with little around SHA-1."""
    (bound, first), (_, last) = bounds

    def either(subject: EvalContext) -> CompiledResult:
        suffix = subject.suffixes.get(kind)
        if suffix is None:
            return lacking
        return first if sha1(start + suffix, usedforsecurity=False).digest() < bound else last

    return either


def _bucket(
    digest_of: Hashing, bounds: Sequence[tuple[bytes, CompiledResult]], lacking: CompiledResult
) -> Choose:
    """Return the outcome of the first bound above the digest; the last if there is none."""
    *firsts, (_, last) = bounds
    if len(firsts) == 1:
        ((bound, first),) = firsts

        def either(subject: EvalContext) -> CompiledResult:
            digest = digest_of(subject)
            if digest is None:
                return lacking
            return first if digest < bound else last

        return either

    def choose(subject: EvalContext) -> CompiledResult:
        digest = digest_of(subject)
        if digest is None:
            return lacking
        for bound, outcome in firsts:
            if digest < bound:
                return outcome
        return last

    return choose
