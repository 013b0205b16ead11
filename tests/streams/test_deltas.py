"""Streams of clients that name the state of their data: who gets which opening."""

from __future__ import annotations

import asyncio

from relay.model.item import Item, Kind
from relay.model.journal import Journal
from relay.model.payload import EMPTY, ChangeSet, Payload, Selector
from relay.streams.deltas import MAX_OPENINGS, STREAM, DeltaChannel
from relay.streams.hub import Hub
from tests.support.deltas import transfer


def flag(key: str, version: int) -> Item:
    json = b'{"key":"%b","version":%d,"salt":"s","text":"%b"}' % (key.encode(), version, b"x" * 500)
    return Item(Kind.FLAG, key, version, json)


class Sent:
    """Transport that keeps what is written."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def set_protocol(self, protocol: asyncio.BaseProtocol, /) -> None:
        pass

    def write(self, data: bytes, /) -> None:
        self.parts.append(data)

    def writelines(self, parts) -> None:
        self.parts += parts


class Environment:
    """Data with a journal, and the streams of its clients."""

    def __init__(self) -> None:
        self.journal = Journal("main")
        self.payload: Payload = EMPTY
        self.hub = Hub({}, channels={STREAM: DeltaChannel(self.journal)})

    def take(self, *items: Item, full: bool = False, selector: Selector | None = None) -> None:
        changes = ChangeSet(items, full, selector=selector)
        self.payload, change = self.payload.apply(changes)
        if change is None:
            self.journal.rename(selector, full=full)
            return
        self.journal.record(self.payload, change, full=full, selector=selector)
        self.hub.publish(self.payload, change)

    def opening(self, basis: str) -> bytes:
        """The first message to a client that names a state."""
        transport = Sent()
        self.hub.subscribe(STREAM, transport, client=basis)
        (part,) = transport.parts
        return part


async def test_clients_of_one_state_share_their_opening():
    """Many come back with the same state: the bytes are made once, until the next change."""
    environment = Environment()
    environment.take(*(flag(key, 1) for key in "abcde"), full=True)
    before = environment.journal.state
    environment.take(flag("a", 2))
    first, second = environment.opening(before), environment.opening(before)
    assert first is second
    assert transfer(first.partition(b"\r\n")[2]) == ("xfer-changes", ["a 2"])
    environment.take(flag("b", 2))
    third = environment.opening(before)
    assert transfer(third.partition(b"\r\n")[2]) == ("xfer-changes", ["b 2", "a 2"])


async def test_openings_have_the_newest_name_of_the_data():
    """Upstream may give the same data another name; clients have to come back with that."""
    environment = Environment()
    items = flag("a", 1), flag("b", 1)
    environment.take(*items, full=True, selector=Selector("(p:x:1)", "x", 1))
    for basis in ("", "unknown"):
        assert b"(p:x:1)" in environment.opening(basis)
    environment.take(*items, full=True, selector=Selector("(p:x:2)", "x", 2))
    for basis in ("", "unknown"):
        assert b"(p:x:2)" in environment.opening(basis)
    for basis in ("(p:x:1)", "(p:x:2)"):
        opening = environment.opening(basis)
        assert b'"target":2' in opening
        assert transfer(opening.partition(b"\r\n")[2]) == ("none", [])


async def test_made_up_states_share_one_message():
    """A hostile client may name another state each time: nothing is encoded for it."""
    environment = Environment()
    environment.take(flag("a", 1), full=True)
    everything = environment.opening("unknown")
    for number in range(3 * MAX_OPENINGS):
        assert environment.opening(f"made-up-{number}") is everything
