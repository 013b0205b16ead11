"""Transfers of the newer protocol, as streams and polls carry them (fdv2 13.2)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import InvalidData
from relay.model.item import InvalidItem, Item, Kind
from relay.model.journal import MISSING, Delta, Journal
from relay.model.payload import EMPTY, Change, ChangeSet, Payload, Selector
from relay.protocol import fdv2, sse
from relay.protocol.fdv2 import Current, Fallback, Goodbye, Reader, Told
from relay.steps import finish
from tests.support import fdv2_upstream as upstream
from tests.support.data import flag, segment
from tests.support.strategies import change_sets

EXAMPLES = int(os.environ.get("EXAMPLES", "200"))

FLAG = Item(Kind.FLAG, 'a "b"', 3, b'{"key":"a","version":3,"n":1e21}')
SEGMENT = Item(Kind.SEGMENT, "s", 4, b'{"key":"s","version":4}')
GONE = Item(Kind.FLAG, "gone", 5, None)
PAYLOAD = Payload.of([FLAG, SEGMENT, GONE])


def journal() -> Journal:
    journal = Journal("environment")
    journal.record(PAYLOAD, Change((), (), replace=True), full=True)
    return journal


def events(answer) -> list[tuple[str, dict]]:
    """Return the events of an answer, which a stream and a poll say alike."""
    steps = journal()
    message = fdv2.stream(fdv2.respond(steps, PAYLOAD, answer))
    streamed = [(e.name, json.loads(e.data)) for e in sse.Decoder().feed(message)]
    body = json.loads(fdv2.poll(fdv2.respond(steps, PAYLOAD, answer)))
    assert [(each["event"], each["data"]) for each in body["events"]] == streamed
    return streamed


def intent(code: str, reason: str) -> tuple[str, dict]:
    steps = journal()
    payload = {"id": steps.id, "target": 7, "intentCode": code, "reason": reason}
    return "server-intent", {"payloads": [payload]}


def transferred() -> tuple[str, dict]:
    steps = journal()
    return "payload-transferred", {"state": steps.state, "id": steps.id, "version": 7}


def test_everything():
    """All live items, each as upstream sent it; then the state."""
    assert events(MISSING) == [
        intent("xfer-full", "payload-missing"),
        (
            "put-object",
            {"version": 3, "kind": "flag", "key": 'a "b"', "object": json.loads(FLAG.json)},
        ),
        (
            "put-object",
            {"version": 4, "kind": "segment", "key": "s", "object": json.loads(SEGMENT.json)},
        ),
        transferred(),
    ]
    assert FLAG.json in fdv2.stream(fdv2.full(journal(), PAYLOAD, MISSING))


def test_changes():
    """A tombstone becomes a deletion."""
    assert events(Delta((SEGMENT, GONE), 1)) == [
        intent("xfer-changes", "stale"),
        (
            "put-object",
            {"version": 4, "kind": "segment", "key": "s", "object": json.loads(SEGMENT.json)},
        ),
        ("delete-object", {"version": 5, "kind": "flag", "key": "gone"}),
        transferred(),
    ]


def test_nothing():
    """A client that is up to date keeps its state."""
    assert events(Delta((), 1)) == [intent("none", "up-to-date")]


def read(content: bytes, basis: str = "", reader: Reader | None = None) -> list[Told]:
    """Return what the events of a stream tell."""
    reader = reader or Reader(basis)
    told = (reader.read(event.name, event.data) for event in sse.Decoder().feed(content))
    return [each for each in told if each is not None]


def keys(changes: Told) -> list[str]:
    assert isinstance(changes, ChangeSet)
    return [f"{item.kind.noun} {item.key} {item.version}" for item in changes.items]


FULL = upstream.full("P", 1, flag("a", 3), segment("s", 4))
CHANGES = upstream.changes("P", 2, flag("a", 4), deleted=[("segment", "s")])


def test_everything_of_upstream_is_read():
    """With the version of each item, which is not that of upstream's payload."""
    (changes,) = read(FULL)
    assert keys(changes) == ["flag a 3", "segment s 4"]
    assert changes.full
    assert changes.selector == Selector("(p:P:1)", "P", 1)
    assert changes.since == ""


