"""The interpreter: malformed data, limits, and differences from the SDK's evaluator."""

import inspect
import json
import sys

import pytest

from relay.evaluation.data import Data, Membership
from relay.evaluation.evaluator import MAX_CHAIN, evaluate
from relay.evaluation.results import BigSegmentsStatus, EvaluationDetail, ReasonKind, render
from relay.model.context import Context, parse_context
from tests.evaluation.strategies import payload_of
from tests.support import data

ANNA = {"kind": "user", "key": "anna"}
ORG = {"kind": "org", "key": "acme"}
BOTH = {"kind": "multi", "user": {"key": "anna"}, "org": {"key": "acme"}}
MALFORMED = {"kind": "ERROR", "errorKind": "MALFORMED_FLAG"}


def context_of(value: object) -> Context:
    """Return the context that a value describes."""
    return parse_context(json.dumps(value).encode())


def data_of(*items: dict, memberships: dict[str, Membership] | None = None) -> Data:
    """Data of flags and segments; segments have `included`."""
    parsed = Data.of(payload_of(json.loads(data.all_data(*items))))
    return Data(parsed.flag, parsed.segment, memberships or {})


def evaluated(*items: dict, context: object = ANNA, **more: object) -> EvaluationDetail:
    """Evaluate the first item."""
    known = data_of(*items, **more)
    flag = known.flag(items[0]["key"])
    assert flag is not None
    return evaluate(flag, context_of(context), known)


def reason(*items: dict, **more: object) -> dict:
    """Return the reason of the first item's result."""
    return json.loads(evaluated(*items, **more).reason.json())


def flag(key: str = "f", **members: object) -> dict:
    """A flag that is on and falls through to variation 0 of three."""
    return data.flag(key, **{"variations": ["a", "b", "c"], **members})


def rule(*clauses: dict, **members: object) -> dict:
    """A rule that gives variation 1."""
    return {"id": "r", "variation": 1, "clauses": list(clauses), **members}


def clause(attribute: str = "key", op: str = "in", *values: object, **members: object) -> dict:
    """A clause."""
    return {"attribute": attribute, "op": op, "values": list(values), **members}


def within(*segments: str) -> dict:
    """A `segmentMatch` clause."""
    return clause("", "segmentMatch", *segments)


BAD_CLAUSES = [
    clause("", "in", "x"),
    clause("/", "in", "x", contextKind="user"),
    clause("/a~2", "in", "x", contextKind="user"),
    clause("/a//b", "in", "x", contextKind="org"),
]


@pytest.mark.parametrize("bad", BAD_CLAUSES, ids=json.dumps)
def test_a_bad_reference_in_a_clause_is_an_error(bad):
    """It ends the evaluation, in the flag, in a prerequisite or in a segment."""
    assert reason(flag(rules=[rule(bad)])) == MALFORMED
    needs = flag(prerequisites=[{"key": "p", "variation": 0}])
    assert reason(needs, flag("p", rules=[rule(bad)])) == MALFORMED
    crowd = data.segment("s", rules=[{"clauses": [bad]}])
    assert reason(flag(rules=[rule(within("s"))]), crowd) == MALFORMED


def test_a_bad_clause_behind_one_that_does_not_match_is_not_seen():
    """Clauses are examined in order, only as far as needed."""
    two = rule(clause("key", "in", "ben"), BAD_CLAUSES[0])
    assert reason(flag(rules=[two])) == {"kind": "FALLTHROUGH"}


@pytest.mark.parametrize(
    "members",
    [
        {"fallthrough": {}},
        {"fallthrough": {"rollout": {"variations": []}}},
        {"fallthrough": {"rollout": None}},
        {"fallthrough": {"variation": 3}},
        {"fallthrough": {"variation": -1}},
        {"fallthrough": {"rollout": {"variations": [{"variation": 9, "weight": 100_000}]}}},
        {"targets": [{"variation": 7, "values": ["anna"]}]},
        {"rules": [{"clauses": []}]},
        {
            "fallthrough": {
                "rollout": {
                    "contextKind": "user",
                    "bucketBy": "/a~2",
                    "variations": [{"variation": 0, "weight": 100_000}],
                }
            }
        },
    ],
    ids=json.dumps,
)
def test_a_flag_without_a_valid_variation_is_an_error(members):
    """As a prerequisite, however, it is merely not satisfied."""
    assert reason(flag(**members)) == MALFORMED
    needs = flag(prerequisites=[{"key": "p", "variation": 0}])
    result = evaluated(needs, flag("p", **members))
    assert json.loads(result.reason.json()) == {
        "kind": "PREREQUISITE_FAILED",
        "prerequisiteKey": "p",
    }
    assert result.variation == 1
    assert result.prerequisites == ("p",)


