"""The interpreter against the evaluator of LaunchDarkly's Python SDK, with arbitrary flags.

The environment variable `EXAMPLES` sets the number of data sets to try. For most malformed or odd
data the two evaluators legitimately differ; the `tamed` functions and `comparable` remove such
cases, and say why. The removed cases are tested in `test_evaluator.py`.
"""

import json
import logging
import os

from hypothesis import given, settings
from hypothesis import strategies as st
from ldclient.context import Context as SDKContext
from ldclient.impl.evaluator import Evaluator
from ldclient.impl.events.types import EventFactory
from ldclient.impl.model import FeatureFlag
from ldclient.impl.model import Segment as SDKSegment

from relay.evaluation.data import Data
from relay.evaluation.evaluator import evaluate
from relay.model.context import parse_context
from tests.evaluation.strategies import context_values, data, memberships, payload_of

EXAMPLES = int(os.environ.get("EXAMPLES", "400"))
WEIRD_REFERENCES = {"": "plan", "/": "n", "/a~2": "name", "/kind": "kind"}


def whole(value: object) -> object:
    """JSON with small numbers, and whole ones without a fraction.

    The SDK compares doubles where we compare exactly, and puts `1.0` into no bucket.
    """
    match value:
        case bool():
            return value
        case float():
            return int(value) if value == int(value) else value
        case int():
            return min(value, 2_000_000_000_000)
        case list():
            return [whole(each) for each in value]
        case dict():
            return {key: whole(each) for key, each in value.items() if each is not None}
    return value


def tamed_clause(clause: dict) -> dict:
    """A valid clause: an invalid reference is no match to the SDK, but an error to us.

    Its values are scalars (the SDK finds objects and nulls equal) and no date is the year 1.
    """
    if clause["op"] == "segmentMatch":
        return clause
    scalars = [each for each in clause["values"] if isinstance(each, str | int | float)]
    return {
        **clause,
        "attribute": WEIRD_REFERENCES.get(clause["attribute"], clause["attribute"]),
        "values": [each for each in scalars if not str(each).startswith("0001-")],
    }


def tamed_rollout(rollout: dict) -> dict:
    """A rollout with positive weights: the SDK puts contexts without the kind below 0, not at 0."""
    shares = [{**each, "weight": max(1, abs(each["weight"]))} for each in rollout["variations"]]
    return {**rollout, **tamed_bucket(rollout), "variations": shares}


def tamed_bucket(holder: dict) -> dict:
    """A valid `bucketBy`."""
    by = holder.get("bucketBy") or "key"
    return {"bucketBy": WEIRD_REFERENCES.get(by, by)}


def tamed_choice(choice: dict) -> dict:
    """The variation or rollout of a fallthrough or a rule."""
    if "rollout" in choice:
        return {**choice, "rollout": tamed_rollout(choice["rollout"])}
    return choice


def tamed_flag(key: str, flag: dict) -> dict:
    """A flag with the key of its item, and with targets as LaunchDarkly writes them.

    The SDK ignores keys in `contextTargets` for users, and kinds in `targets`.
    """
    rules = [
        tamed_choice({**rule, "clauses": list(map(tamed_clause, rule.get("clauses") or []))})
        for rule in flag.get("rules", [])
    ]
    targets = [
        {"variation": each["variation"], "values": each.get("values", [])}
        for each in flag.get("targets", [])
    ]
    context_targets = [
        {
            **each,
            "values": []
            if each.get("contextKind") in {None, "", "user"}
            else each.get("values", []),
        }
        for each in flag.get("contextTargets", [])
    ]
    return {
        **flag,
        "key": key,
        "rules": rules,
        "fallthrough": tamed_choice(flag["fallthrough"]),
        "targets": targets,
        "contextTargets": context_targets,
    }


def tamed_segment(key: str, segment: dict) -> dict:
    """A segment with the key of its item, and without users in its lists for context kinds.

    Its rules apply only to contexts of the kind that they bucket: the SDK always admits others.
    """
    rules = []
    for rule in segment.get("rules", []):
        clauses = list(map(tamed_clause, rule.get("clauses") or []))
        if "weight" in rule:
            kind = rule.get("rolloutContextKind") or "user"
            clauses.append({"attribute": "kind", "op": "in", "values": [kind]})
            rule = {**rule, "weight": max(1, abs(rule["weight"])), **tamed_bucket(rule)}  # noqa: PLW2901
        rules.append({**rule, "clauses": clauses})
    lists = {
        name: [
            {
                "contextKind": "org"
                if each.get("contextKind") in {None, "", "user"}
                else each["contextKind"],
                "values": each.get("values", []),
            }
            for each in segment.get(name, [])
        ]
        for name in ("includedContexts", "excludedContexts")
    }
    return {
        "salt": "",
        "generation": 1,
        "included": [],
        "excluded": [],
        **segment,
        "key": key,
        "rules": rules,
        **lists,
    }


def tamed(data_set: dict) -> dict:
    """A data set for which both evaluators give the same results."""
    small = whole(data_set)
    return {
        "flags": {key: tamed_flag(key, flag) for key, flag in small["flags"].items()},
        "segments": {key: tamed_segment(key, value) for key, value in small["segments"].items()},
    }


def tamed_context(value: dict) -> dict:
    """A context in a form that the SDK supports: without legacy users and secondary keys."""
    if "kind" not in value:
        others = ("secondary", "custom")
        named = {name: each for name, each in value.items() if name not in others}
        value = {"kind": "user", **named, **value.get("custom", {})}
    return whole(value)


def comparable(reason: dict) -> dict:
    """A reason without an empty rule ID; the SDK omits the status of big segments in errors."""
    if reason["kind"] == "ERROR":
        return {"kind": "ERROR", "errorKind": reason["errorKind"]}
    return {name: value for name, value in reason.items() if name != "ruleId" or value}


@settings(max_examples=EXAMPLES, deadline=None)
@given(data(), st.lists(context_values, min_size=1, max_size=3), memberships)
def test_flags_evaluate_as_in_the_python_sdk(data_set, asking, membership):
    """Variation, reason, experiment and prerequisites are those that a server-side SDK finds."""
    data_set = tamed(data_set)
    flags = {key: FeatureFlag(flag) for key, flag in data_set["flags"].items()}
    segments = {key: SDKSegment(segment) for key, segment in data_set["segments"].items()}
    sdk = Evaluator(
        flags.get, segments.get, lambda _: (dict(membership.segments), membership.status.value)
    )
    looked_up = Data.of(payload_of(data_set))
    known = Data(
        looked_up.flag, looked_up.segment, dict.fromkeys(["anna", "ben", "carla", "é"], membership)
    )
    logging.getLogger("ldclient").setLevel(logging.ERROR)  # it tells of each flag that is missing
    for value in map(tamed_context, asking):
        context = parse_context(json.dumps(value).encode())
        for key, flag in flags.items():
            theirs = sdk.evaluate(
                flag, SDKContext.from_dict(value), EventFactory(with_reasons=False)
            )
            ours = evaluate(known.flag(key), context, known)
            assert ours.variation == theirs.detail.variation_index, value
            assert comparable(json.loads(ours.reason.json())) == comparable(theirs.detail.reason)
            if theirs.detail.reason["kind"] != "ERROR":
                needed = [each for each in theirs.prerequisites or [] if each in flags]
                assert list(ours.prerequisites) == needed
