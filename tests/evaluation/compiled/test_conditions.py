"""Every operator gives in its compiled form what the interpreter gives."""

import json
from itertools import product

import pytest

from relay.evaluation.compiled.program import FlagCompiler, Program
from relay.evaluation.data import Data, parse_flag
from relay.evaluation.evaluator import evaluate
from relay.evaluation.results import render
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import parse_context
from tests.evaluation.strategies import payload_of
from tests.support.data import flag, segment

ATTRIBUTES = [
    *["anna", "ann", "a", "", "ANNA", "x anna"],
    *[0, 1, 1.0, 2.5, -3, 9007199254740993, True, False, {"a": 1}],
    *["1", "1.2.0", "1.2.0-beta.1", "1.2", "2.0.0+build", "v1"],
    *["2023-11-14T22:13:20Z", 1_700_000_000_000, "0001-01-01T00:00:00Z", "yesterday"],
    *[["anna", 3], [], [[1]], [2.5, "1.2.0"]],
]
"""Values of the attribute that is tested; without one, too."""

TEXTS = [[], ["anna"], ["a", "nn"], [""], [1, True], ["anna", 1, None]]
NUMBERS = [[], [1], [0, 2.5], ["1"], [True], [-3, "x", 9007199254740993]]
VERSIONS = [[], ["1.2.0"], ["1", "2.0.0"], ["v1"], [1]]
DATES = [
    [],
    ["2023-11-14T22:13:20Z"],
    [1_700_000_000_000, 5],
    ["yesterday"],
    ["0001-01-01T00:00:00Z"],
]
OPERANDS = {
    "in": [*TEXTS, *NUMBERS, [{"a": 1}]],
    "startsWith": TEXTS,
    "endsWith": TEXTS,
    "contains": TEXTS,
    "matches": [*TEXTS, ["^a", "("], ["("], ["(?i)^ANNA$"]],
    "lessThan": NUMBERS,
    "lessThanOrEqual": NUMBERS,
    "greaterThan": NUMBERS,
    "greaterThanOrEqual": NUMBERS,
    "before": DATES,
    "after": DATES,
    "semVerEqual": VERSIONS,
    "semVerLessThan": VERSIONS,
    "semVerGreaterThan": VERSIONS,
    "unheard-of": TEXTS,
}


def assert_same(data_set, contexts):
    """Assert that the compiled flag "f" gives the interpreter's bytes for each context."""
    payload = payload_of({"segments": {}, **data_set})
    compiled = FlagCompiler(payload).seen(SDKKind.SERVER, "f")
    program = Program({"f": compiled}, 1)
    parsed, data = parse_flag(payload.flags["f"].json), Data.of(payload)
    for value in contexts:
        context = parse_context(json.dumps(value).encode())
        expected = render(parsed, evaluate(parsed, context, data), with_reasons=True)
        given = program.some(context, ["f"], with_reasons=True)
        assert given == {"f": expected}, value


def ruled(*clauses):
    """A flag whose rule has these clauses."""
    return flag("f", rules=[{"id": "r", "clauses": list(clauses), "variation": 1}])


def clause(op, values, attribute="x", **more):
    return {"attribute": attribute, "op": op, "values": values, **more}


@pytest.mark.parametrize("op", OPERANDS)
@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("attribute", ["x", "/deep/x"])
def test_an_operator_gives_what_the_interpreter_gives(op, negate, attribute):
    """For values of every type on both sides, lists among them, and without the attribute."""
    kinds = {"contextKind": "user"} if attribute.startswith("/") else {}
    users = [
        *({"kind": "user", "key": "u", "x": each, "deep": {"x": each}} for each in ATTRIBUTES),
        {"kind": "user", "key": "u"},
        {"kind": "user", "key": "u", "deep": "flat"},
        {"kind": "org", "key": "o", "x": "anna"},
    ]
    for values in OPERANDS[op]:
        assert_same(
            {"flags": {"f": ruled(clause(op, values, attribute, negate=negate, **kinds))}}, users
        )


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("op", ["in", "startsWith", "unheard-of"])
def test_the_kind_of_a_context_is_an_attribute(op, negate):
    """Each kind of a multi-kind context counts."""
    org, user = {"kind": "org", "key": "o"}, {"kind": "user", "key": "u"}
    contexts = [org, user, {"kind": "multi", "org": {"key": "o"}, "user": {"key": "u"}}]
    for values in (["org"], ["user", "x"], [], [1]):
        assert_same({"flags": {"f": ruled(clause(op, values, "kind", negate=negate))}}, contexts)


ANNA, BEN = {"kind": "user", "key": "anna"}, {"kind": "user", "key": "ben"}
MULTI = {"kind": "multi", "org": {"key": "o1"}, "user": {"key": "ben"}}
CONTEXTS = [ANNA, BEN, MULTI, {"kind": "org", "key": "o1"}, {"kind": "org", "key": "o2", "x": "a"}]
LISTED = [
    {},
    {"included": ["anna"]},
    {"excluded": ["anna"]},
    {"included": ["ben"], "excluded": ["ben"]},
    {"includedContexts": [{"contextKind": "org", "values": ["o1"]}]},
    {"excludedContexts": [{"contextKind": "org", "values": ["o1"]}]},
    {
        "included": ["ben"],
        "excluded": ["anna"],
        "includedContexts": [{"contextKind": "org", "values": ["o2"]}],
        "excludedContexts": [{"contextKind": "user", "values": ["ben"]}],
    },
]
RULES = [
    [],
    [{"clauses": []}],
    [
        {"clauses": [clause("in", ["a"], contextKind="org")]},
        {"clauses": [clause("in", ["anna"], "key")]},
    ],
]


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize(("lists", "rules"), list(product(LISTED, RULES)))
def test_segments_give_what_the_interpreter_gives(lists, rules, negate):
    """Keys of users and of other kinds, included, excluded, both, or by a rule; one or several."""
    segments = {"s": segment("s", rules=rules, **lists), "t": segment("t", included=["carla"])}
    for names in (["s"], ["s", "t"], ["t", "unknown"], [3], []):
        found = ruled(clause("segmentMatch", names, "", negate=negate))
        assert_same({"flags": {"f": found}, "segments": segments}, CONTEXTS)


def test_all_clauses_of_a_rule_must_hold():
    """Also if some are certain, impossible, or share an attribute."""
    parts = [
        clause("in", ["a", "b"], contextKind="org"),
        clause("unheard-of", ["a"]),
        clause("unheard-of", ["a"], negate=True, contextKind="org"),
        clause("startsWith", ["o"], "key", contextKind="org"),
        clause("in", ["anna"], "key", negate=True),
    ]
    for pair in product(parts, parts):
        assert_same({"flags": {"f": ruled(*pair)}}, CONTEXTS)