@pytest.mark.parametrize("off", [{"offVariation": 3}, {"offVariation": -1}])
def test_a_bad_off_variation_is_an_error(off):
    """That holds for a flag that is off and for a failing prerequisite."""
    assert reason(flag(on=False, **off)) == MALFORMED
    assert reason(flag(prerequisites=[{"key": "none", "variation": 0}], **off)) == MALFORMED


def test_without_an_off_variation_there_is_no_value():
    """The reason stays OFF, and the value is null."""
    known = data_of(flag(on=False, offVariation=None))
    result = evaluate(known.flag("f"), context_of(ANNA), known)
    assert render(known.flag("f"), result, with_reasons=True) == (
        b'{"value":null,"variation":null,"version":1,"reason":{"kind":"OFF"}}'
    )


def test_fractions_of_integers_are_cut_off():
    """Upstream's integers may be written with a fraction."""
    assert evaluated(flag(fallthrough={"variation": 2.9})).variation == 2


# Prerequisites


def test_prerequisites_are_reported_up_to_the_one_that_fails():
    """The missing one, later ones and prerequisites of prerequisites are not reported."""
    needs = flag(prerequisites=[{"key": key, "variation": 0} for key in ("a", "b", "c")])
    deep = flag("a", prerequisites=[{"key": "z", "variation": 0}])
    off = flag("b", on=False, offVariation=0)
    assert evaluated(needs, deep, flag("z"), off, flag("c")).prerequisites == ("a", "b")
    assert evaluated(needs, deep, flag("z")).prerequisites == ("a",)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_cycle_of_prerequisites_is_an_error(length):
    """Cycles of any length are errors, also for flags that only lead into one."""
    cycle = [
        flag(f"f{number}", prerequisites=[{"key": f"f{(number + 1) % length}", "variation": 0}])
        for number in range(length)
    ]
    assert reason(*cycle) == MALFORMED
    assert reason(flag("in", prerequisites=[{"key": "f0", "variation": 0}]), *cycle) == MALFORMED


def chain_of_flags(length: int) -> list[dict]:
    """A chain of flags, each with the next as its prerequisite."""
    flags = [
        flag(f"f{number}", prerequisites=[{"key": f"f{number + 1}", "variation": 0}])
        for number in range(length - 1)
    ]
    return [*flags, flag(f"f{length - 1}")]


def chain_of_segments(length: int) -> list[dict]:
    """A chain of nested segments; the last contains every context."""
    segments = [
        data.segment(f"s{number}", rules=[{"clauses": [within(f"s{number + 1}")]}])
        for number in range(length - 1)
    ]
    return [*segments, data.segment(f"s{length - 1}", rules=[{"clauses": []}])]


def test_the_longest_chains_fit_on_the_stack():
    """Flags and segments as deep as allowed, one within the other, are evaluated."""
    flags = chain_of_flags(MAX_CHAIN)
    flags[-1]["rules"] = [rule(within("s0"), variation=0)]
    assert reason(*flags, *chain_of_segments(MAX_CHAIN)) == {"kind": "FALLTHROUGH"}


@pytest.mark.parametrize("length", [MAX_CHAIN + 1, 5000])
def test_longer_chains_are_malformed(length):
    """Chains of any length are errors, and never overflow the stack."""
    assert length > MAX_CHAIN
    assert reason(*chain_of_flags(length)) == MALFORMED
    asking = flag("f", rules=[rule(within("s0"))])
    assert reason(asking, *chain_of_segments(length)) == MALFORMED


def test_the_limit_does_not_depend_on_earlier_evaluations():
    """A chain already evaluated on a shorter path counts with its full length."""
    chain = chain_of_flags(MAX_CHAIN)
    needs = [{"key": "f1", "variation": 0}, {"key": "f0", "variation": 0}]
    assert reason(flag("top", prerequisites=needs), *chain) == MALFORMED
    assert reason(flag("top", prerequisites=needs[:1]), *chain) == {"kind": "FALLTHROUGH"}
    segments = chain_of_segments(MAX_CHAIN)
    segments.append(data.segment("top", rules=[{"clauses": [within("s0")]}]))
    for asking in ([within("top")], [within("s1"), within("top")]):
        assert reason(flag(rules=[rule(*asking)]), *segments) == MALFORMED
    assert reason(flag(rules=[rule(within("s0"))]), *segments)["kind"] == "RULE_MATCH"


