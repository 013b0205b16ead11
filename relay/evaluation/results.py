"""Evaluation results and their JSON for client-side SDKs (endpoints 1.5, evaluation 6.10)."""

from __future__ import annotations

import json
from enum import Enum

import orjson
from msgspec import Struct

from relay.model.flag import Flag


class ReasonKind(Enum):
    """The kinds of reason; the values are the SDKs' names."""

    OFF = "OFF"
    TARGET_MATCH = "TARGET_MATCH"
    RULE_MATCH = "RULE_MATCH"
    FALLTHROUGH = "FALLTHROUGH"
    PREREQUISITE_FAILED = "PREREQUISITE_FAILED"
    ERROR = "ERROR"


class BigSegmentsStatus(Enum):
    """Health of the big-segment store during an evaluation, from best to worst."""

    HEALTHY = "HEALTHY"
    STALE = "STALE"
    STORE_ERROR = "STORE_ERROR"
    NOT_CONFIGURED = "NOT_CONFIGURED"

    __hash__ = object.__hash__  # Enum's own costs as much as several dict lookups

    def worse(self, other: BigSegmentsStatus | None) -> BigSegmentsStatus:
        """Return the worse of the two."""
        if other is None:
            return self
        order = list(BigSegmentsStatus)
        return max(self, other, key=order.index)


class Reason(Struct, frozen=True, gc=False):
    """The reason for a flag's value, with the details of its kind.

    Args:
        kind: the kind of reason.
        rule_index: RULE_MATCH: index of the rule, from 0.
        rule_id: RULE_MATCH: ID of the rule; may be empty.
        in_experiment: FALLTHROUGH and RULE_MATCH: the context takes part in an experiment.
        prerequisite: PREREQUISITE_FAILED: key of the flag that failed.
        big_segments: status of the big-segment store; None if no big segment was evaluated.
    """

    kind: ReasonKind
    rule_index: int = 0
    rule_id: str = ""
    in_experiment: bool = False
    prerequisite: str = ""
    big_segments: BigSegmentsStatus | None = None

    def json(self) -> bytes:
        """Return the SDKs' JSON of the reason. The only error kind is a malformed flag."""
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
    """One step of an evaluation, for humans to read.

    Args:
        depth: nesting level: 0 for the flag itself, more within prerequisites and segments.
        text: format string for `arguments`, as in logging; formatted only by `str()`.
        arguments: strings, numbers, and lists of JSON values.
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
        reason: the reason for it.
        prerequisites: keys of the flag's own prerequisites that were evaluated, in order.
        experiment: events of this evaluation are always sent (evaluation 6.8).
        steps: the trace of the evaluation.
    """

    variation: int | None
    reason: Reason
    prerequisites: tuple[str, ...] = ()
    experiment: bool = False
    steps: tuple[TraceStep, ...] = ()


def value(flag: Flag, detail: EvaluationDetail) -> bytes:
    """Return the JSON of the value exactly as upstream sent it.

    Args:
        flag: with raw variations (see `relay.evaluation.data.parse_flag`).
        detail: its result.
    """
    if detail.variation is None or flag.variations is None:
        return b"null"
    return bytes(flag.variations[detail.variation])


def render_put(key: bytes, flag: Flag, detail: EvaluationDetail, *, with_reasons: bool) -> bytes:
    """Return the data of a `put-object` for client-side SDKs (fdv2 13.3.1).

    Args:
        key: of the flag, as JSON.
        flag: see `render`.
        detail: its result.
        with_reasons: see `render`.
    """
    entry = render(flag, detail, with_reasons=with_reasons, as_object=True)
    members = int(flag.version), key, entry
    return b'{"version":%d,"kind":"flag-eval","key":%b,"object":%b}' % members


def render(
    flag: Flag, detail: EvaluationDetail, *, with_reasons: bool, as_object: bool = False
) -> bytes:
    """Return the JSON entry of a flag for client-side SDKs (endpoints 1.5).

    Args:
        flag: with raw variations (see `relay.evaluation.data.parse_flag`).
        detail: its result.
        with_reasons: include the reason; experiments include it in any case.
        as_object: include `flagVersion`, as objects of FDv2 do.
    """
    variation = detail.variation
    members = [
        b'{"value":' + value(flag, detail),
        b'"variation":null' if variation is None else b'"variation":%d' % variation,
        b'"version":%d' % int(flag.version),
    ]
    if as_object:
        members.append(b'"flagVersion":%d' % int(flag.version))
    if flag.track_events or detail.experiment:
        members.append(b'"trackEvents":true')
    if detail.experiment:
        members.append(b'"trackReason":true')
    if with_reasons or detail.experiment:
        members.append(b'"reason":' + detail.reason.json())
    if debug_until := int(flag.debug_events_until_date or 0):
        members.append(b'"debugEventsUntilDate":%d' % debug_until)
    if detail.prerequisites:
        members.append(b'"prerequisites":' + orjson.dumps(detail.prerequisites))
    return b",".join(members) + b"}"
