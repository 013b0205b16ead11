"""Hypothesis strategies for evaluation: data sets with every feature, and contexts.

Names are few, so that flags, segments, keys and attributes meet. Malformed things are among them.
"""

import json

from hypothesis import strategies as st

from relay.evaluation.data import Membership
from relay.evaluation.results import BigSegmentsStatus
from relay.model.context import Context, parse_context
from relay.model.item import Kind, parse
from relay.model.payload import Payload

FLAGS = ["a", "b", "c", "d"]
SEGMENTS = ["s", "t", "u"]

_kinds = st.sampled_from(["", "user", "user", "org", "device"])
_names = st.sampled_from(
    ["key", "kind", "name", "plan", "plan", "n", "/deep/er", "/deep", "anonymous"]
)
_any_name = st.one_of(
    _names, _names, _names, st.sampled_from(["", "/", "/a~2", "/kind", "/key", "deep"])
)
_strings = st.sampled_from(["anna", "ben", "pro", "team", "an", "user", "org", ""])
_numbers = st.sampled_from([0, 1, 1.0, 2.5, -3, 9007199254740993, 1_700_000_000_000])
_dates = st.sampled_from(
    ["2023-11-14T22:13:20Z", "2024-01-01T00:00:00+01:00", "0001-01-01T00:00:00Z"]
)
_versions = st.sampled_from(["1", "1.0.0", "1.2.3-beta.1", "2", "v1", "1.0.0+b"])
_patterns = st.sampled_from(["^a", "n+", "(", "(?i)PRO", "^$"])
_scalars = st.one_of(_strings, _strings, _numbers, st.booleans(), _dates, _versions)
_values = st.one_of(
    _scalars,
    _scalars,
    st.lists(st.one_of(_scalars, st.none()), max_size=3),
    st.none(),
    st.fixed_dictionaries({"er": _scalars}),
)
_operators = st.sampled_from(
    [
        *["in"] * 6,
        *["startsWith", "endsWith", "contains", "matches"],
        *["lessThan", "lessThanOrEqual", "greaterThan", "greaterThanOrEqual"],
        *["before", "after", "semVerEqual", "semVerLessThan", "semVerGreaterThan", "unheard-of"],
    ]
)


def _members(required=None, **optional) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(required or {}, optional=optional)


_by_attribute = st.fixed_dictionaries(
    {
        "attribute": st.one_of(_names, _names, _names, _names, _any_name),
        "op": _operators,
        "values": st.lists(st.one_of(_values, _patterns), max_size=4),
    },
    optional={"contextKind": _kinds, "negate": st.booleans()},
)
_by_segment = st.fixed_dictionaries(
    {
        "attribute": st.just(""),
        "op": st.just("segmentMatch"),
        "values": st.lists(
            st.one_of(st.sampled_from([*SEGMENTS, "unknown"]), st.just(3)), max_size=2
        ),
    },
    optional={"negate": st.booleans()},
)
_some_clauses = st.lists(
    st.one_of(_by_attribute, _by_attribute, _by_segment), min_size=1, max_size=3
)
_clauses = st.one_of(*[_some_clauses] * 6, st.none(), st.just([]))
"""Mostly some: Hypothesis prefers short lists, and few rules would have a clause otherwise."""

_weights = st.sampled_from([0, 1, 10_000, 33_333, 50_000, 50_000, 99_999, 100_000, 200_000, -5])
_indexes = st.sampled_from([0, 0, 1, 1, 2, 2, 3, -1, 1.0])
_share = st.fixed_dictionaries(
    {"variation": _indexes, "weight": _weights}, optional={"untracked": st.booleans()}
)
_bucket_by = st.one_of(
    st.sampled_from(["key", "name", "n", "plan", "/deep/er", ""]), st.none(), _any_name
)
_rollouts = st.fixed_dictionaries(
    {"variations": st.lists(_share, max_size=4)},
    optional={
        "kind": st.sampled_from(["rollout", "experiment"]),
        "contextKind": _kinds,
        "seed": st.sampled_from([None, 0, 61, 7.0]),
        "bucketBy": _bucket_by,
    },
)
_outcomes = st.one_of(
    st.fixed_dictionaries({"variation": _indexes}),
    st.fixed_dictionaries({"rollout": _rollouts}),
    st.fixed_dictionaries({"rollout": _rollouts}),
    st.just({}),
)


@st.composite
def _rules(draw: st.DrawFn) -> dict:
    rule = {"clauses": draw(_clauses), "id": draw(st.sampled_from(["", "r1", 'r"2']))}
    return rule | draw(_outcomes) | draw(_members(trackEvents=st.booleans()))