def test_diamonds_take_no_time():
    """Each flag and segment is evaluated once, though 2^40 paths lead to the last ones."""
    depth = 40
    flags = [
        flag(f"f{number}", prerequisites=[{"key": f"f{number + 1}", "variation": 0}] * 2)
        for number in range(depth)
    ]
    flags.append(flag(f"f{depth}", rules=[rule(within("s0"))]))
    segments = [
        data.segment(f"s{number}", rules=[{"clauses": [within(f"s{number + 1}")]}] * 2)
        for number in range(depth)
    ]
    result = evaluated(*flags, *segments, data.segment(f"s{depth}"))
    assert result.reason.kind is ReasonKind.FALLTHROUGH
    assert result.prerequisites == ("f1", "f1")


def test_evaluation_needs_only_part_of_the_stack():
    """The deepest evaluation leaves most of Python's stack to its callers."""
    flags = chain_of_flags(MAX_CHAIN)
    flags[-1]["rules"] = [rule(within("s0"), variation=0)]
    known = data_of(*flags, *chain_of_segments(MAX_CHAIN))
    first = known.flag("f0")
    context = context_of(ANNA)

    def below(frames: int) -> EvaluationDetail:
        return below(frames - 1) if frames else evaluate(first, context, known)

    used = len(inspect.stack())
    assert below(sys.getrecursionlimit() - used - 700).reason.kind is ReasonKind.FALLTHROUGH


# Targets


def test_context_targets_for_users_stand_for_the_old_targets():
    """An empty entry for users means the keys of `targets` with that variation; order counts."""
    targets = [{"variation": 1, "values": ["anna"]}, {"variation": 2, "values": ["anna"]}]
    empty = {"contextKind": "user", "variation": 2, "values": []}
    org = {"contextKind": "org", "variation": 0, "values": ["acme"]}
    own = {"contextKind": "", "variation": 0, "values": ["anna"]}
    for context_targets, variation in (
        ([], 1),
        ([empty], 2),
        ([org, empty], 0),
        ([empty, org], 2),
        ([own], 0),
        ([{**empty, "variation": 0}], None),
    ):
        result = evaluated(flag(targets=targets, contextTargets=context_targets), context=BOTH)
        expected = ReasonKind.TARGET_MATCH if variation is not None else ReasonKind.FALLTHROUGH
        assert (result.reason.kind, result.variation) == (expected, variation or 0)


# Clauses


@pytest.mark.parametrize(
    ("examined", "context", "matches"),
    [
        (clause("kind", "in", "org"), BOTH, True),
        (clause("kind", "in", "org", negate=True), BOTH, False),
        (clause("kind", "in", "org", negate=True), ANNA, True),
        (clause("/kind", "in", "org", contextKind="org"), BOTH, True),
        (clause("/kind", "in", "org", contextKind="user"), BOTH, False),
        (clause("key", "in", "x", contextKind="org", negate=True), ANNA, False),
        (clause("x", "in", "y", negate=True), ANNA, False),
        (clause("x", "in", "y", negate=True), {**ANNA, "x": None}, False),
        (clause("x", "in", "y", negate=True), {**ANNA, "x": []}, True),
        (clause("x", "in", "y"), {**ANNA, "x": ["z", "y"]}, True),
        (clause("x", "in", "y", negate=True), {**ANNA, "x": ["z", "y"]}, False),
        (clause("key", "in"), ANNA, False),
        (clause("key", "in", negate=True), ANNA, True),
        (clause("key", "unheard-of", "anna"), ANNA, False),
        (clause("key", "unheard-of", "anna", negate=True), ANNA, True),
        (clause("/x", "in", 1), {**ANNA, "/x": 1}, True),
        (clause("/x/y", "in", 1, contextKind="user"), {**ANNA, "x": {"y": 1}}, True),
        (clause("anonymous", "in", False), ANNA, True),
        (clause("x", "in", None, {}, []), {**ANNA, "x": [None, {}, []]}, False),
        ({**within("unknown"), "values": ["unknown", 3, None]}, ANNA, False),
        ({**within("unknown"), "negate": True}, ANNA, True),
    ],
)
def test_clauses(examined, context, matches):
    """Kinds, missing values, arrays, negation and literal names follow the specification."""
    result = evaluated(flag(rules=[rule(examined)]), context=context)
    assert (result.variation == 1) is matches


