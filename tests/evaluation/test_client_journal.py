"""Client-side SDKs that come back have exactly the results of the present data (fdv2 13.8.7)."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.evaluation import clientjournal
from relay.evaluation.client import EvalClient
from relay.evaluation.compiled.program import Program
from relay.evaluation.data import Membership
from relay.evaluation.results import BigSegmentsStatus
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import parse_context
from relay.model.item import Item, Kind, parse
from relay.model.journal import Journal
from relay.model.payload import EMPTY, ChangeSet
from relay.programs import ProgramCache
from relay.protocol.flageval import POLL, ClientState, respond
from tests.evaluation import strategies
from tests.support import data

EXAMPLES = int(os.environ.get("EXAMPLES", "100"))
OPEN = {"clientSideAvailability": {"usingEnvironmentId": True, "usingMobileKey": True}}
HIDDEN = {"clientSideAvailability": {"usingEnvironmentId": False, "usingMobileKey": False}}
KINDS = [SDKKind.MOBILE, SDKKind.BROWSER]


class Replica:
    """One relay's data of an environment, and what it says to clients."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start, or start again without anything."""
        self.payload = None
        self.journal = Journal("lineage")
        self.programs = ProgramCache(self.journal)

    def restart(self) -> None:
        """Start again with the data, and the journal of another process' record."""
        self.programs = ProgramCache(self.journal)
        self.programs.update(self.payload)

    def take(self, *items: Item, full: bool = False) -> None:
        """Apply items of upstream."""
        first = self.payload is None
        self.payload, change = (self.payload or EMPTY).apply(ChangeSet(items, full=full or first))
        if change is not None:
            self.journal.record(self.payload, change, full=full or first)
            self.programs.update(self.payload)

    def program(self, sdk_kind: SDKKind) -> Program:
        return asyncio.run(self.programs.ready(sdk_kind))

    def say(self, client: Client) -> bytes:
        """Return the answer to a client that comes back."""
        program = self.program(client.about.sdk_kind)
        named = ClientState.parse(client.basis)
        answer = self.programs.client_journal.answer(program, client.about.sdk_kind, named.data)
        return b"".join(respond(POLL, program, client.about, named, answer).body.pieces)

    def results(self, client: Client) -> dict[str, dict]:
        """All results for a client."""
        about = client.about
        body = self.program(about.sdk_kind).all(
            about.context, about.memberships, with_reasons=about.with_reasons
        )
        return json.loads(body)


class Client:
    """An SDK that speaks FDv2."""

    def __init__(self, context: dict, sdk_kind: SDKKind, *, with_reasons: bool = False) -> None:
        raw = json.dumps(context).encode()
        self.about = EvalClient(raw, parse_context(raw), sdk_kind, with_reasons=with_reasons)
        self.basis = ""
        self.flags: dict[str, dict] = {}
        self.named: list[str] = []
        """Keys in the last answer, those deleted included."""

    def hear(self, body: bytes) -> str:
        """Take an answer; return its code."""
        first, *events = json.loads(body)["events"]
        (payload,) = first["data"]["payloads"]
        code = payload["intentCode"]
        if code == "xfer-full":
            self.flags = {}
        self.named = []
        assert (events == []) == (code == "none")
        for event in events[:-1]:
            item = event["data"]
            self.named.append(item["key"])
            assert item["kind"] == "flag-eval"
            if event["event"] == "delete-object":
                self.flags.pop(item["key"], None)
            else:
                assert item["object"].pop("flagVersion") == item["object"]["version"]
                assert item["version"] == item["object"]["version"]
                self.flags[item["key"]] = item["object"]
        assert len({*self.named}) == len(self.named)
        if events:
            assert events[-1]["event"] == "payload-transferred"
            self.basis = events[-1]["data"]["state"]
        return code


def flag(key: str, version: int, **members: object) -> Item:
    return parse(Kind.FLAG, key, json.dumps(data.flag(key, version, **members)).encode())


def segment(key: str, version: int, **members: object) -> Item:
    return parse(Kind.SEGMENT, key, json.dumps(data.segment(key, version, **members)).encode())


def gone(key: str, version: int) -> Item:
    return Item(Kind.FLAG, key, version, None)


FILLERS = [flag(f"filler-{n}", 1, **OPEN) for n in range(8)]


@pytest.fixture
def replica():
    replica = Replica()
    replica.take(*FILLERS, flag("a", 1, **OPEN), flag("hidden", 1, **HIDDEN))
    return replica


