"""Joined arrays, and summaries: recordings of ld-relay, the Python SDK, and invariants."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ldclient import Context, LDClient
from ldclient.config import Config
from ldclient.impl.events.event_processor import DefaultEventProcessor
from ldclient.impl.events.types import EventInputCustom, EventInputEvaluation, EventInputIdentify

from relay.model.item import Kind, parse
from relay.protocol.events import (
    FORGET_AFTER,
    MAX_CONTEXTS,
    SUMMARY_SCHEMA,
    Contexts,
    is_array,
    is_empty,
    is_well_formed,
    join_arrays,
    summarise,
)
from tests.support.data import all_data, flag
from tests.support.upstream import in_thread

GOLDEN = Path(__file__).parent.parent / "golden"
NOW = 1_700_000_000_000

blanks = st.sampled_from([b"", b" ", b"\n\t\r "])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@st.composite
def arrays(draw):
    """A text of a JSON array, with whitespace wherever it is allowed."""
    array = json.dumps(draw(st.lists(values, max_size=4)), ensure_ascii=draw(st.booleans()))
    inner = draw(blanks) + array.encode()[1:-1] + draw(blanks)
    return draw(blanks) + b"[" + inner + b"]" + draw(blanks)


@given(st.lists(arrays(), max_size=5))
def test_joined_is_the_concatenation(bodies):
    """Joined arrays hold the elements of all, in order."""
    assert json.loads(join_arrays(bodies)) == [e for body in bodies for e in json.loads(body)]


def test_joined_keeps_the_bytes():
    """Numbers, whitespace and escapes stay as they are; empty arrays vanish."""
    bodies = [b' [ 1.0 , "\\u00fc" ] ', b"[ ]", b'[12345678901234567890,{"a": -0}]', b"[]\n"]
    wanted = b'[ 1.0 , "\\u00fc" ,12345678901234567890,{"a": -0}]'
    assert join_arrays(bodies) == wanted


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"[", b"]", b"{}", b"null", b'"x"', b"[{", b"1]", b"\v[]", b"\xef\xbb\xbf[]"],
)
def test_other_texts_are_no_arrays(body):
    """A text that does not begin and end like an array is recognised."""
    assert not is_array(body)
    assert not is_empty(body)


@given(arrays())
def test_arrays_are_recognised(body):
    """Every array is, and so is every empty one."""
    assert is_array(body)
    assert is_empty(body) == (json.loads(body) == [])


# Recordings of ld-relay


def recordings():
    lines = (GOLDEN / "events.jsonl").read_text("utf-8").split("\n")
    return [line for line in map(json.loads, filter(None, lines)) if is_summarised(line)]


def is_summarised(recording):
    return recording["name"].startswith("summarised")


def store(*, data=None):
    """Return a look-up of flags."""
    data = data or json.loads((GOLDEN / "environment.json").read_text("utf-8"))["flags"]
    items = {key: parse(Kind.FLAG, key, json.dumps(item).encode()) for key, item in data.items()}
    return items.get


def meaning(events):
    """Return events with counters and kinds sorted, as their order has no meaning."""
    for event in events:
        for counted in event.get("features", {}).values():
            counted["counters"].sort(key=lambda c: json.dumps(c, sort_keys=True))
            counted["contextKinds"] = sorted(counted.get("contextKinds", []))
    return events


def wanted_of(recording):
    """Return the events that ld-relay sent, or the ones wanted instead."""
    if "userKey only" in recording["name"]:  # row 30: they are counted
        counters = [{"variation": 0, "version": 7, "value": True, "count": 1}]
        lamp = {"default": False, "counters": counters, "contextKinds": ["user"]}
        features = {"lamp": lamp}
        return [{"kind": "summary", "startDate": 1000, "endDate": 1000, "features": features}]
    wanted = [e for sent in recording["upstream"] for e in json.loads(sent["body"])]
    if "more than the capacity" in recording["name"]:  # row 26: nothing is lost
        more = ({**wanted[-1], "key": f"over{n}"} for n in range(9, 15))
        wanted = [*wanted, *more]
    return wanted


def test_recordings():
    """Payloads in a row are summarised as by ld-relay, or better where wanted."""
    flags, partitions = store(), {}
    for recording in recordings():
        got = []
        for request in recording["sent"]:
            headers = {name.lower(): value for name, value in request["headers"]}
            named = headers.get("x-launchdarkly-event-schema", "1")
            schema = int(named) if named in "2345" else 1
            partition = request["path"], schema, headers.get("x-launchdarkly-tags")
            contexts = partitions.setdefault(partition, Contexts())
            body = request["body"].encode()
            result = summarise(body, schema, flags, contexts, now=NOW, server_time=0)
            if result.body:
                got += json.loads(result.body)
        assert meaning(got) == meaning(wanted_of(recording)), recording["name"]


# Details


def feature(key="lamp", user="u", date=1000, **members):
    usual = {"version": 7, "variation": 0, "value": True, "default": False, "user": {"key": user}}
    return {"kind": "feature", "creationDate": date, "key": key, **usual, **members}


def output_of(events, contexts=None, flags=None, **options):
    """Return the output as objects, and the numbers of dropped events."""
    body = events if isinstance(events, bytes) else json.dumps(events).encode()
    arguments = {"schema": 2, "now": NOW, "server_time": 0, **options}
    schema = arguments.pop("schema")
    result = summarise(body, schema, flags or {}.get, contexts or Contexts(), **arguments)
    return (json.loads(result.body) if result.body else []), dict(result.dropped)


def test_numbers_stay_exact():
    """Values, defaults, contexts and data keep their bytes."""
    raw = b'{"big": 12345678901234567890, "f":1.0,"z":-0}'
    body = (
        b'[{"kind":"feature","creationDate":5,"key":"f","version":1,"value":%b,"default":%b,'
        b'"trackEvents":true,"reason":%b,"user":{"key":"u","custom":%b}},'
        b'{"kind":"custom","key":"c","creationDate":5,"userKey":"u","data":%b,"metricValue":1.50},'
        b'{"kind":"pageview","x":%b}]'
    ) % ((raw,) * 6)
    output = summarise(body, 2, {}.get, Contexts(), now=NOW, server_time=0).body
    assert output.count(raw) == 9  # index 1, feature 4, custom 1, pageview 1, summary 2
    assert b'"metricValue":1.50' in output


def test_capacity_is_no_limit():
    """However many events there are, none is lost."""
    events = [feature(user=f"u{n}", trackEvents=True) for n in range(2500)]
    output, dropped = output_of(events)
    assert Counter(e["kind"] for e in output) == {"index": 2500, "feature": 2500, "summary": 1}
    assert not dropped


@pytest.mark.parametrize(
    "events", [b"", b"{}", b"null", b"[{", b"[1]]", b'["\xff"]', b"[" * 100_000, b"[[1]"]
)
def test_a_body_that_is_no_array_is_dropped_as_a_whole(events):
    """There is one reason, and nothing to send."""
    output, dropped = output_of(events)
    assert output == []
    assert list(dropped.values()) == [1]


def test_a_lone_surrogate():
    """JavaScript cuts texts between two halves; these events count like others."""
    body = json.dumps([feature(value="x\ud83d", default="\\ud800"), feature(value="\U0001f600")])
    output, dropped = output_of(body.encode())
    assert output[-1]["features"]["lamp"]["counters"][0]["value"] == "x\ufffd"
    assert output[-1]["features"]["lamp"]["default"] == "\\ud800"
    assert output[-1]["features"]["lamp"]["counters"][0]["count"] == 2
    assert not dropped


BROKEN = [
    5, None, "x", [], {}, {"kind": 5}, {"kind": ""}, {"kind": "feature"}, {"kind": "custom", "user": {}},
    {"kind": "identify", "userKey": "u"}, feature(version="x"), feature(variation=[]),
    feature(creationDate="now"), feature(trackEvents=1), feature(creationDate=1e30), feature(key=1),
    feature() | {"user": None}, feature(user=5), feature(user=None), feature(context={"kind": "multi"}),
    feature(context={"kind": "org"}), feature(context={"kind": "org", "key": ""}), feature(context=[]),
    feature(context={"kind": "a b", "key": "x"}), feature(context={"kind": "kind", "key": "x"}),
    feature(context={"kind": "multi", "org": {"key": "o"}, "user": {}}),
    feature(context={"kind": "multi", "org": 7}), {"kind": "custom", "userKey": "u", "metricValue": "1"},
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_events_are_dropped_alone(broken):
    """Each has its reason; the others of the payload are kept."""
    output, dropped = output_of([feature(), broken, {"kind": "pageview"}])
    assert [e["kind"] for e in output] == ["index", "pageview", "summary"]
    assert list(dropped.values()) == [1]
    assert output[-1]["features"]["lamp"]["counters"][0]["count"] == 1


def test_nesting_beyond_all_measure():
    """It costs the event, not the relay."""
    nested = b'{"kind":"feature","key":"f","version":1,"userKey":"u","value":%b}'
    deep = nested % (b"[" * 900 + b"]" * 900)
    data = {"f": flag("f", variations=[json.loads(b"[" * 900 + b"]" * 900)])}
    output, dropped = output_of(b"[" + deep + b"]", flags=store(data=data), schema=1)
    assert sum(dropped.values()) + len(output) == 1


@pytest.mark.parametrize(
    ("value", "variation"),
    [
        (1, 1), (True, 0), (1.0, 1), ("1", 2), ([1, {"a": 0}], 3), ([1, {"a": False}], None), (None, 4),
        ({}, 5), ([], None), (2**70, 6), (2**70 + 1, None), (0, None), ({"b": 1, "a": True}, 7), ({"a": 1, "b": 1}, None),
    ],
)  # fmt: skip
def test_the_variation_of_schema_1_is_found_by_its_value(value, variation):
    """Values are compared as JSON, where 1 is 1.0, but not true."""
    variations = [True, 1, "1", [1, {"a": 0}], None, {}, 2**70, {"a": True, "b": 1}]
    flags = store(data={"lamp": flag() | {"variations": variations}})
    event = feature(value=value, variation=None)
    counter = output_of([event], schema=1, flags=flags)[0][-1]["features"]["lamp"]["counters"][0]
    assert counter.get("variation") == variation
    counter = output_of([event], schema=2, flags=flags)[0][-1]["features"]["lamp"]["counters"][0]
    assert "variation" not in counter


@pytest.mark.parametrize(("offset", "wanted"), [(-1, False), (0, False), (1, True)])
@pytest.mark.parametrize("where", ["event", "flag"])
def test_debugging_ends_by_both_clocks(offset, wanted, where):
    """By our clock, or by upstream's if that is ahead."""
    until = {"debugEventsUntilDate": NOW + offset}
    flags = store(data={"lamp": flag(**(until if where == "flag" else {}))})
    event = feature(**(until if where == "event" else {}))
    for clocks in ({"now": NOW}, {"now": NOW - 500, "server_time": NOW}):
        output, _ = output_of([event], flags=flags, **clocks)
        assert ("debug" in [e["kind"] for e in output]) == wanted