# Segments


@pytest.mark.parametrize(
    ("members", "context", "contained"),
    [
        ({"included": ["anna"], "excluded": ["anna"]}, ANNA, True),
        ({"excluded": ["anna"], "rules": [{"clauses": []}]}, ANNA, False),
        ({"includedContexts": [{"contextKind": "org", "values": ["acme"]}]}, ORG, True),
        ({"includedContexts": [{"contextKind": "user", "values": ["anna"]}]}, ANNA, False),
        ({"includedContexts": [{"contextKind": "user", "values": ["anna"]}]}, BOTH, True),
        (
            {
                "excluded": ["anna"],
                "includedContexts": [{"contextKind": "org", "values": ["acme"]}],
            },
            BOTH,
            True,
        ),
        (
            {
                "excludedContexts": [{"contextKind": "org", "values": ["acme"]}],
                "rules": [{"clauses": []}],
            },
            BOTH,
            False,
        ),
        ({"rules": [{"clauses": [], "weight": 0}]}, ANNA, False),
        ({"rules": [{"clauses": [], "weight": 100_000}]}, ANNA, True),
        ({"rules": [{"clauses": [], "weight": 1, "bucketBy": "missing"}]}, ANNA, True),
        ({"rules": [{"clauses": [], "weight": 100_000, "rolloutContextKind": "org"}]}, ANNA, False),
    ],
)
def test_segments(members, context, contained):
    """Lists come before rules; a share counts only for contexts of its kind."""
    result = evaluated(
        flag(rules=[rule(within("s"))]), data.segment("s", **members), context=context
    )
    assert (result.variation == 1) is contained


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_cycle_of_segments_is_an_error(length):
    """Cycles of any length are errors, unless lists decide before them."""
    segments = [
        data.segment(f"s{number}", rules=[{"clauses": [within(f"s{(number + 1) % length}")]}])
        for number in range(length)
    ]
    assert reason(flag(rules=[rule(within("s0"))]), *segments) == MALFORMED
    segments[0]["included"] = ["anna"]
    assert reason(flag(rules=[rule(within("s0"))]), *segments)["kind"] == "RULE_MATCH"


def test_a_bad_bucket_by_in_a_segment_is_an_error():
    """It is found when the clauses of the rule match, whatever kinds the context has."""
    bad = {"clauses": [], "weight": 1, "bucketBy": "/", "rolloutContextKind": "org"}
    crowd = data.segment("s", rules=[bad])
    assert reason(flag(rules=[rule(within("s"))]), crowd) == MALFORMED


# Big segments

BIG = data.segment("big", unbounded=True, generation=2, rules=[{"clauses": [clause("x", "in", 1)]}])


@pytest.mark.parametrize(
    ("listed", "attributes", "contained"),
    [
        ({"big.g2": True}, {}, True),
        ({"big.g2": False}, {"x": 1}, False),
        ({"big.g1": True}, {}, False),
        ({}, {"x": 1}, True),
        ({}, {}, False),
    ],
)
def test_memberships_decide_before_rules(listed, attributes, contained):
    """The store decides for the segment's generation; without a membership, rules do."""
    known = {"anna": Membership(BigSegmentsStatus.HEALTHY, listed)}
    result = evaluated(
        flag(rules=[rule(within("big"))]), BIG, context={**ANNA, **attributes}, memberships=known
    )
    assert (result.variation == 1) is contained
    assert result.reason.big_segments is BigSegmentsStatus.HEALTHY


def test_without_a_store_the_status_says_so():
    """Rules decide, and the reason names the missing store, also in an error."""
    asking = flag(rules=[rule(within("big"))])
    assert reason(asking, BIG, context={**ANNA, "x": 1}) == {
        "kind": "RULE_MATCH",
        "ruleIndex": 0,
        "ruleId": "r",
        "bigSegmentsStatus": "NOT_CONFIGURED",
    }
    broken = flag(rules=[rule(within("big")), rule(BAD_CLAUSES[0])])
    assert reason(broken, BIG) == {**MALFORMED, "bigSegmentsStatus": "NOT_CONFIGURED"}
    assert reason(asking, BIG, context=ORG) == {"kind": "FALLTHROUGH"}