@pytest.fixture
def client(replica):
    client = Client({"kind": "user", "key": "anna"}, SDKKind.BROWSER)
    assert client.hear(replica.say(client)) == "xfer-full"
    return client


def test_a_client_gets_what_it_misses(replica, client):
    """One flag of many, then nothing."""
    assert client.hear(replica.say(client)) == "none"
    replica.take(flag("a", 2, value="new", **OPEN))
    assert client.hear(replica.say(client)) == "xfer-changes"
    assert client.named == ["a"]
    assert client.flags["a"]["value"] == "new"
    assert client.hear(replica.say(client)) == "none"


def test_flags_that_look_up_what_was_touched_are_among_them(replica, client):
    """Through rules, segments in segments and prerequisites, in the old graph or the new one."""
    by_outer = {"attribute": "", "op": "segmentMatch", "values": ["outer"]}
    by_inner = {"attribute": "", "op": "segmentMatch", "values": ["inner"]}
    ruled = {"rules": [{"variation": 1, "clauses": [by_outer]}], **OPEN}
    replica.take(flag("ruled", 1, **ruled), segment("outer", 1, rules=[{"clauses": [by_inner]}]))
    needs = {"prerequisites": [{"key": "ruled", "variation": 1}], **OPEN}
    replica.take(segment("inner", 1), flag("needs", 1, **needs))
    client.hear(replica.say(client))
    replica.take(segment("inner", 2, included=["anna"]))
    assert client.hear(replica.say(client)) == "xfer-changes"
    assert client.named == ["needs", "ruled"]
    assert client.flags == replica.results(client)
    replica.take(segment("outer", 2), segment("inner", 3))
    client.hear(replica.say(client))
    assert client.flags == replica.results(client)


def test_keys_of_flags_that_it_never_saw_are_not_told(replica, client):
    """Neither when they change nor when they are deleted; one that it saw is deleted."""
    replica.take(flag("hidden", 2, **HIDDEN))
    assert client.hear(replica.say(client)) == "xfer-changes"
    replica.take(gone("hidden", 3), flag("a", 2, **HIDDEN))
    assert client.hear(replica.say(client)) == "xfer-changes"
    assert client.named == ["a"]
    assert "a" not in client.flags
    replica.take(gone("a", 3))
    client.hear(replica.say(client))
    assert client.named == []


def test_after_a_restart_what_was_visible_before_is_unknown(replica, client):
    """Flags that are visible make a delta; an invisible one may have been seen: everything."""
    replica.take(flag("a", 2, **OPEN))
    replica.restart()
    assert client.hear(replica.say(client)) == "xfer-changes"
    replica.take(flag("hidden", 2, **HIDDEN))
    assert client.hear(replica.say(client)) == "xfer-changes"
    replica.take(flag("hidden", 3, **HIDDEN))
    replica.restart()
    assert client.hear(replica.say(client)) == "xfer-full"
    assert client.flags == replica.results(client)


def test_the_memory_of_what_was_seen_is_bounded(replica, client, monkeypatch):
    """A client that misses more gets everything."""
    monkeypatch.setattr(clientjournal, "MAX_SEEN", 2)
    for version in (2, 3):
        replica.take(*(flag(f"filler-{n}", version, **OPEN) for n in range(3)))
        replica.take(flag("hidden", version, **HIDDEN))
    assert client.hear(replica.say(client)) == "xfer-full"
    assert client.flags == replica.results(client)


def test_a_segment_of_most_flags_is_no_delta(replica, client):
    """To evaluate everything costs less then."""
    by_crowd = {"attribute": "", "op": "segmentMatch", "values": ["crowd"]}
    ruled = {"rules": [{"variation": 1, "clauses": [by_crowd]}], **OPEN}
    replica.take(*(flag(f"filler-{n}", 2, **ruled) for n in range(8)))
    client.hear(replica.say(client))
    replica.take(segment("crowd", 1, included=["anna"]))
    assert client.hear(replica.say(client)) == "xfer-full"
    assert client.flags == replica.results(client)


@pytest.mark.parametrize(
    "change", ["", "~", "x", "~x", ".", "~.", "\ud800~", "ü" * 5000, "(", "%"], ids=ascii
)
def test_a_state_that_is_not_its_own_means_everything(replica, client, change):
    """Of another context or kind of SDK, without marks, or garbage."""
    data_state = ClientState.parse(client.basis).data
    others = [
        Client({"kind": "user", "key": "ben"}, SDKKind.BROWSER),
        Client({"kind": "user", "key": "anna"}, SDKKind.MOBILE),
        Client({"kind": "user", "key": "anna"}, SDKKind.BROWSER, with_reasons=True),
    ]
    for other in others:
        other.hear(replica.say(other))
    for basis in [*(other.basis for other in others), data_state + change, change, change * 2]:
        client.basis = basis
        assert client.hear(replica.say(client)) == "xfer-full", basis