def test_changes_of_upstream_are_read():
    """They say which data they are a change of."""
    (changes,) = read(CHANGES, "(p:P:1)")
    assert keys(changes) == ["flag a 4", "segment s 0"]
    assert changes.items[1].deleted
    assert not changes.full
    assert (changes.since, changes.selector) == ("(p:P:1)", Selector("(p:P:2)", "P", 2))


def test_changes_follow_without_an_intent():
    """And may come with one."""
    more = upstream.objects("P", 2, flag("b")) + upstream.transferred("P", 2)
    first, second, third = read(FULL + more + upstream.changes("P", 3, flag("c")))
    assert [each.since for each in (first, second, third)] == ["", "(p:P:1)", "(p:P:2)"]
    assert (keys(second), second.full) == (["flag b 1"], False)
    assert (keys(third), third.full) == (["flag c 1"], False)


def test_upstream_has_nothing_new():
    """Changes may follow."""
    none = upstream.intent("P", 1, "none")
    more = upstream.objects("P", 2, flag("b")) + upstream.transferred("P", 2)
    current, changes = read(none + more, "(p:P:1)")
    assert current == Current("(p:P:1)")
    assert (keys(changes), changes.since) == (["flag b 1"], "(p:P:1)")


def test_the_last_of_a_key_counts():
    """In a transfer of everything, too; each is to be applied once."""
    twice = upstream.full("P", 1, flag("a", 3), flag("b"), flag("a", 2))
    assert sorted(keys(read(twice)[0])) == ["flag a 2", "flag b 1"]
    gone = upstream.changes("P", 2, flag("a", 4), deleted=[("flag", "a")])
    assert keys(read(gone, "x")[0]) == ["flag a 0"]
    again = upstream.deletions(2, ("flag", "a")) + upstream.objects("P", 2, flag("a", 4))
    back = upstream.intent("P", 2, "xfer-changes") + again + upstream.transferred("P", 2)
    assert keys(read(back, "x")[0]) == ["flag a 4"]


def test_a_new_intent_voids_what_was_collected():
    """The transfer before it was not complete."""
    half = upstream.intent("P", 1, "xfer-full") + upstream.objects("P", 1, flag("x"))
    (changes,) = read(half + FULL)
    assert keys(changes) == ["flag a 3", "segment s 4"]


def test_an_error_voids_what_was_collected():
    """The events that follow are a new transfer of the same intent."""
    half = upstream.intent("P", 1, "xfer-full") + upstream.objects("P", 1, flag("x"))
    rest = upstream.objects("P", 1, flag("y")) + upstream.transferred("P", 1)
    for error in (upstream.error("oops"), b"event: error\ndata: {\n\n"):
        (changes,) = read(half + error + rest)
        assert (keys(changes), changes.full) == (["flag y 1"], True)


@pytest.mark.parametrize(
    ("data", "goodbye"),
    [
        ('{"reason":"so long"}', Goodbye("so long")),
        ('{"reason":"x","silent":true,"protocolFallbackTTL":60}', Goodbye("x", Fallback(60.0))),
        ('{"protocolFallbackTTL":null}', Goodbye("")),
        ("{oops", Goodbye("")),
    ],
)
def test_a_goodbye_voids_what_was_collected(data, goodbye):
    """It may lead back to FDv1."""
    reader = Reader()
    half = upstream.intent("P", 1, "xfer-full") + upstream.objects("P", 1, flag("x"))
    assert read(half + f"event: goodbye\ndata: {data}\n\n".encode(), reader=reader) == [goodbye]
    (changes,) = read(upstream.objects("P", 1) + upstream.transferred("P", 1), reader=reader)
    assert changes.items == ()


def test_unknown_events_are_ignored():
    """Anywhere, and whatever their data."""
    noise = b"event: heart-beat\ndata: {}\n\nevent: news\ndata: {oops\n\nevent: ping\n\n"
    content = noise + noise.join(each + b"\n\n" for each in FULL.split(b"\n\n") if each)
    assert read(content) == read(FULL)


def test_unknown_kinds_are_left_out():
    """Then upstream's name does not stand for what clients get."""
    content = FULL.replace(b'"kind":"segment"', b'"kind":"experiment"')
    (changes,) = read(content)
    assert keys(changes) == ["flag a 3"]
    assert changes.selector == Selector("(p:P:1)", "P", 1, verbatim=False)
    gone = upstream.changes("P", 2, deleted=[("experiment", "e")])
    (changes,) = read(gone, "(p:P:1)")
    assert changes.items == ()
    assert not changes.selector.verbatim


