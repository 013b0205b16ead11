"""What an evaluation yields, and its JSON for client-side SDKs (endpoints 1.5, evaluation 6.10)."""

from __future__ import annotations

import json
from enum import Enum

import orjson
from msgspec import Struct

from relay.model.flag import Flag


class ReasonKind(Enum):
    """Why a flag has its value."""

    OFF = "OFF"
    TARGET_MATCH = "TARGET_MATCH"
    RULE_MATCH = "RULE_MATCH"
    FALLTHROUGH = "FALLTHROUGH"
    PREREQUISITE_FAILED = "PREREQUISITE_FAILED"
    ERROR = "ERROR"


class BigSegmentsStatus(Enum):
    """How far memberships of big segments could be known. The later of two counts."""

    HEALTHY = "HEALTHY"
    STALE = "STALE"
    STORE_ERROR = "STORE_ERROR"
    NOT_CONFIGURED = "NOT_CONFIGURED"

    def worse(self, other: BigSegmentsStatus | None) -> BigSegmentsStatus:
        """Return the worse of the two."""
        if other is None:
            return self
        order = list(BigSegmentsStatus)
        return max(self, other, key=order.index)


class Reason(Struct, frozen=True, gc=False):
    """Why a flag has its value, and what is particular to the kind of reason.

    Args:
        kind: the reason.
        rule_index: of RULE_MATCH, from 0.
        rule_id: of RULE_MATCH; may be empty.
        in_experiment: of FALLTHROUGH and RULE_MATCH: the context takes part in an experiment.
        prerequisite: of PREREQUISITE_FAILED: the key of the flag that failed.
        big_segments: whether big segments could be consulted; None if none had to be.
    """

    kind: ReasonKind
    rule_index: int = 0
    rule_id: str = ""
    in_experiment: bool = False
    prerequisite: str = ""
    big_segments: BigSegmentsStatus | None = None

    def json(self) -> bytes:
        """Return the reason as SDKs know it. The only error is a malformed flag."""
        members = [f'{{"kind":"{self.kind.value}"'.encode()]
        if self.kind is ReasonKind.RULE_MATCH:
            members.append(b'"ruleIndex":%d' % self.rule_index)
        if self.rule_id:
            members.append(b'"ruleId":' + orjson.dumps(self.rule_id))
        if self.in_experiment:
            members.append(b'"inExperiment":true')
        if self.kind is ReasonKind.PREREQUISITE_FAILED:
            members.append(b'"prerequisiteKey":' + orjson.dumps(self.prerequisite))
        if self.kind is ReasonKind.ERROR:
            members.append(b'"errorKind":"MALFORMED_FLAG"')
        if self.big_segments:
            members.append(f'"bigSegmentsStatus":"{self.big_segments.value}"'.encode())
        return b",".join(members) + b"}"


class TraceStep(Struct, frozen=True, gc=False):
    """Something that an evaluation found out on its way, for people to read.

    Args:
        depth: 0 for the flag itself; more within prerequisites and segments.
        text: with places for `arguments`, as in logging; they are put in only if somebody reads it.
        arguments: texts, numbers, and lists of JSON values.
    """

    depth: int
    text: str
    arguments: tuple[object, ...] = ()

    def __str__(self) -> str:
        arguments = (
            json.dumps(each, ensure_ascii=False) if isinstance(each, list) else each
            for each in self.arguments
        )
        return "  " * self.depth + self.text % tuple(arguments)


class EvaluationDetail(Struct, frozen=True, gc=False):
    """The result of a flag for a context.

    Args:
        variation: index of the flag's variation; None for no value.
        reason: why.
        prerequisites: keys of the flag's own prerequisites that were evaluated, in their order.
        experiment: whether LaunchDarkly wants to know of it in any case (evaluation 6.8).
        steps: the way that led there.
    """

    variation: int | None
    reason: Reason
    prerequisites: tuple[str, ...] = ()
    experiment: bool = False
    steps: tuple[TraceStep, ...] = ()


def value(flag: Flag, evaluation: EvaluationDetail) -> bytes:
    """Return the JSON of the value, in upstream's own words: numbers are exact.

    Args:
        flag: with raw variations, as `relay.evaluation.items` parses it.
        evaluation: its result.
    """
    if evaluation.variation is None or flag.variations is None:
        return b"null"
    return bytes(flag.variations[evaluation.variation])


def render(flag: Flag, evaluation: EvaluationDetail, *, with_reasons: bool) -> bytes:
    """Return the entry of a flag in what client-side SDKs get (endpoints 1.5).

    Args:
        flag: with raw variations, as `relay.evaluation.items` parses it.
        evaluation: its result.
        with_reasons: whether the SDK wants reasons; those of experiments it gets in any case.
    """
    variation = evaluation.variation
    members = [
        b'{"value":' + value(flag, evaluation),
        b'"variation":null' if variation is None else b'"variation":%d' % variation,
        b'"version":%d' % int(flag.version),
    ]
    if flag.track_events or evaluation.experiment:
        members.append(b'"trackEvents":true')
    if evaluation.experiment:
        members.append(b'"trackReason":true')
    if with_reasons or evaluation.experiment:
        members.append(b'"reason":' + evaluation.reason.json())
    if debug_until := int(flag.debug_events_until_date or 0):
        members.append(b'"debugEventsUntilDate":%d' % debug_until)
    if evaluation.prerequisites:
        members.append(b'"prerequisites":' + orjson.dumps(evaluation.prerequisites))
    return b",".join(members) + b"}"
