"""Compiled flags give the same bytes as the interpreter, and changed results are detected."""

import json
import struct
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from relay.evaluation.bucketing import int_to_float32, to_float32
from relay.evaluation.compiled import fragments
from relay.evaluation.compiled.fragments import EVALX
from relay.evaluation.compiled.index import Index
from relay.evaluation.compiled.program import MAX_CALLS, FlagCompiler, Program
from relay.evaluation.compiled.thresholds import threshold
from relay.evaluation.data import Data, Membership, parse_flag
from relay.evaluation.evaluator import evaluate
from relay.evaluation.results import BigSegmentsStatus, render
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import Context, parse_context
from relay.model.flag import Flag
from relay.model.item import Kind
from relay.model.payload import Payload
from tests.evaluation.strategies import (
    FLAGS,
    SEGMENTS,
    contexts,
    data,
    flags,
    memberships,
    payload_of,
    segments,
)
from tests.support.data import flag, segment

ANNA = parse_context(b'{"kind":"user","key":"anna","plan":"pro"}')
Members = Mapping[str, Membership]
NOBODY: Members = {}
some_members = st.dictionaries(st.sampled_from(["anna", "ben", "carla", "é", "pro"]), memberships)
EVERY_KIND = pytest.mark.parametrize("sdk_kind", SDKKind)