def test_an_unusable_item_does_not_break_the_others():
    """It is reported; what comes after it for the same key counts."""
    bad = flag("a", 3, variations=3)
    (changes,) = read(upstream.full("P", 1, bad, flag("b")))
    assert keys(changes) == ["flag b 1"]
    assert [(each.kind, each.key) for each in changes.invalid] == [(Kind.FLAG, "a")]
    assert isinstance(changes.invalid[0], InvalidItem)
    assert not changes.selector.verbatim
    (changes,) = read(upstream.full("P", 1, bad, flag("a", 4)))
    assert (keys(changes), changes.invalid) == (["flag a 4"], ())


def test_only_the_first_payload_counts():
    """Others were never seen."""
    text = json.dumps({"payloads": [{"id": "P", "intentCode": "xfer-full"}, {"id": 7}]})
    content = upstream.event("server-intent", text) + upstream.transferred("P", 1)
    (changes,) = read(content)
    assert changes.selector.id == "P"


def test_the_id_of_a_payload_is_that_of_its_intent():
    """Unless the end of the transfer names it."""
    end = upstream.event("payload-transferred", '{"state":"x","version":7.0}')
    (changes,) = read(upstream.intent("Q", 1, "xfer-full") + end)
    assert changes.selector == Selector("x", "Q", 7)


def test_an_empty_state_is_data_without_a_name():
    """Changes of the same connection follow it."""
    end = upstream.event("payload-transferred", '{"state":"","version":0}')
    first = upstream.intent("P", 1, "xfer-full") + end
    nameless, changes = read(first + upstream.objects("P", 2, flag("a")) + end)
    assert (nameless.selector.state, nameless.full) == ("", True)
    assert (keys(changes), changes.since, changes.full) == (["flag a 1"], "", False)


BROKEN = {
    "transfer without an intent": upstream.transferred("P", 1),
    "object without an intent": upstream.objects("P", 1, flag("a")),
    "deletion without an intent": upstream.event("delete-object", '{"kind":"flag","key":"a"}'),
    "changes without data": CHANGES,
    "nothing new without data": upstream.intent("P", 1, "none"),
    "no payload": upstream.event("server-intent", '{"payloads":[]}'),
    "unknown intent": upstream.intent("P", 1, "xfer-half"),
    "intent is no JSON": upstream.event("server-intent", "{oops"),
    "intent without a code": upstream.event("server-intent", '{"payloads":[{"id":"P"}]}'),
    "put is no JSON": FULL.replace(b'"kind":"flag"', b'"kind":flag'),
    "put without a key": FULL.replace(b'"key":"a","object"', b'"object"'),
    "end is no JSON": FULL.replace(b'"state":', b'"state"'),
    "endless version": FULL.replace(b'"version":1}', b'"version":1e999}'),
    "end without a state": FULL.replace(b'"state":', b'"stat":'),
    "no data": b"event: server-intent\n\n",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_transfers_are_refused(case):
    """Nothing of them is to be seen."""
    with pytest.raises(InvalidData):
        read(BROKEN[case])


def test_a_transfer_without_end_is_refused(monkeypatch):
    """Before it fills the memory, even with the same key again and again."""
    monkeypatch.setattr(fdv2, "MAX_TRANSFER", 10_000)
    reader = Reader()
    read(upstream.intent("P", 1, "xfer-full"), reader=reader)
    with pytest.raises(InvalidData, match="longer"):
        read(upstream.objects("P", 1, flag("a")) * 100, reader=reader)


def test_a_cut_at_any_byte_shows_nothing_incomplete():
    """Transfers that were complete before it count, and the last one's state is the next basis."""
    content = FULL + CHANGES + upstream.changes("P", 3, flag("b"))
    whole = read(content)
    ends = [0, len(FULL), len(FULL + CHANGES), len(content)]
    for cut in range(len(content) + 1):
        reader = Reader()
        complete = sum(cut >= end for end in ends) - 1
        assert read(content[:cut], reader=reader) == whole[:complete]
        assert reader.state == ("", "(p:P:1)", "(p:P:2)", "(p:P:3)")[complete]


@pytest.mark.parametrize(
    ("value", "ttl", "fallback"),
    [
        ("true", None, Fallback()),
        (" TRUE", "60", Fallback(60)),
        ("true", "0", Fallback(0)),
        ("true", "-5", Fallback()),
        ("true", "soon", Fallback()),
        ("false", "60", None),
        ("", None, None),
    ],
)
def test_headers_lead_back_to_fdv1(value, ttl, fallback):
    headers = {"x-ld-fd-fallback": value}
    if ttl is not None:
        headers["x-ld-fd-fallback-ttl"] = ttl
    assert fdv2.fallback(headers) == fallback


def test_a_fallback_always_ends():
    """After the time that upstream names, if it is one; within an hour otherwise."""
    assert Fallback(1).period(0.9) == 1
    assert Fallback(3600).period(0.9) == 3600
    for seconds in (None, 0, -1, 3601, 1e300, float("inf")):
        assert (Fallback(seconds).period(0.0), Fallback(seconds).period(0.5)) == (3600, 2700)


def poll(content: bytes, basis: str = "") -> Told:
    return finish(fdv2.read_poll(upstream.body(content), basis))


def test_polls_are_read_alike():
    """The first complete transfer ends one."""
    assert poll(FULL) == read(FULL)[0]
    assert poll(CHANGES, "(p:P:1)") == read(CHANGES, "(p:P:1)")[0]
    assert poll(upstream.intent("P", 1, "none"), "x") == Current("x")
    assert poll(upstream.event("goodbye", '{"reason":"x"}')) == Goodbye("x")
    assert poll(FULL + CHANGES) == read(FULL)[0]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<p>",
        b"{}",
        b"[]",
        b'{"events":{}}',
        b'{"events":[]}',
        b'{"events":[{"data":{}}]}',
        b'{"events":[{"event":"server-intent"}]}',
        upstream.body(upstream.intent("P", 1, "xfer-full")),
        upstream.body(FULL + upstream.error("x")).replace(b"payload-transferred", b"x"),
        upstream.body(FULL)[:-1],
        b"[" * 100_000,
    ],
)
def test_polls_that_are_broken_or_incomplete_are_refused(body):
    with pytest.raises(InvalidData):
        finish(fdv2.read_poll(body, ""))


