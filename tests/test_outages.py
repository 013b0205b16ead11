"""An environment with its source and its database through hours of outage, in virtual time.

The code is the program's own; only the network is a schedule.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from relay import clock
from relay.environment import ConnectionState, Environment
from relay.errors import ErrorKind, StoreUnavailable, UpstreamUnavailable
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.item import Kind
from relay.model.payload import EMPTY, ChangeSet
from relay.protocol.fdv1 import AllFormat
from relay.sources.streaming import StreamingSource
from relay.stores import Stored, StoreState, Version
from relay.stores.mirror import DatabaseMirror
from relay.streams.hub import Hub
from tests.support import virtual
from tests.support.data import all_data, flag, put

HOUR = 3600.0
LOG = logging.getLogger("relay.env.outage")


class Network:
    """Upstream and a database, each of which is away for some time.

    Args:
        upstream_away: times at which upstream is lost and is back.
        database_away: the same for the database.
    """

    server, prefix = "memory", "p"
    content_type = "text/event-stream"

    def __init__(
        self, upstream_away: tuple[float, float], database_away: tuple[float, float]
    ) -> None:
        self._upstream_away, self._database_away = upstream_away, database_away
        self.attempts: list[float] = []
        self.stored = EMPTY
        self.fingerprint = None
        self.content = self

    # Upstream

    @asynccontextmanager
    async def get(self, *_, **__):
        """Send a version per outage, and the stream's heartbeats until upstream is lost."""
        self.attempts.append(clock.monotonic())
        lost, back = self._upstream_away
        if lost <= clock.monotonic() < back:
            raise UpstreamUnavailable(ErrorKind.NETWORK_ERROR, "away")
        yield self

    async def iter_any(self):
        lost, _ = self._upstream_away
        before = clock.monotonic() < lost
        yield put(all_data(flag("lamp", 1 if before else 2)))
        while not lost <= clock.monotonic() or not before:
            yield b":\n"
            await asyncio.sleep(1)

    def close(self):
        pass

    # The database

    def _check(self):
        lost, back = self._database_away
        if lost <= clock.monotonic() < back:
            raise StoreUnavailable("away")

    async def load(self):
        self._check()
        return Stored(self.stored) if self.stored else None

    async def versions(self):
        self._check()
        return {(i.kind, i.key): Version(i.version, live=True) for i in self.stored} or None

    async def init(self, payload):
        self._check()
        self.stored = payload

    async def upsert(self, items):
        self._check()
        self.stored, _ = self.stored.apply(ChangeSet(tuple(items)))
        return True

    def problem_with(self, item):
        pass

    async def mark(self, fingerprint):
        self._check()
        self.fingerprint = fingerprint

    async def holds(self, fingerprint):
        self._check()
        return self.fingerprint == fingerprint

    async def aclose(self):
        pass


def version_of(payload) -> int:
    return payload.get(Kind.FLAG, "lamp").version


@pytest.mark.parametrize(
    ("upstream_away", "database_away", "noticed"),
    [
        ((HOUR, 9 * HOUR), (2 * HOUR, 10 * HOUR), 1),
        ((2 * HOUR, 9 * HOUR), (HOUR, 10 * HOUR), 1),
        ((HOUR, 10 * HOUR), (2 * HOUR, 9 * HOUR), 0),  # without upstream there is nothing to write
    ],
)
def test_data_are_served_through_hours_of_outage_and_everything_recovers(
    caplog, upstream_away, database_away, noticed
):
    """Upstream is found within 30 s, and then the database within 5 s; each tells it once."""
    caplog.set_level(logging.INFO)
    network = Network(upstream_away, database_away)
    recovered = max(upstream_away[1] + 30, database_away[1] + 5)

    async def live_through() -> None:
        source = StreamingSource(network, "http://upstream", SDKKey("sdk-1"), LOG)
        mirror = DatabaseMirror(network, "redis", source.resync, LOG)
        hub = Hub({"all": AllFormat()})
        spec = EnvironmentSpec("outage", SDKKey("sdk-1"))
        environment = Environment(spec, source, hub, LOG, (mirror,))
        running = asyncio.create_task(environment.run())

        async def at(time: float) -> tuple[object, ...]:
            await asyncio.sleep(time - clock.monotonic())
            return (
                environment.connection.state,
                mirror.status.state,
                version_of(environment.payload),
                version_of(network.stored),
            )

        first_lost, last_lost = sorted((upstream_away[0], database_away[0]))
        assert await at(first_lost - 10) == (ConnectionState.VALID, StoreState.VALID, 1, 1)
        state, _, served, stored = await at(last_lost + HOUR)
        assert (state, served, stored) == (ConnectionState.INTERRUPTED, 1, 1)
        assert environment.connection.data_age == pytest.approx(
            last_lost + HOUR - upstream_away[0], abs=11
        )
        assert await at(recovered) == (ConnectionState.VALID, StoreState.VALID, 2, 2)
        assert environment.connection.since - virtual.START >= upstream_away[1]
        assert environment.connection.data_age <= 11
        running.cancel()
        await asyncio.wait([running])

    virtual.run(live_through())
    during = [at for at in network.attempts if upstream_away[0] <= at < upstream_away[1]]
    assert all(gap <= 30 for gap in [b - a for a, b in pairwise(network.attempts[1:])])
    assert len(during) <= (upstream_away[1] - upstream_away[0]) / 15 + 20
    lines = [record.getMessage() for record in caplog.records]
    assert sum("Error in stream connection" in line for line in lines) == 1
    assert sum("Upstream is connected" in line for line in lines) == 2
    assert sum("is unavailable" in line for line in lines) == noticed
    assert sum("is available again" in line for line in lines) == noticed


def test_two_runs_with_the_same_outage_are_the_same():
    """Chance repeats itself in virtual time, so a failure can be looked into."""

    def attempts() -> list[float]:
        network = Network((60.0, HOUR), (0.0, 0.0))

        async def follow() -> None:
            source = StreamingSource(network, "http://upstream", SDKKey("sdk-1"), LOG)
            async with asyncio.timeout(2 * HOUR):
                async for _ in source.updates():
                    pass

        with pytest.raises(TimeoutError):
            virtual.run(follow())
        return network.attempts

    first = attempts()
    assert len(first) > 100
    assert attempts() == first