@pytest.fixture(autouse=True, scope="module")
def groups_of_any_size():
    """Group flags even in the small data sets of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fragments, "MIN_GROUPED", 1)
        yield


def program_of(
    compiler: FlagCompiler, sdk_kind: SDKKind, version: int = 1, index: Index | None = None
) -> Program:
    """Compile a whole payload; `index` receives its features."""
    seen = ((key, compiler.seen(sdk_kind, key)) for key in sorted(compiler.payload.flags))
    flags = {key: flag for key, flag in seen if flag}
    for each in flags.values() if index else ():
        index.add(each.features or ())
    return Program(flags, version, index)


def interpreted(
    payload: Payload,
    sdk_kind: SDKKind,
    context: Context,
    members: Members = NOBODY,
    *,
    with_reasons: bool,
) -> dict[str, bytes]:
    """The results of the interpreter."""
    known = replace(Data.of(payload), memberships=members)
    parsed = {item.key: parse_flag(item.json) for item in payload.live(Kind.FLAG)}
    return {
        key: render(flag, evaluate(flag, context, known), with_reasons=with_reasons)
        for key, flag in parsed.items()
        if sdk_kind.sees(flag)
    }


def as_members(entries: dict[str, bytes]) -> list[bytes]:
    """Entries as members of a body."""
    return sorted(json.dumps(key).encode() + b":" + entry for key, entry in entries.items())


def assert_same(
    program: Program,
    payload: Payload,
    sdk_kind: SDKKind,
    context: Context,
    members: Members = NOBODY,
) -> None:
    """Assert that a program gives the same results as the interpreter."""
    needed = program.members_needed(context)
    known = {key: each for key, each in members.items() if key in needed or not needed}
    for with_reasons in (False, True):
        expected = interpreted(payload, sdk_kind, context, members, with_reasons=with_reasons)
        some = program.some(context, [*FLAGS, "unknown"], known, with_reasons=with_reasons)
        assert some == expected
        first = program.body(context, known, with_reasons=with_reasons)
        assert program.body(context, known, with_reasons=with_reasons) == first
        body = b"".join(first.pieces)
        assert json.loads(body) == {key: json.loads(entry) for key, entry in expected.items()}
        rest = body[1:-1]
        for member in as_members(expected):
            assert member in rest
        assert len(rest) == sum(map(len, as_members(expected))) + max(0, len(expected) - 1)


@settings(max_examples=200, deadline=None)
@given(data(), st.lists(contexts, min_size=1, max_size=4), some_members)
def test_compiled_flags_give_the_bytes_of_the_interpreter(data_set, asking, members):
    """Whatever flags, segments, contexts and members, compiling changes no byte of any result."""
    payload = payload_of(data_set)
    compiler = FlagCompiler(payload)
    for sdk_kind in SDKKind:
        program = program_of(compiler, sdk_kind)
        for context in asking:
            assert_same(program, payload, sdk_kind, context, members)


@settings(max_examples=100, deadline=None)
@given(data(), contexts, some_members, some_members)
def test_flags_without_big_segments_have_no_members(data_set, context, before, after):
    """Memberships change those flags only that name big segments, for context keys that count."""
    program = program_of(FlagCompiler(payload_of(data_set)), SDKKind.SERVER)
    needed = program.members_needed(context)
    results = [program.some(context, FLAGS, m, with_reasons=True) for m in (before, after)]
    differing = {key for key in FLAGS if results[0].get(key) != results[1].get(key)}
    assert differing <= program.flags_with_big_segments
    if not needed:
        assert results[0] == results[1]


@st.composite
def changed(draw: st.DrawFn) -> tuple[dict, dict]:
    """A data set, and one in which some items are others, gone or new."""
    before = draw(data())
    after = {kind: dict(items) for kind, items in before.items()}
    for key in draw(st.sets(st.sampled_from(FLAGS), max_size=2)):
        after["flags"].pop(key, None)
        if draw(st.booleans()):
            after["flags"][key] = draw(flags(key))
    for key in draw(st.sets(st.sampled_from(SEGMENTS), max_size=1)):
        after["segments"].pop(key, None)
        if draw(st.booleans()):
            after["segments"][key] = draw(segments(key))
    return before, after


@settings(max_examples=100, deadline=None)
@given(changed(), st.lists(contexts, min_size=1, max_size=4))
def test_a_program_built_on_an_earlier_one_equals_one_compiled_from_scratch(change, asking):
    """Reused results of an earlier payload give the same bytes as compiling everything."""
    before, after = map(payload_of, change)
    compiler = FlagCompiler(before)
    index = Index()
    program_of(compiler, SDKKind.SERVER, index=index)
    program_of(compiler, SDKKind.BROWSER)
    compiler = FlagCompiler(after, compiler)
    for sdk_kind in SDKKind:
        program = program_of(compiler, sdk_kind, index=Index(index))
        anew = program_of(FlagCompiler(after), sdk_kind)
        for context in asking:
            for with_reasons in (False, True):
                body = program.body(context, with_reasons=with_reasons)
                other = anew.body(context, with_reasons=with_reasons)
                assert (body.pieces, body.digest) == (other.pieces, other.digest)
            assert_same(program, after, sdk_kind, context)


@settings(max_examples=100, deadline=None)
@given(changed(), st.lists(contexts, min_size=1, max_size=4))
def test_every_flag_whose_result_differs_is_touched(change, asking):
    """Every changed result is detected, whatever caused it."""
    before, after = map(payload_of, change)
    compiler = FlagCompiler(before)
    olds = {sdk_kind: program_of(compiler, sdk_kind) for sdk_kind in SDKKind}
    compiler = FlagCompiler(after, compiler)
    for sdk_kind, old in olds.items():
        new = program_of(compiler, sdk_kind)
        touched = new.flags_touched_by(old)
        for context in asking:
            for with_reasons in (False, True):
                was = old.some(context, FLAGS, with_reasons=with_reasons)
                now = new.some(context, FLAGS, with_reasons=with_reasons)
                differing = {key for key in FLAGS if was.get(key) != now.get(key)}
                assert differing <= touched


@EVERY_KIND
def test_equal_data_touch_nothing(sdk_kind):
    """A full data set equal to the present one is no change, even if its bytes are new."""
    items = {
        "flags": {
            "a": flag("a", prerequisites=[{"key": "b", "variation": 0}], clientSide=True),
            "b": flag("b"),
        },
        "segments": {},
    }
    compiler = FlagCompiler(payload_of(items))
    old = program_of(compiler, sdk_kind)
    new = program_of(FlagCompiler(payload_of(items), compiler), sdk_kind)
    assert new.flags_touched_by(old) == frozenset()


def test_only_flags_that_depend_on_a_change_are_touched():
    """A segment touches the flags that refer to it, and those that have them as prerequisites."""
    rule = {
        "clauses": [{"attribute": "", "op": "segmentMatch", "values": ["outer"]}],
        "variation": 1,
    }
    nested = {"clauses": [{"attribute": "", "op": "segmentMatch", "values": ["inner"]}]}
    items = {
        "flags": {
            "asks": flag("asks", rules=[rule]),
            "needs": flag("needs", prerequisites=[{"key": "asks", "variation": 0}]),
            "neither": flag("neither"),
        },
        "segments": {"outer": segment("outer", rules=[nested]), "inner": segment("inner")},
    }
    compiler = FlagCompiler(payload_of(items))
    old = program_of(compiler, SDKKind.SERVER)
    items["segments"]["inner"] = segment("inner", 2, included=["anna"])
    new = program_of(FlagCompiler(payload_of(items), compiler), SDKKind.SERVER)
    assert new.flags_touched_by(old) == {"asks", "needs"}
    assert json.loads(new.all(ANNA, with_reasons=False))["asks"]["variation"] == 1


@EVERY_KIND
def test_availability_decides_who_sees_a_flag(sdk_kind):
    """A flag that is no longer available is touched, and no longer there."""
    seen = {"usingMobileKey": True, "usingEnvironmentId": True}
    open_one = {"flags": {"a": flag("a", clientSideAvailability=seen)}, "segments": {}}
    closed = {"flags": {"a": flag("a", 2, clientSideAvailability={})}, "segments": {}}
    compiler = FlagCompiler(payload_of(open_one))
    old = program_of(compiler, sdk_kind)
    new = program_of(FlagCompiler(payload_of(closed), compiler), sdk_kind)
    assert new.flags_touched_by(old) == {"a"}
    assert old.some(ANNA, ["a"], with_reasons=False).keys() == {"a"}
    visible = sdk_kind is SDKKind.SERVER
    assert new.some(ANNA, ["a"], with_reasons=False).keys() == ({"a"} if visible else set())


@pytest.mark.parametrize(
    ("flag_", "mobile", "browser"),
    [
        (Flag(), True, False),
        (Flag(client_side=True), True, True),
        (Flag(client_side=False), True, False),
    ],
)
def test_without_availability_mobile_sdks_see_a_flag_and_browsers_ask_client_side(
    flag_, mobile, browser
):
    """Flags from before `clientSideAvailability` are open to mobile SDKs."""
    assert SDKKind.MOBILE.sees(flag_) is mobile
    assert SDKKind.BROWSER.sees(flag_) is browser


def test_flags_that_do_not_depend_on_the_context_are_constant():
    """A rule with the same result as the fallthrough does not make a flag depend on the context."""
    rule = {"clauses": [{"attribute": "plan", "op": "in", "values": ["pro"]}], "variation": 0}
    compiler = FlagCompiler(payload_of({"flags": {"a": flag("a", rules=[rule])}, "segments": {}}))
    compiled = compiler.flag("a")
    assert compiled is not None
    assert compiled.constant_result(with_reasons=False) is not None
    assert compiled.constant_result(with_reasons=True) is None


def in_segments(*keys: str, variation: int = 1) -> dict:
    """A rule for the members of segments."""
    clause = {"attribute": "", "op": "segmentMatch", "values": list(keys)}
    return {"clauses": [clause], "variation": variation}


def test_a_flag_mentions_every_big_segment_that_it_looks_at():
    """A condition that cannot hold is looked at up to where that is clear, as by the interpreter."""
    never = {"attribute": "plan", "op": "in", "values": []}
    small = {"attribute": "", "op": "segmentMatch", "values": ["big"]}
    everybody = segment("everybody", rules=[{"clauses": []}])
    items = {
        "flags": {
            "a": flag("a", rules=[{"clauses": [small, never], "variation": 1}]),
            "b": flag("b", rules=[{"clauses": [never, small], "variation": 1}]),
            "c": flag("c", rules=[in_segments("big", "everybody")]),
            "d": flag("d", rules=[in_segments("everybody", "big")]),
            "e": flag("e", prerequisites=[{"key": "c", "variation": 1}]),
            "f": flag("f", rules=[in_segments("old")]),
        },
        "segments": {
            "big": segment("big", unbounded=True, generation=1),
            "old": segment("old", unbounded=True),
            "everybody": everybody,
        },
    }
    payload = payload_of(items)
    program = program_of(FlagCompiler(payload), SDKKind.SERVER)
    members = {"anna": Membership(BigSegmentsStatus.STALE, {"big.g1": False})}
    found = program.some(ANNA, [*FLAGS, "e", "f"], members, with_reasons=True)
    expected = interpreted(payload, SDKKind.SERVER, ANNA, members, with_reasons=True)
    assert found == expected
    assert [key for key, entry in found.items() if b"STALE" in entry] == ["a", "c", "e"]
    assert b"NOT_CONFIGURED" in found["f"]
    assert program.members_needed(ANNA) == ("anna",)
    assert program.flags_with_big_segments == {*"abcde"}
    assert program.members_needed(parse_context(b'{"kind":"org","key":"x"}')) == ()


def test_cycles_and_long_chains_are_left_to_the_interpreter():
    """Programs leave the cases that only the interpreter supports to the interpreter."""
    chain = {
        f"c{i}": flag(f"c{i}", prerequisites=[{"key": f"c{i + 1}", "variation": 0}])
        for i in range(300)
    }
    items = {
        "flags": {
            "a": flag("a", prerequisites=[{"key": "b", "variation": 0}]),
            "b": flag("b", prerequisites=[{"key": "a", "variation": 0}]),
            "c": flag("c", rules=[in_segments("big")]),
            "c300": flag("c300"),
            **chain,
        },
        "segments": {"big": segment("big", unbounded=True, generation=1)},
    }
    payload = payload_of(items)
    program = program_of(FlagCompiler(payload), SDKKind.SERVER)
    expected = interpreted(payload, SDKKind.SERVER, ANNA, with_reasons=True)
    assert program.some(ANNA, items["flags"], with_reasons=True) == expected
    assert b"MALFORMED_FLAG" in expected["a"]
    assert b"NOT_CONFIGURED" in expected["c"]
    assert b"MALFORMED_FLAG" in expected["c0"]
    assert b'"value":true' in expected["c280"]


def test_flags_that_share_prerequisites_many_times_are_evaluated_in_time():
    """Forty levels of flags, each of which needs both of the next level, are evaluated at once."""
    rule = {"clauses": [{"attribute": "key", "op": "in", "values": ["ben"]}], "variation": 1}
    items = {"flags": {}, "segments": {}}
    for level in range(40):
        needs = (
            [{"key": f"{side}{level + 1}", "variation": 0} for side in "xy"] if level < 39 else []
        )
        for side in "xy":
            items["flags"][f"{side}{level}"] = flag(
                f"{side}{level}", prerequisites=needs, rules=[rule]
            )
    assert MAX_CALLS < 2**40
    payload = payload_of(items)
    program = program_of(FlagCompiler(payload), SDKKind.SERVER)
    results = program.some(ANNA, items["flags"], with_reasons=True)
    assert results == interpreted(payload, SDKKind.SERVER, ANNA, with_reasons=True)


_singles = st.floats(min_value=-1, max_value=3, width=32)
_weights = st.integers(1, 100_000).map(lambda weight: to_float32(weight / 100_000))


@settings(max_examples=300)
@given(
    st.one_of(_weights, _singles),
    st.integers(-3, 3),
    st.integers(0, 2**60 - 1),
    st.binary(min_size=12, max_size=12),
)
def test_thresholds_are_exact(bound, off, anywhere, rest):
    """A digest sorts before a threshold exactly if its bucket, in single precision, is below."""
    text = threshold(bound)
    edges = [anywhere]
    if len(text) == 8:
        edges.append(min(max((int.from_bytes(text, "big") >> 4) + off, 0), 2**60 - 1))
    for number in edges:
        digest = ((number << 4) | 15).to_bytes(8, "big") + rest
        assert (digest < text) is (int_to_float32(number) / 2.0**60 < bound)
        assert struct.unpack(">f", struct.pack(">f", bound)) == (bound,)


def rule(clause: dict, variation: int = 1) -> dict:
    return {"clauses": [clause], "variation": variation}


def context_of(key: str, **attributes: object) -> Context:
    return parse_context(json.dumps({"kind": "user", "key": key, **attributes}).encode())


PRO = {"attribute": "plan", "op": "in", "values": ["pro"]}
IN_CROWD = {"attribute": "", "op": "segmentMatch", "values": ["crowd"]}
HALF = {"rollout": {"variations": [{"variation": n, "weight": 50_000} for n in (0, 1)]}}


def test_contexts_with_the_same_features_share_their_bytes():
    """Also those of flags with equal clauses, lists in segments, targets and prerequisites."""
    items = {
        "flags": {
            "a": flag("a", rules=[rule(PRO)]),
            "b": flag("b", rules=[rule(PRO, 0), rule(IN_CROWD)]),
            "c": flag("c", targets=[{"variation": 1, "values": ["carl"]}]),
            "d": flag("d", prerequisites=[{"key": "c", "variation": 0}]),
            "same": flag("same"),
        },
        "segments": {"crowd": segment("crowd", included=["ben"])},
    }
    program = program_of(FlagCompiler(payload_of(items)), SDKKind.SERVER)
    asking = [
        *(context_of(f"anna-{n}", plan="pro") for n in range(3)),
        *(context_of(f"anna-{n}", plan="free", n=n) for n in range(3)),
        context_of("ben", plan="pro"),
        context_of("carl", plan="pro"),
    ]
    pieces = [program.body(context, with_reasons=False).pieces for context in asking]
    assert len({id(fragment) for *_, fragment in pieces}) == 1
    groups = [id(fragment) for _, fragment, _ in pieces]
    assert [groups.index(group) for group in groups] == [0, 0, 0, 3, 3, 3, 6, 7]
    digests = [program.body(context, with_reasons=False).digest for context in asking]
    bodies = [b"".join(each) for each in pieces]
    assert [digests.index(digest) for digest in digests] == [bodies.index(body) for body in bodies]


def test_rollouts_are_no_features():
    """They differ between otherwise equal contexts, as do those of segments."""
    drawn = {"clauses": [], "weight": 50_000}
    items = {
        "flags": {
            "a": flag("a", fallthrough=HALF),
            "b": flag("b", rules=[rule(IN_CROWD)]),
            "c": flag("c", prerequisites=[{"key": "a", "variation": 0}]),
            "d": flag("d", rules=[rule({**IN_CROWD, "negate": True}), rule(PRO)]),
            "e": flag("e", rules=[rule(PRO)]),
        },
        "segments": {"crowd": segment("crowd", rules=[drawn])},
    }
    compiler = FlagCompiler(payload_of(items))
    flags_ = {key: compiler.flag(key) for key in items["flags"]}
    assert {key for key, each in flags_.items() if each and each.features is None} == set("abcd")


def test_the_cache_of_groups_is_bounded_and_given_up_if_it_does_not_pay(monkeypatch):
    """If most contexts have a group of their own, groups are no longer looked up."""
    monkeypatch.setattr(fragments, "MAX_GROUPS", 32 * 1024)
    values = [f"v{n}" for n in range(64)]
    rules = [rule({"attribute": "tag", "op": "in", "values": [value]}) for value in values]
    items = {f"f{n}": flag(f"f{n}", rules=[each]) for n, each in enumerate(rules)}
    payload = payload_of({"flags": items, "segments": {}})
    for repeats, worthwhile in ((1, False), (3, True)):
        program = program_of(FlagCompiler(payload), SDKKind.SERVER)
        program.body(context_of("anna"), with_reasons=False)
        groups = program._templates[EVALX]._groups
        assert groups is not None
        for value in values:
            context = context_of("anna", tag=value)
            for _ in range(repeats):
                body = program.body(context, with_reasons=False)
                assert json.loads(b"".join(body.pieces))[f"f{value[1:]}"]["variation"] == 1
            cached = sum(len(fragment.text) for fragment in groups._cache.values())
            assert cached <= groups._size <= 32 * 1024
        assert groups._worthwhile is worthwhile
        # Others come, who are all alike: caching is tried again.
        for number in range(2 * fragments.RETRY_AFTER):
            program.body(context_of(f"new-{number}"), with_reasons=False)
        assert groups._worthwhile
        assert groups._hits >= fragments.RETRY_AFTER - 1


def test_programs_and_flags_print_their_state():
    """In a debugger they say which version they are of, not their whole content."""
    compiler = FlagCompiler(payload_of({"flags": {"a": flag("a")}, "segments": {}}))
    program = program_of(compiler, SDKKind.SERVER, version=7)
    assert repr(compiler.flag("a")) == "<CompiledFlag 'a' version 1>"
    assert repr(compiler) == "<FlagCompiler of 1 flags, 1 used>"
    assert repr(program) == "<Program of 1 flags, version 7>"