def test_a_big_segment_without_a_generation_is_empty():
    """Rules do not apply either."""
    old = {**BIG, "generation": None, "rules": [{"clauses": []}]}
    assert reason(flag(rules=[rule(within("big"))]), old) == {
        "kind": "FALLTHROUGH",
        "bigSegmentsStatus": "NOT_CONFIGURED",
    }


def test_the_worst_status_counts():
    """The status of a prerequisite's segments counts, too."""
    known = {
        "anna": Membership(BigSegmentsStatus.STORE_ERROR),
        "acme": Membership(BigSegmentsStatus.STALE),
    }
    other = {**BIG, "key": "other", "unboundedContextKind": "org"}
    needs = flag(prerequisites=[{"key": "p", "variation": 0}], rules=[rule(within("other"))])
    result = evaluated(
        needs, flag("p", rules=[rule(within("big"))]), BIG, other, context=BOTH, memberships=known
    )
    assert result.reason.big_segments is BigSegmentsStatus.STORE_ERROR


# Experiments


def experiment(**members: object) -> dict:
    """A flag whose fallthrough is an experiment with every context."""
    share = {"variation": 0, "weight": 100_000, **members.pop("share", {})}
    return flag(fallthrough={"rollout": {"kind": "experiment", "variations": [share], **members}})


@pytest.mark.parametrize(
    ("members", "takes_part"),
    [
        ({}, True),
        ({"bucketBy": "/"}, True),
        ({"bucketBy": "/", "contextKind": "user"}, True),
        ({"share": {"untracked": True}}, False),
        ({"contextKind": "org"}, False),
        ({"kind": "rollout"}, False),
    ],
)
def test_participation_in_experiments(members, takes_part):
    """Contexts that are untracked or lack the kind do not; `bucketBy` is ignored."""
    result = evaluated(experiment(**members))
    assert result.reason.in_experiment is takes_part
    assert result.experiment is takes_part
    assert result.variation == 0


def test_tracking_of_fallthrough_and_rules():
    """Tracking makes an evaluation an experiment, which always has its reason."""
    tracked = flag(
        trackEventsFallthrough=True, rules=[rule(clause("key", "in", "ben"), trackEvents=True)]
    )
    known = data_of(tracked)
    for key, kind in (("anna", "FALLTHROUGH"), ("ben", "RULE_MATCH")):
        context = context_of({"kind": "user", "key": key})
        entry = json.loads(
            render(known.flag("f"), evaluate(known.flag("f"), context, known), with_reasons=False)
        )
        assert entry["reason"]["kind"] == kind
        assert entry["trackEvents"]
        assert entry["trackReason"]


# Results


def test_members_of_a_result_stand_in_their_order():
    """All members at once, in ld-relay's order; a rule ID may hold anything."""
    full = flag(
        version=7,
        prerequisites=[{"key": "p", "variation": 0}],
        rules=[rule(trackEvents=True, id='r"<é')],
        debugEventsUntilDate=1.7e12,
        variations=[None, {"b": [1.0, -0], "a": "<"}],
    )
    known = data_of(full, flag("p"))
    evaluation = evaluate(known.flag("f"), context_of(ANNA), known)
    assert render(known.flag("f"), evaluation, with_reasons=False).decode() == (
        '{"value":{"b": [1.0, 0], "a": "<"},"variation":1,"version":7,'
        '"trackEvents":true,"trackReason":true,'
        '"reason":{"kind":"RULE_MATCH","ruleIndex":0,"ruleId":"r\\"<é"},'
        '"debugEventsUntilDate":1700000000000,"prerequisites":["p"]}'
    )


def test_steps_trace_the_evaluation():
    """Prerequisite, rule, clause and bucket are named, indented by depth."""
    needs = flag(
        prerequisites=[{"key": "p", "variation": 0}],
        rules=[rule(clause("key", "in", "ben")), rule(within("s"), id="second")],
    )
    crowd = data.segment("s", rules=[{"clauses": [], "weight": 100_000}])
    steps = "\n".join(map(str, evaluated(needs, flag("p"), crowd).steps))
    assert steps.split("\n")[:5] == [
        'prerequisite "p" must give variation 0',
        "  no rule matches: fallthrough",
        'prerequisite "p" gives variation 0',
        'rule 0 "r"',
        'user key in ["ben"]: does not match',
    ]
    assert 'segment "s" contains it' in steps
    assert "  bucket 0." in steps
