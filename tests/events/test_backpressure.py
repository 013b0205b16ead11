"""The gate of acknowledgements: a table of fillings and outages, and what opens it."""

from __future__ import annotations

import asyncio
import time

import pytest

from relay.events.backpressure import AckGate
from relay.events.memory import MemoryStore
from relay.events.reports import EventReports
from relay.events.store import PAYLOAD_OVERHEAD, Limits
from relay.model.event import EventPayload, EventsEndpoint, Partition

PARTITION = Partition("prod", EventsEndpoint.BULK, 4)
OTHER = Partition("test", EventsEndpoint.BULK, 4)
SIZE = 1000


def payload(partition=PARTITION):
    return EventPayload(partition, "", b"x" * (SIZE - PAYLOAD_OVERHEAD), time.time())


@pytest.fixture
def memory():
    """Memory for ten payloads."""
    return MemoryStore(Limits(memory=10 * SIZE))


@pytest.fixture
def reports():
    return EventReports(lambda _: None)


@pytest.fixture
async def gate(memory, reports):
    return AckGate(memory, reports)


def accept(memory, gate, partition=PARTITION):
    memory.append(payload(partition))
    return gate.acknowledge(payload(partition), new=True)


@pytest.mark.parametrize(
    ("others", "own", "failing", "delayed"),
    [
        (0, 5, [], False),
        (0, 6, [], True),
        (5, 1, [], True),
        (0, 6, [PARTITION], False),  # nobody waits for an outage
        (6, 1, [OTHER], False),  # nor for that of another environment
        (4, 6, [OTHER], True),
        (6, 6, [PARTITION, OTHER], False),
    ],
)
async def test_acknowledgements_are_delayed_over_half_of_the_memory(
    memory, gate, reports, *, others, own, failing, delayed
):
    """Without the payloads of environments with an outage, which nothing will free soon."""
    for partition in failing:
        reports.begin_outage(partition, "HTTP error 503")
    for _ in range(others):
        memory.append(payload(OTHER))
    for _ in range(own - 1):
        memory.append(payload())
    assert accept(memory, gate).done() is not delayed
    assert gate.delaying.is_set() is delayed
    assert len(gate) == delayed
    gate.release(everything=True)


async def test_delivered_payloads_release_acknowledgements_in_order(memory, gate):
    """As many as there is space for; the last one ends the hurry."""
    for _ in range(5):
        assert accept(memory, gate).done()
    delayed = [accept(memory, gate) for _ in range(3)]
    gate.release()
    assert not any(ack.done() for ack in delayed)
    while (taken := memory.take(PARTITION)) is not None:
        memory.finish(taken[0])
    gate.release()
    assert [ack.result() for ack in delayed] == [True] * 3
    assert not gate.delaying.is_set()


async def test_an_acknowledgement_waits_for_a_bounded_time(memory, gate, monkeypatch):
    """Even if nothing is delivered."""
    monkeypatch.setattr("relay.events.backpressure.MAX_ACK_DELAY", 0.01)
    acks = [accept(memory, gate) for _ in range(8)]
    assert [ack.done() for ack in acks] == [True] * 5 + [False] * 3
    assert await asyncio.gather(*acks) == [True] * 8
    assert len(gate) == 0


async def test_an_open_gate_delays_nothing(memory, gate):
    """As the relay shuts down; a client that is gone is no obstacle."""
    delayed = [accept(memory, gate) for _ in range(8)][5:]
    delayed[0].cancel()
    gate.open()
    assert all(ack.done() for ack in delayed)
    assert accept(memory, gate).done()
    assert gate.delaying.is_set()


async def test_a_gate_without_a_memory_does_nothing(reports):
    """A disk has space enough."""
    gate = AckGate(None, reports)
    assert gate.acknowledge(payload(), new=False).result() is False
    gate.release(everything=True)
    assert repr(gate) == "<AckGate: 0 acknowledgements delayed>"