def test_a_flag_that_is_gone_or_not_there_yet_is_counted():
    """Unlike ld-relay, which drops such events without data; a deleted flag has no options either."""
    gone = {"lamp": parse(Kind.FLAG, "lamp", b'{"version":8,"deleted":true}')}
    for flags in ({}.get, gone.get):
        output, dropped = output_of([feature()], flags=flags)
        assert [e["kind"] for e in output] == ["index", "summary"]
        assert not dropped


def test_events_without_a_date_happened_now():
    """A summary that began in 1970 would be of no use."""
    output, _ = output_of([feature(date=None), feature(date=NOW - 5)])
    assert output[0]["creationDate"] == NOW
    assert (output[-1]["startDate"], output[-1]["endDate"]) == (NOW - 5, NOW)


def test_users_known_only_by_their_key():
    """No index event introduces them, but their evaluations count (row 30)."""
    tracked = feature(userKey="u", trackEvents=True)
    del tracked["user"]
    custom = {"kind": "custom", "key": "c", "userKey": "u", "creationDate": 1}
    output, _ = output_of([tracked, custom, feature()])
    assert [e["kind"] for e in output] == ["feature", "custom", "index", "summary"]
    assert output[0]["contextKeys"] == output[1]["contextKeys"] == {"user": "u"}
    assert "context" not in output[0]
    assert output[-1]["features"]["lamp"]["counters"][0]["count"] == 2


