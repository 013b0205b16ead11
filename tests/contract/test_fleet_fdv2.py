"""Fleets whose upstream speaks FDv2: whoever leads continues from the names that the feed tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from relay.protocol.feed import FEED, entry_of
from tests.support import upstream as answers
from tests.support.data import all_data, flag
from tests.support.deltas import first_transfer, poll, served
from tests.support.fdv2_upstream import STREAMS, FDv2Upstream
from tests.support.fleet import WITHIN, Fleet, eventually, fleet_of
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.serving import SDK_KEY

OTHERS = [flag(f"other{n}", note="x" * 500) for n in range(40)]
"""Beside them, any change is small."""

FALLBACK = {"X-LD-FD-Fallback": "true", "X-LD-FD-Fallback-TTL": "3600"}


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[FDv2Upstream]:
    """LaunchDarkly, with some flags."""
    async with FDv2Upstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag("lamp", 1), *OTHERS))
        yield upstream


class FDv2Fleet(Fleet):
    """Relays of one fleet that follow upstream by FDv2."""

    streams = STREAMS + SDK_KEY

    async def change(self) -> int:
        self._version += 1
        await self._upstream.put(SDK_KEY, all_data(flag("lamp", self._version), *OTHERS))
        return self._version

    async def upstream(self, relay: RelayProcess) -> dict[str, str]:
        """Return the section of `/status` about upstream."""
        found: dict[str, Any] = await self.get(relay, "/status")
        return dict(found["environments"]["main"]["upstream"])

    async def named(self, state: str) -> None:
        """Wait until all have data with a name of upstream."""
        async with asyncio.timeout(WITHIN):
            for relay in self.relays:
                while (await self.upstream(relay)).get("selector") != state:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)


def fleet(
    count: int, upstream: FDv2Upstream, folder: Path, redis: RedisServer
) -> AbstractAsyncContextManager[FDv2Fleet]:
    return fleet_of(count, upstream, folder, redis.url, FDv2Fleet, DATA_SYSTEM="fdv2")


def requested(upstream: FDv2Upstream) -> list[str]:
    return [each.path.replace("%28", "(").replace("%29", ")") for each in upstream.requests]


def forget_requests(upstream: FDv2Upstream) -> None:
    upstream.requests.clear()
    upstream.transfers.clear()


async def test_all_members_give_upstreams_names(upstream, tmp_path, redis):
    """So clients may move between them; `/status` says by which way each gets its data."""
    async with fleet(3, upstream, tmp_path, redis) as relays:
        leader = await relays.settled()
        first = upstream.state(SDK_KEY)
        await relays.named(first)
        await relays.everywhere(await relays.change(), WITHIN)
        await relays.named(upstream.state(SDK_KEY))
        for relay in relays.relays:
            protocol = "fdv2" if relay is leader else "feed"
            found = await relays.upstream(relay)
            assert found == {"protocol": protocol, "selector": upstream.state(SDK_KEY)}
            assert await poll(relay, first) == ("xfer-changes", ["lamp 2"], upstream.state(SDK_KEY))
            assert await first_transfer(relay, first) == ("xfer-changes", ["lamp 2"])
        assert requested(upstream) == ["/sdk/poll", f"/sdk/stream?basis={first}"]


@pytest.mark.timing
async def test_a_change_of_leader_costs_upstream_what_has_changed(upstream, tmp_path, redis):
    """Kill -9 of whoever leads, twice: the next leader asks with the name in the feed."""
    async with fleet(3, upstream, tmp_path, redis) as relays:
        bases = []
        for _ in range(2):
            leader = await relays.settled()
            await relays.everywhere(await relays.change(), WITHIN)
            before = upstream.state(SDK_KEY)
            await relays.named(before)
            forget_requests(upstream)
            await leader.kill()
            relays.relays.remove(leader)
            version = await relays.change()
            await relays.everywhere(version, WITHIN)
            await relays.settled()
            assert requested(upstream) == [f"/sdk/stream?basis={before}"]
            [(code, size)] = upstream.transfers
            assert (code, size < 1000) == ("xfer-changes", True)
            bases.append(before)
            for relay in relays.relays:
                for basis in bases:
                    state = upstream.state(SDK_KEY)
                    assert await poll(relay, basis) == ("xfer-changes", [f"lamp {version}"], state)


async def test_a_handover_costs_upstream_nothing(upstream, tmp_path, redis):
    """A leader that ends in an orderly way, while nothing changes."""
    async with fleet(2, upstream, tmp_path, redis) as relays:
        leader = await relays.settled()
        await relays.named(upstream.state(SDK_KEY))
        forget_requests(upstream)
        await leader.stop()
        relays.relays.remove(leader)
        await relays.settled()
        await eventually(lambda: [code for code, _ in upstream.transfers] == ["none"])
        assert requested(upstream) == [f"/sdk/stream?basis={upstream.state(SDK_KEY)}"]


async def test_a_fleet_that_starts_again_continues(upstream, tmp_path, redis):
    """None of its relays is left; Redis is, with the data and their name."""
    async with fleet(2, upstream, tmp_path, redis) as relays:
        await relays.settled()
        before = upstream.state(SDK_KEY)
        await relays.named(before)
        for relay in relays.relays:
            await relay.kill()
        upstream.serve(SDK_KEY, all_data(flag("lamp", 2), *OTHERS))
        forget_requests(upstream)
        for relay in relays.relays:
            await relay.start()
        await relays.everywhere(2, WITHIN + 3)  # a lease of the dead expires first
        await relays.settled()
        assert [code for code, _ in upstream.transfers] == ["xfer-changes"]
        await relays.named(upstream.state(SDK_KEY))


@pytest.mark.timing
async def test_members_alone_continue_as_well(upstream, tmp_path, redis):
    """Without Redis each listens to upstream, from where the fleet was; then one does again."""
    async with fleet(2, upstream, tmp_path, redis) as relays:
        await relays.settled()
        before = upstream.state(SDK_KEY)
        await relays.named(before)
        forget_requests(upstream)
        redis.pause()
        await eventually(lambda: upstream.open_streams(relays.streams) == 2)
        await relays.everywhere(await relays.change(), WITHIN)
        for relay in relays.relays:
            assert (await relays.upstream(relay))["protocol"] == "fdv2"
        redis.go_on()
        await relays.settled()
        await relays.everywhere(await relays.change(), WITHIN)
        await relays.named(upstream.state(SDK_KEY))
        assert {code for code, _ in upstream.transfers} <= {"none", "xfer-changes"}


async def test_a_feed_without_names_is_understood(upstream, tmp_path, redis):
    """Relays of older releases tell none, and leave a name that others have written as it is."""
    async with fleet(2, upstream, tmp_path, redis) as relays:
        await relays.settled()
        first = upstream.state(SDK_KEY)
        await relays.named(first)
        old = redis.hash("launchdarkly:$relay")["name"]
        await relays.everywhere(await relays.change(), WITHIN)
        await relays.named(upstream.state(SDK_KEY))
        for relay in relays.relays:
            await relay.kill()
        redis.do("HSET", "launchdarkly:$relay", "name", old)
        forget_requests(upstream)
        for relay in relays.relays:
            await relay.start()
        await relays.everywhere(2, WITHIN + 3)
        leader = await relays.settled()
        assert requested(upstream)[0] == "/sdk/poll"  # the old name is not that of these data
        await relays.named(upstream.state(SDK_KEY))
        assert await served(leader, "lamp 2") == upstream.state(SDK_KEY)
        [*_, last] = [entry_of(pairs) for _, pairs in redis.client().xrange(FEED)]
        assert last.name is not None
        assert last.name.state == upstream.state(SDK_KEY)


async def test_each_leader_falls_back_by_itself(upstream, tmp_path, redis):
    """Upstream leads one back to FDv1; who leads after it asks by FDv2, where the data are."""
    async with fleet(2, upstream, tmp_path, redis) as relays:
        leader = await relays.settled()
        first = upstream.state(SDK_KEY)
        await relays.named(first)
        upstream.script_path("/sdk/stream", answers.status(503, **FALLBACK))
        upstream.close_streams(relays.streams)
        await upstream.connected(SDK_KEY)
        assert (await relays.upstream(leader))["protocol"] == "fdv1"
        await relays.everywhere(await relays.change(), WITHIN)
        for relay in relays.relays:
            assert "selector" not in await relays.upstream(relay)
            assert (await poll(relay, first))[:2] == ("xfer-changes", ["lamp 2"])
        await leader.stop()
        relays.relays.remove(leader)
        other = await relays.settled()
        assert (await relays.upstream(other))["protocol"] == "fdv2"
        await relays.named(upstream.state(SDK_KEY))
        await relays.everywhere(await relays.change(), WITHIN)
        assert (await poll(other, first))[:2] == ("xfer-changes", ["lamp 3"])


async def test_filtered_variants_lead_their_own_lives(upstream, tmp_path, redis):
    """Each has its place in the feed, and its names."""
    north = answers.filtered(SDK_KEY, "north")
    upstream.serve(north, all_data(flag("lamp", 1), flag("north", 1), *OTHERS))
    filters = {"LD_PROJ_KEY_main": "p", "LD_FILTER_KEYS_p": "north", "DATA_SYSTEM": "fdv2"}
    async with fleet_of(2, upstream, tmp_path, redis.url, FDv2Fleet, **filters) as relays:
        await relays.settled()
        await relays.named(upstream.state(SDK_KEY))
        await upstream.connected(STREAMS + north)
        await upstream.put(north, all_data(flag("lamp", 1), flag("north", 2), *OTHERS))
        for relay in relays.relays:
            async with asyncio.timeout(WITHIN):
                while (await poll(relay, payload_filter="north"))[2] != upstream.state(north):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        for relay in relays.relays:
            await relay.kill()
        forget_requests(upstream)
        for relay in relays.relays:
            await relay.start()
        await relays.everywhere(1, WITHIN + 3)
        await upstream.connected(STREAMS + north, 2)
        await upstream.connected(STREAMS + SDK_KEY, 2)
        assert {code for code, _ in upstream.transfers} == {"none"}
