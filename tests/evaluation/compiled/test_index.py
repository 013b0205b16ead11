"""The index finds every feature that is unusual about a context, and asks few of the others."""

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


def subject_of(value: object) -> EvalContext:
    return EvalContext(parse_context(json.dumps(value).encode()))


def user(**attributes: object) -> EvalContext:
    return subject_of({"kind": "user", "key": "anna", **attributes})


def feature_of(op: str, *values: object, attribute: str = "plan", negate: bool = False) -> Feature:
    clause = Clause(attribute=attribute, op=op, values=list(values), negate=negate)
    condition = clause_condition(clause)
    assert isinstance(condition, Feature)
    return condition


def index_of(*features: Feature, before: Index | None = None) -> Index:
    made = Index(before)
    made.add(features)
    return made


def holding(features: list[Feature], subject: EvalContext) -> dict[Feature, object]:
    """What an index should find."""
    values = {feature: feature.value(subject) for feature in features}
    return {feature: value for feature, value in values.items() if value is not feature.usual}


@pytest.fixture(autouse=True, scope="module")
def narrow_limits():
    """Texts in tests are short, and so are lists; what is remembered is soon too much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MAX_LENGTH", 2)
        patch.setattr(index, "MAX_ENTRIES", 2)
        patch.setattr(index, "MAX_TEXT", 3)
        patch.setattr(index, "MAX_REMEMBERED", 60)
        yield


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(CLAUSES, min_size=1, max_size=3), max_size=8),
    st.lists(SINGLES, min_size=1, max_size=6),
)
def test_every_unusual_feature_is_found(rules, contexts):
    """Whatever the clauses and contexts, also if they ask again, in any order."""
    vocabulary = ConditionCache()
    conditions = [vocabulary.clauses(clauses, lambda _: False) for clauses in rules]
    features = [condition for condition in conditions if isinstance(condition, Feature)]
    made = index_of(*features)
    for context in [*contexts, *reversed(contexts)]:
        subject = subject_of(context)
        assert made.unusual(subject) == holding(features, subject)


@settings(max_examples=200, deadline=None)
@given(data(), st.lists(context_values, min_size=1, max_size=4))
def test_features_of_whole_flags_are_found(data_set, contexts):
    """So are those of targets, of segments with lists and rules, and of prerequisites."""
    library = FlagCompiler(payload_of(data_set))
    flags = [library.flag(key) for key in library.payload.flags]
    features = [each for flag in flags if flag for each in flag.features or ()]
    made = index_of(*features)
    for context in contexts:
        subject = subject_of(context)
        assert made.unusual(subject) == holding(features, subject)


@pytest.mark.parametrize(
    ("op", "value", "other"),
    [("in", "pro", "free"), ("startsWith", "professional", "free"), ("endsWith", "pro", "profi")],
)
def test_features_that_cannot_hold_are_not_asked(op, value, other):
    """Of a hundred conditions only those are asked that a context's attribute leads to."""
    asked = []

    def feature(number: int, wanted: str) -> Feature:
        def value_of(subject: EvalContext) -> bool:
            asked.append(number)
            return "user" in subject.individuals

        return Feature(value_of, (Trigger("user", ("plan",), Match(op), [wanted]),))

    features = [feature(number, value if number == 7 else f"{number}") for number in range(100)]
    made = index_of(*features)
    asked.clear()
    assert made.unusual(user(plan=other)) == {}
    assert made.unusual(user()) == {}
    assert asked == []
    assert made.unusual(user(plan=["x", value])) == {features[7]: True}
    assert asked == [7]


def test_it_takes_one_part_to_make_a_whole_hold():
    """A condition of several clauses is found by that with the fewest values."""
    vocabulary = ConditionCache()
    clauses = [
        Clause(attribute="plan", op="greaterThan", values=[1]),
        Clause(attribute="mail", op="endsWith", values=["a", "b", "c"]),
        Clause(attribute="country", op="in", values=["de", "fr"]),
    ]
    condition = vocabulary.clauses(clauses, lambda _: False)
    assert isinstance(condition, Feature)
    assert condition.triggers == (Trigger("user", ("country",), Match.EQUAL, ["de", "fr"]),)


def test_values_that_python_takes_for_equal_are_told_apart():
    """What is remembered of 1 does not count for true, nor the other way round."""
    features = [feature_of("in", True), feature_of("in", 1), feature_of("greaterThan", 0.5)]
    made = index_of(*features)
    for value in (1, True, 1.0, 1, True, 1.0):
        subject = user(plan=value)
        assert made.unusual(subject) == holding(features, subject)


def entries_of(made: Index) -> index._Entries:
    return made._new if made._new.features else made._old


@pytest.mark.parametrize("kind", [str, int])
def test_what_is_remembered_is_bounded_and_given_up_where_values_do_not_come_again(kind):
    """An e-mail address or a time is soon not remembered any more, a country is."""
    features = [feature_of("in", "de", attribute="country"), feature_of("contains", "a")]
    made = index_of(*features)
    entries = entries_of(made)
    for number in range(200):
        subject = user(country=["de", "fr"][number % 2], plan=kind(number))
        assert made.unusual(subject) == holding(features, subject)
        assert len(entries._effects) * index.VALUE_SIZE <= entries._size <= index.MAX_REMEMBERED
    assert {value for *_, value in entries._effects} == {"de", "fr"}


def test_long_values_are_not_remembered():
    """A context's own texts take no memory that lasts."""
    features = [feature_of("contains", "a")]
    made = index_of(*features)
    assert made.unusual(user(plan="a" * 1000)) == {features[0]: True}
    assert made.unusual(user(plan=["a"])) == {features[0]: True}
    assert entries_of(made)._effects == {}


def test_an_index_goes_on_with_the_entries_of_the_one_before():
    """Only the features that a patch brings are entered."""
    features = [feature_of("in", f"plan-{number}") for number in range(20)]
    made = index_of(*features)
    entries = entries_of(made)
    for last in range(20, 30):
        more = feature_of("in", f"plan-{last}")
        made = index_of(*features[1:], more, before=made)
        assert made._old is entries
        assert made._new.features == {more}
        for plan in (f"plan-{last}", "plan-19", "plan-3"):
            subject = user(plan=plan)
            assert made.unusual(subject) == holding([*features, more], subject)


def test_what_no_flag_has_any_more_is_forgotten():
    """However much changes, there is never much more than flags have."""
    ever = [feature_of("in", f"plan-{number}") for number in range(220)]
    made = Index()
    for start in range(0, 200, 7):
        features = ever[start : start + 20]
        made = index_of(*features, before=made)
        assert made.unusual(user(plan=f"plan-{start}")) == {features[0]: True}
        assert made.size <= 3 * len(features)
    few = index_of(ever[0], before=index_of(ever[0], before=made))
    assert index_of(ever[0], before=few).size == 1
