"""Transfers of the newer protocol, as streams and polls carry them (fdv2 13.2)."""

from __future__ import annotations

import json

from relay.model.item import Item, Kind
from relay.model.journal import MISSING, Delta, Journal
from relay.model.payload import Change, Payload
from relay.protocol import fdv2, sse

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