def test_a_large_poll_comes_in_steps():
    """50 MB, with a step for each item."""
    flags = [flag(f"f{n}", value="x" * 1_000_000) for n in range(50)]
    steps = fdv2.read_poll(upstream.body(upstream.full("P", 1, *flags)), "")
    count = 0
    try:
        while True:
            next(steps)
            count += 1
    except StopIteration as end:
        changes = end.value
    assert count == 51
    assert len(changes.items) == 50


class Chain:
    """A relay, and one behind it that gets its transfers."""

    def __init__(self) -> None:
        self.journals = Journal("environment"), Journal("environment")
        self.payloads = [EMPTY, EMPTY]

    def apply(self, place: int, changes: ChangeSet) -> None:
        journal = self.journals[place]
        first = journal.step == 0
        payload, change = self.payloads[place].apply(changes)
        self.payloads[place] = payload
        if change is not None or first:
            change = change or Change((), (), replace=True)
            journal.record(payload, change, full=changes.full, selector=changes.selector)
        else:
            journal.rename(changes.selector, full=changes.full)

    def sync(self) -> None:
        """Let the second ask the first."""
        upper, lower = self.journals
        answer = upper.answer(lower.upstream)
        body = fdv2.poll(fdv2.respond(upper, self.payloads[0], answer))
        told = finish(fdv2.read_poll(body, lower.upstream))
        if isinstance(told, ChangeSet):
            assert told.since in ("", lower.upstream)
            self.apply(1, told)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.tuples(change_sets, st.booleans()), max_size=8))
def test_what_a_relay_sends_another_relay_reads(steps: Iterable[tuple[ChangeSet, bool]]):
    """After any history the second has the same live items, and names them alike."""
    chain = Chain()
    chain.apply(0, ChangeSet((), full=True))
    for changes, syncs in (*steps, (ChangeSet(()), True)):
        chain.apply(0, changes)
        if syncs:
            chain.sync()
    for kind in Kind:
        ours, theirs = ({i.key: i for i in payload.live(kind)} for payload in chain.payloads)
        assert ours == theirs
    first, second = chain.journals
    assert first.state == second.state == second.upstream