_key_lists = st.one_of(
    st.none(), st.lists(st.sampled_from(["anna", "ben", "carla", ""]), max_size=3)
)
_targets = st.lists(
    st.fixed_dictionaries(
        {"variation": _indexes, "values": _key_lists}, optional={"contextKind": _kinds}
    ),
    max_size=3,
)


@st.composite
def flags(draw: st.DrawFn, key: str) -> dict:
    """The JSON of a flag."""
    others = st.sampled_from([*FLAGS, "unknown"])
    needs = st.fixed_dictionaries({"key": others, "variation": _indexes})
    return {
        "key": draw(st.sampled_from([*[key] * 20, "other"])),
        "version": draw(st.integers(1, 9)),
        "on": draw(st.sampled_from([True] * 5 + [False])),
        "variations": [True, {"x": 9007199254740993}, "drei"],
        "fallthrough": draw(_outcomes),
        "salt": draw(st.sampled_from(["", "salt"])),
    } | draw(
        _members(
            prerequisites=st.lists(needs, max_size=2),
            targets=_targets,
            contextTargets=_targets,
            rules=st.lists(_rules(), min_size=1, max_size=4),
            offVariation=st.one_of(_indexes, st.none()),
            clientSide=st.booleans(),
            clientSideAvailability=st.fixed_dictionaries(
                {}, optional={"usingMobileKey": st.booleans(), "usingEnvironmentId": st.booleans()}
            ),
            trackEvents=st.booleans(),
            trackEventsFallthrough=st.booleans(),
            debugEventsUntilDate=st.sampled_from([None, 0, 1_700_000_000_000]),
        )
    )


_listed = st.lists(_members({"values": _key_lists}, contextKind=_kinds), max_size=2)


@st.composite
def segments(draw: st.DrawFn, key: str) -> dict:
    """The JSON of a segment."""
    rule = st.fixed_dictionaries(
        {"clauses": _clauses},
        optional={"weight": _weights, "bucketBy": _bucket_by, "rolloutContextKind": _kinds},
    )
    return {
        "key": draw(st.sampled_from([*[key] * 20, "other"])),
        "version": draw(st.integers(1, 9)),
    } | draw(
        _members(
            included=_key_lists,
            excluded=_key_lists,
            includedContexts=_listed,
            excludedContexts=_listed,
            rules=st.lists(rule, min_size=1, max_size=3),
            salt=st.sampled_from(["", "salt"]),
            unbounded=st.sampled_from([False] * 3 + [True]),
            unboundedContextKind=_kinds,
            generation=st.sampled_from([None, 1, 1]),
        )
    )


@st.composite
def data(draw: st.DrawFn) -> dict[str, dict[str, dict]]:
    """The JSON of a data set."""
    return {
        "flags": {
            key: draw(flags(key)) for key in draw(st.sets(st.sampled_from(FLAGS), min_size=1))
        },
        "segments": {key: draw(segments(key)) for key in draw(st.sets(st.sampled_from(SEGMENTS)))},
    }


def payload_of(data_set: dict[str, dict[str, dict]]) -> Payload:
    """The payload of a data set."""
    return Payload.of(
        parse(kind, key, json.dumps(value).encode())
        for kind in Kind
        for key, value in data_set[kind.value].items()
    )


_single = _members(
    {"key": st.sampled_from(["anna", "ben", "carla", "é"])},
    name=_strings,
    plan=_values,
    n=_values,
    deep=_values,
    anonymous=st.booleans(),
)
_kind_of_context = st.sampled_from(["user", "org", "device", "other"])
_singles = st.builds(lambda one, kind: one | {"kind": kind}, _single, _kind_of_context)
_multi = st.dictionaries(_kind_of_context, _single, min_size=1).map(
    lambda kinds: {"kind": "multi", **kinds}
)
_legacy = _members(
    {"key": st.sampled_from(["anna", "ben"])},
    name=_strings,
    secondary=_strings,
    custom=_members(plan=_values, n=_values, deep=_values),
)

context_values = st.one_of(_singles, _multi, _legacy)
memberships = st.builds(
    Membership,
    st.sampled_from(BigSegmentsStatus),
    st.dictionaries(st.sampled_from([f"{key}.g1" for key in SEGMENTS]), st.booleans()),
)
"""Answers of a database about one context key."""

contexts: st.SearchStrategy[Context] = context_values.map(
    lambda value: parse_context(json.dumps(value).encode())
)
