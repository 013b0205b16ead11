"""The index finds every unusual feature of a context, and evaluates few of the others."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.evaluation.compiled import index
from relay.evaluation.compiled.conditions import ConditionCache, clause_condition
from relay.evaluation.compiled.context import EvalContext
from relay.evaluation.compiled.features import Feature, Match, Trigger
from relay.evaluation.compiled.index import Index
from relay.evaluation.compiled.program import FlagCompiler
from relay.model.context import parse_context
from relay.model.flag import Clause
from tests.evaluation.strategies import context_values, data, payload_of

TEXTS = st.text("ab1", max_size=4)
VALUES = st.one_of(TEXTS, TEXTS, st.sampled_from([True, False, 0, 1, 1.0, 2.5]), st.none())
CLAUSES = st.builds(
    Clause,
    attribute=st.sampled_from(["plan", "mail", "key", "/deep/er"]),
    op=st.sampled_from(["in", "in", "startsWith", "endsWith", "contains", "greaterThan"]),
    values=st.lists(VALUES, max_size=4),
    negate=st.sampled_from([False, False, False, True]),
    context_kind=st.sampled_from(["user", "org"]),
)
SINGLES = st.fixed_dictionaries(
    {"kind": st.sampled_from(["user", "org", "device"]), "key": st.text("ab1", min_size=1)},
    optional={
        "plan": st.one_of(VALUES, st.lists(VALUES, max_size=3), st.just({"a": 1})),
        "mail": VALUES,
        "deep": st.one_of(VALUES, st.fixed_dictionaries({"er": VALUES})),
    },
)


def context_of(value: object) -> EvalContext:
    return EvalContext(parse_context(json.dumps(value).encode()))


def user(**attributes: object) -> EvalContext:
    return context_of({"kind": "user", "key": "anna", **attributes})


def feature_of(op: str, *values: object, attribute: str = "plan", negate: bool = False) -> Feature:
    clause = Clause(attribute=attribute, op=op, values=list(values), negate=negate)
    condition = clause_condition(clause)
    assert isinstance(condition, Feature)
    return condition


def index_of(*features: Feature, previous: Index | None = None) -> Index:
    built = Index(previous)
    built.add(features)
    return built


def holding(features: list[Feature], context: EvalContext) -> dict[Feature, object]:
    """The unusual features, found by evaluating all of them."""
    values = {feature: feature.value(context) for feature in features}
    return {feature: value for feature, value in values.items() if value is not feature.usual}


@pytest.fixture(autouse=True, scope="module")
def narrow_limits():
    """Texts and lists in tests are short, and the cache is soon full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MAX_LENGTH", 2)
        patch.setattr(index, "MAX_ENTRIES", 2)
        patch.setattr(index, "MAX_CACHED_LENGTH", 3)
        patch.setattr(index, "MAX_CACHED", 60)
        yield


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(CLAUSES, min_size=1, max_size=3), max_size=8),
    st.lists(SINGLES, min_size=1, max_size=6),
)
def test_every_unusual_feature_is_found(rules, contexts):
    """Whatever the clauses and contexts, also on repeated look-ups in any order."""
    cache = ConditionCache()
    conditions = [cache.clauses(clauses, lambda _: False) for clauses in rules]
    features = [condition for condition in conditions if isinstance(condition, Feature)]
    built = index_of(*features)
    for value in [*contexts, *reversed(contexts)]:
        context = context_of(value)
        assert built.unusual(context) == holding(features, context)


@settings(max_examples=200, deadline=None)
@given(data(), st.lists(context_values, min_size=1, max_size=4))
def test_features_of_whole_flags_are_found(data_set, contexts):
    """So are those of targets, of segments with lists and rules, and of prerequisites."""
    compiler = FlagCompiler(payload_of(data_set))
    flags = [compiler.flag(key) for key in compiler.payload.flags]
    features = [each for flag in flags if flag for each in flag.features or ()]
    built = index_of(*features)
    for value in contexts:
        context = context_of(value)
        assert built.unusual(context) == holding(features, context)