def test_memberships_in_big_segments_are_a_part_of_the_state(replica, client):
    """If they have changed, the flags that depend on any come along, and no others."""
    by_big = {"attribute": "", "op": "segmentMatch", "values": ["big"]}
    ruled = {"rules": [{"variation": 1, "clauses": [by_big]}], **OPEN}
    replica.take(flag("big-flag", 1, **ruled), segment("big", 1, unbounded=True, generation=1))
    healthy = BigSegmentsStatus.HEALTHY
    client.about.memberships = {"anna": Membership(healthy, {})}
    client.hear(replica.say(client))
    assert client.hear(replica.say(client)) == "none"
    client.about.memberships = {"anna": Membership(healthy, {"big.g1": True})}
    before = client.flags["big-flag"]
    assert client.hear(replica.say(client)) == "xfer-changes"
    assert client.named == ["big-flag"]
    assert client.flags["big-flag"] != before
    assert client.hear(replica.say(client)) == "none"


_flags = st.sampled_from(strategies.FLAGS).flatmap(strategies.flags)
_segments = st.sampled_from(strategies.SEGMENTS).flatmap(strategies.segments)
_which = st.sampled_from([0, 0, 1])
_steps = st.one_of(
    st.tuples(st.just("flag"), _which, _flags),
    st.tuples(st.just("segment"), _which, _segments),
    st.tuples(st.just("segment"), _which, _segments),
    st.tuples(st.just("delete"), _which, st.sampled_from(strategies.FLAGS)),
    st.tuples(st.just("restart"), _which, st.booleans()),
    *[st.tuples(st.just("poll"), _which, st.integers(0, 3))] * 4,
)


@settings(max_examples=EXAMPLES)
@given(
    strategies.data(),
    st.lists(_steps, min_size=8, max_size=30),
    st.lists(strategies.context_values, min_size=4, max_size=4),
)
def test_clients_of_two_replicas_always_have_all_results(start, steps, contexts):
    """Whatever happens, whichever replica they come to; they never hear of flags they cannot see.

    The replicas' data come in different orders, and in part. A restarted one knows its journal or
    nothing.
    """
    replicas = [Replica(), Replica()]
    fillers = [flag(f"filler-{n}", 1, text="x" * 3000, **OPEN) for n in range(8)]
    for values in start.values():
        for value in values.values():
            value["salt"] = ""
    for replica in replicas:
        replica.take(*fillers, *strategies.payload_of(start))
    clients = [
        Client(context, KINDS[n % 2], with_reasons=n > 1) for n, context in enumerate(contexts)
    ]
    seen: dict[Client, set[str]] = {client: set() for client in clients}
    for number, (what, which, how) in enumerate(steps):
        replica = replicas[which]
        if what in {"flag", "segment"}:
            kind = Kind.FLAG if what == "flag" else Kind.SEGMENT
            value = how | {"version": how["version"] + 10 * number, "salt": ""}
            replica.take(parse(kind, how["key"], json.dumps(value).encode()))
        elif what == "delete":
            replica.take(gone(how, 10 * number))
        elif what == "restart":
            kept = replica.payload
            if how:
                replica.restart()
            else:
                replica.start()
                replica.take(*kept)
        else:
            client = clients[how]
            client.hear(replica.say(client))
            assert client.flags == replica.results(client)
        for client in clients:
            seen[client] |= replicas[0].results(client).keys() | replicas[1].results(client).keys()
            assert {*client.named} <= seen[client]


def test_answers_spare_what_the_last_full_one_had():
    """Of the same kind of client; if there was none, everything is made once to know its size."""
    journal = Replica().programs.client_journal
    made: list[int] = []

    def everything() -> int:
        made.append(1)
        return 1000

    def count(kind: str, size: int, *, with_reasons: bool = False) -> None:
        about = {"with_reasons": with_reasons, "everything": everything}
        journal.counter(SDKKind.MOBILE, kind, "why", size, **about).add()

    count("delta", 100)
    assert (journal.answers.saved.value, len(made)) == (900, 1)
    count("full", 500)
    count("none", 50)
    assert (journal.answers.saved.value, len(made)) == (1350, 1)
    count("delta", 600)
    assert journal.answers.saved.value == 1350
    count("none", 0, with_reasons=True)
    assert (journal.answers.saved.value, len(made)) == (2350, 2)