# Well-formed bodies


@given(arrays())
def test_output_of_a_json_writer_is_well_formed(body):
    """With whitespace wherever it is allowed, as escapes or in UTF-8."""
    assert is_well_formed(body)


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        *((body, True) for body in (b"[]", b' [ 1 , {"a" : [null, true, -0.5e+7]} ]\r\n')),
        *((body, True) for body in (b'[{"a":1,"a":2}]', b"[1e999]", b"[%s]" % (b"1" * 500))),
        *((body, True) for body in (b'["\\ud83d"]', b'["\\udc00x"]', b'["\\ud83d\\ude00"]')),
        *((body, True) for body in ('["é😀\u2028\x7f"]'.encode(), b"[" * 200 + b"]" * 200)),
        *(
            (body, False)
            for body in (b"", b"[", b'[{"a":1]', b"[1,]", b"[,1]", b"[1 2]", b"[1],[2]")
        ),
        *((body, False) for body in (b"[NaN]", b"[Infinity]", b"[01]", b"[1.]", b"[+1]", b"['a']")),
        *((body, False) for body in (b'["\x00"]', b"[1\x00]", b'["\n"]', b"[1\x0b]", b'["\\x"]')),
        *((body, False) for body in (b'["\xff"]', b'["\xc0\x80"]', b'["\xed\xa0\x80"]')),
        *(
            (body, False)
            for body in (b'[{"\xff":1}]', b'["\xe9"]', b'["\\ud83d]', b'["\\ud83d",NaN]')
        ),
        (b"\xef\xbb\xbf[]", False),
        (b"[" * 200_000 + b"]" * 200_000, None),
    ],
)
def test_well_formed_bodies(body, verdict):
    """RFC 8259 decides; only a text nested beyond any event is undecided."""
    assert is_well_formed(body) is verdict