@pytest.mark.parametrize(
    ("op", "value", "other"),
    [("in", "pro", "free"), ("startsWith", "professional", "free"), ("endsWith", "pro", "profi")],
)
def test_features_that_cannot_hold_are_not_evaluated(op, value, other):
    """Of a hundred conditions, only candidates for the context's attribute are evaluated."""
    evaluated = []

    def feature(number: int, expected: str) -> Feature:
        def value_of(context: EvalContext) -> bool:
            evaluated.append(number)
            return "user" in context.individuals

        return Feature(value_of, (Trigger("user", ("plan",), Match(op), [expected]),))

    features = [feature(number, value if number == 7 else f"{number}") for number in range(100)]
    built = index_of(*features)
    evaluated.clear()
    assert built.unusual(user(plan=other)) == {}
    assert built.unusual(user()) == {}
    assert evaluated == []
    assert built.unusual(user(plan=["x", value])) == {features[7]: True}
    assert evaluated == [7]


def test_conditions_are_found_by_their_most_selective_part():
    """A condition of several clauses is found by that with the fewest values."""
    cache = ConditionCache()
    clauses = [
        Clause(attribute="plan", op="greaterThan", values=[1]),
        Clause(attribute="mail", op="endsWith", values=["a", "b", "c"]),
        Clause(attribute="country", op="in", values=["de", "fr"]),
    ]
    condition = cache.clauses(clauses, lambda _: False)
    assert isinstance(condition, Feature)
    assert condition.triggers == (Trigger("user", ("country",), Match.EQUAL, ["de", "fr"]),)


def test_values_that_are_equal_in_python_are_distinguished():
    """The cached effect of 1 does not apply to true, nor the other way round."""
    features = [feature_of("in", True), feature_of("in", 1), feature_of("greaterThan", 0.5)]
    built = index_of(*features)
    for value in (1, True, 1.0, 1, True, 1.0):
        context = user(plan=value)
        assert built.unusual(context) == holding(features, context)


def entries_of(built: Index) -> index._Entries:
    return built._new if built._new.features else built._old


@pytest.mark.parametrize("kind", [str, int])
def test_the_cache_is_bounded_and_given_up_for_values_that_do_not_recur(kind):
    """Caching soon stops for an e-mail address or a time, but not for a country."""
    features = [feature_of("in", "de", attribute="country"), feature_of("contains", "a")]
    built = index_of(*features)
    entries = entries_of(built)
    for number in range(200):
        context = user(country=["de", "fr"][number % 2], plan=kind(number))
        assert built.unusual(context) == holding(features, context)
        assert len(entries._effects) * index.VALUE_SIZE <= entries._size <= index.MAX_CACHED
    assert {value for *_, value in entries._effects} == {"de", "fr"}


def test_long_values_are_not_cached():
    """Texts of a single context take no lasting memory."""
    features = [feature_of("contains", "a")]
    built = index_of(*features)
    assert built.unusual(user(plan="a" * 1000)) == {features[0]: True}
    assert built.unusual(user(plan=["a"])) == {features[0]: True}
    assert entries_of(built)._effects == {}


def test_an_index_reuses_the_entries_of_its_predecessor():
    """Only the features that a patch brings are entered."""
    features = [feature_of("in", f"plan-{number}") for number in range(20)]
    built = index_of(*features)
    entries = entries_of(built)
    for last in range(20, 30):
        more = feature_of("in", f"plan-{last}")
        built = index_of(*features[1:], more, previous=built)
        assert built._old is entries
        assert built._new.features == {more}
        for plan in (f"plan-{last}", "plan-19", "plan-3"):
            context = user(plan=plan)
            assert built.unusual(context) == holding([*features, more], context)


def test_unused_features_are_dropped():
    """However much changes, the index never holds much more than the flags have."""
    ever = [feature_of("in", f"plan-{number}") for number in range(220)]
    built = Index()
    for start in range(0, 200, 7):
        features = ever[start : start + 20]
        built = index_of(*features, previous=built)
        assert built.unusual(user(plan=f"plan-{start}")) == {features[0]: True}
        assert built.size <= 3 * len(features)
    few = index_of(ever[0], previous=index_of(ever[0], previous=built))
    assert index_of(ever[0], previous=few).size == 1
