"""The lease of big segments that a fleet's leader has."""

from __future__ import annotations

import asyncio
import logging

import pytest

from relay.bigsegments import lease as module
from relay.bigsegments.lease import LeaderLease, StoreLease
from relay.fleet.lease import Leadership
from relay.protocol.feed import Term
from tests.support.serving import until

LOG = logging.getLogger("relay.env.test")


class Source:
    """An environment's part in a fleet, which tells its role."""

    def __init__(self) -> None:
        self.leads = asyncio.Event()
        self.leader: str | None = None
        self.leadership: Leadership | None = None
        self.is_denied = False

    def lead(self) -> Leadership:
        self.leader, self.leadership = "this", Leadership(Term(1, "this"), 1e9)
        self.leads.set()
        return self.leadership


class Store:
    """A database that grants its lease."""

    lease_lifetime = 1.0

    def __init__(self) -> None:
        self.owner: str | None = None

    async def claim(self, owner: str) -> bool:
        self.owner = owner
        return True

    async def release(self, owner: str) -> None:
        self.owner = None


class Case:
    """A lease, and how often its owner was told to look at the cursor."""

    def __init__(self) -> None:
        self.source, self.store, self.looks = Source(), Store(), 0
        in_store = StoreLease(self.store, self._look, LOG)
        self.lease = LeaderLease(self.source, in_store, self._look, LOG)

    def _look(self) -> None:
        self.looks += 1


@pytest.fixture(autouse=True)
def frequent_looks(monkeypatch):
    monkeypatch.setattr(module, "FOLLOWER_LOOK", 0.01)


async def test_a_follower_looks_until_it_leads():
    """It asks the database for no lease, and knows that another relay was at work."""
    case = Case()
    case.source.leader = "other"
    acquiring = asyncio.create_task(case.lease.acquire())
    await until(lambda: case.looks > 2, 5)
    assert not case.lease.is_held
    case.source.lead()
    assert await acquiring
    assert case.lease.is_held
    assert case.store.owner is None


async def test_a_first_leader_has_not_waited_for_another():
    """Nobody synchronised before, so nothing has changed behind its back."""
    case = Case()
    case.source.lead()
    assert not await case.lease.acquire()


async def test_the_work_ends_with_the_leadership():
    """It is cancelled, and the lease is held no more."""
    case = Case()
    leadership = case.source.lead()
    await case.lease.acquire()
    working = asyncio.create_task(case.lease.use(asyncio.Event().wait()))
    await asyncio.sleep(0)
    case.source.leads.clear()
    leadership.end()
    await asyncio.wait_for(working, 5)
    assert not case.lease.is_held


async def test_a_failure_of_the_work_is_raised():
    """The synchroniser waits, and tries again."""

    async def fail() -> None:
        raise KeyError

    case = Case()
    case.source.lead()
    await case.lease.acquire()
    with pytest.raises(KeyError):
        await case.lease.use(fail())
    assert not case.lease.is_held
    assert not await case.lease.acquire()


async def test_without_a_fleet_the_lease_of_the_database_counts():
    """A relay that lacks the rights for the fleet may synchronise, too, one at a time."""
    case = Case()
    case.source.is_denied = True
    case.source.leads.set()
    assert not await case.lease.acquire()
    assert case.store.owner is not None
    assert case.lease.is_held
    await case.lease.use(asyncio.sleep(0))
    assert case.store.owner is None