@given(st.binary(max_size=20) | st.text('[]{}",:0-1.eE truefalsn\\ud8\x00\u20ac', max_size=20))
def test_the_standard_library_reads_what_is_well_formed(text):
    """And nothing else, but for its extensions of the standard."""

    def refuse(name):
        raise ValueError(name)

    body = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    try:
        json.loads(body.decode(), parse_constant=refuse)
    except ValueError:
        assert is_well_formed(body) is False
    else:
        assert is_well_formed(body) is True


# Contexts that upstream knows


def introduced(contexts, *users, now=NOW):
    evaluated = [feature(user=user) for user in users]
    output, _ = output_of(evaluated, contexts, now=now)
    return [e["context"]["key"] for e in output if e["kind"] == "index"]


def test_contexts_are_introduced_once():
    """The thousand that were used last are remembered."""
    contexts, many = Contexts(), [f"u{n}" for n in range(MAX_CONTEXTS)]
    assert introduced(contexts, *many) == many
    assert introduced(contexts, "u0", "new") == ["new"]  # u1 is forgotten, as u0 was used again
    assert introduced(contexts, "u0", "u2", "u1") == ["u1"]


def test_contexts_are_introduced_again_after_a_while():
    """Five minutes after the first, all are forgotten together."""
    contexts = Contexts()
    for now, expected in ((7, "ab"), (6 + FORGET_AFTER, ""), (7 + FORGET_AFTER, "ab")):
        contexts.forget_old(now)
        assert introduced(contexts, "a", "b") == list(expected)
    contexts.forget()
    assert introduced(contexts, "a") == ["a"]


def test_contexts_stay_known_while_the_clock_is_corrected():
    """The time of events is no measure of how long ago a context was introduced."""
    contexts = Contexts()
    assert introduced(contexts, "a") == ["a"]
    for jump in (8, -8):
        assert introduced(contexts, "a", now=NOW + jump * 86_400_000) == []


def test_kinds_are_distinguished():
    """A user whose key looks like another kind's context is somebody else."""
    contexts = Contexts()
    org = feature(context={"kind": "org", "key": "x"})
    both = feature(context={"kind": "multi", "org": {"key": "x"}, "user": {"key": "u"}})
    again = feature(context={"user": {"key": "u"}, "kind": "multi", "org": {"key": "x"}})
    output, _ = output_of([org, feature(user="org:x"), both, again, feature(user="u")], contexts)
    assert [e["kind"] for e in output] == ["index"] * 4 + ["summary"]
    assert output[-1]["features"]["lamp"]["contextKinds"] == ["org", "user"]


# Invariants

evaluations = st.builds(
    feature,
    key=st.sampled_from(["a", "b"]),
    user=st.sampled_from(["u", "v", "w"]),
    date=st.integers(1, 9),
    version=st.sampled_from([None, 1, 2]),
    variation=st.sampled_from([None, 0, 1]),
    trackEvents=st.sampled_from([None, False, True]),
    excludeFromSummaries=st.sampled_from([None, False, True]),
)


def totals(payloads):
    """Return the sums of several summaries."""
    counts, dates, full = Counter(), [], Counter()
    contexts = Contexts()
    for events in payloads:
        output, dropped = output_of(events, contexts)
        assert not dropped
        for event in output:
            if event["kind"] != "summary":
                full[event["kind"]] += 1
                continue
            dates += [event["startDate"], event["endDate"]]
            for key, counted in event["features"].items():
                for counter in counted["counters"]:
                    assert counter.get("unknown", False) == ("version" not in counter)
                    counts[key, counter.get("variation"), counter.get("version")] += counter[
                        "count"
                    ]
    return counts, dates and (min(dates), max(dates)), full


@settings(max_examples=60, deadline=None)
@given(
    st.lists(evaluations, max_size=12).flatmap(
        lambda es: st.tuples(st.just(es), st.permutations(es), st.integers(1, 5))
    )
)
def test_counts_add_up(case):
    """Totals, times, and numbers of other events do not depend on order and grouping."""
    events, shuffled, size = case
    groups = [shuffled[at : at + size] for at in range(0, len(shuffled), size)]
    assert totals(groups) == totals([events])
    assert totals([events])[0].total() == sum(not e["excludeFromSummaries"] for e in events)


# The Python SDK, which summarises its own evaluations


class Recording(DefaultEventProcessor):
    """The SDK's own processor, which records its inputs."""

    inputs: list = []  # noqa: RUF012 - replaced by the test

    def send_event(self, event):
        self.inputs.append(event)
        super().send_event(event)


def as_schema_2(event):
    """Return the event that an SDK without summaries would have sent."""
    base = {"creationDate": event.timestamp, "context": event.context.to_dict()}
    if isinstance(event, EventInputIdentify):
        return {"kind": "identify", **base}
    if isinstance(event, EventInputCustom):
        own = {"data": event.data, "metricValue": event.metric_value}
        return {"kind": "custom", "key": event.key, **base, **own}
    assert isinstance(event, EventInputEvaluation)
    version = None if event.flag is None else event.flag.version
    members = {"version": version, "variation": event.variation, "value": event.value}
    members |= {"default": event.default_value, "trackEvents": event.track_events}
    members |= {"reason": event.reason, "excludeFromSummaries": event.exclude_from_summaries}
    members |= {"prereqOf": event.prereq_of.key} if event.prereq_of else {}
    if event.flag is not None and event.flag.debug_events_until_date:
        members["debugEventsUntilDate"] = event.flag.debug_events_until_date
    return {"kind": "feature", "key": event.key, **base, **members}


def use(client):
    """Cause every kind of event, for several contexts, more than once."""
    contexts = [Context.create("a"), Context.builder("b").name("B").build()]
    org = Context.builder("o").kind("org").set("size", 12).build()
    contexts += [org, Context.create_multi(Context.create("a"), org)]
    for _ in range(3):
        for context in contexts:
            for key in ("lamp", "watched", "debugged", "needy", "off", "hidden", "nobody"):
                client.variation(key, context, "none")
            client.track("bought", context, {"n": [1, None]}, 2.5)
            client.track("seen", context)
        client.identify(Context.builder("c").name("C").build())


def comparable(events):
    """Return events with context keys: schema 4 allows these or the whole context."""
    for event in events:
        if event["kind"] == "custom":
            context = Context.from_dict(event.pop("context")) if "context" in event else None
            parts = [context.get_individual_context(i) for i in range(context.individual_context_count)] if context else []  # fmt: skip
            event.setdefault("contextKeys", {part.kind: part.key for part in parts})
    return meaning(events)


def test_the_sdk_agrees():
    """Our summary of raw evaluations equals that of LaunchDarkly's SDK."""
    far = 32_503_680_000_000
    needs = [{"key": "watched", "variation": 0}]
    flags = [
        flag(), flag("watched", 3, "x", trackEvents=True), flag("debugged", 4, debugEventsUntilDate=far),
        flag("needy", 5, prerequisites=needs), flag("off", 6, on=False), flag("hidden", 7, excludeFromSummaries=True),
    ]  # fmt: skip
    Recording.inputs = []
    with in_thread() as upstream:
        upstream.do("serve", "sdk-1", all_data(*flags))
        config = Config(
            "sdk-1",
            base_uri=upstream.url,
            stream_uri=upstream.url,
            events_uri=upstream.url,
            flush_interval=300,
            event_processor_class=Recording,
            diagnostic_opt_out=True,
        )
        client = LDClient(config, start_wait=5)
        use(client)
        client.close()
        (sent,) = upstream.upstream.posts
    body = json.dumps([as_schema_2(event) for event in Recording.inputs]).encode()
    ours = summarise(body, 2, {}.get, Contexts(), now=NOW, server_time=0)
    assert not ours.dropped
    kinds = {"index", "feature", "debug", "custom", "identify", "summary"}
    assert {event["kind"] for event in sent.events} == kinds
    assert sent.headers["X-LaunchDarkly-Event-Schema"] == str(SUMMARY_SCHEMA)
    assert comparable(json.loads(ours.body)) == comparable(sent.events)
