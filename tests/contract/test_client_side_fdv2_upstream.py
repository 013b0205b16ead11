"""Client-side SDKs of a relay that follows upstream by FDv2: they get what they miss, too."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.contract.test_client_side_deltas import OPEN, Transfer, of_poll, of_stream, opened, poll
from tests.support import data
from tests.support.deltas import written
from tests.support.fdv2_upstream import STREAMS, FDv2Upstream
from tests.support.fleet import fleet_of
from tests.support.process import PATIENCE, RelayProcess
from tests.support.serving import SDK_KEY


def flag(key: str, version: int = 1, value: object = "on", **members: object) -> dict:
    return data.flag(key, version, value, **(OPEN | members))


OTHERS = [flag(f"other{n}", value="x" * 200) for n in range(20)]
"""Beside them, any change is small."""

CLIENTS = {"LD_CLIENT_SIDE_ID_main": "env-1", "EVAL_STREAMS": "true", "DATA_SYSTEM": "fdv2"}


@pytest.fixture(name="server")
async def scripted_upstream():
    async with FDv2Upstream() as server:
        server.serve(SDK_KEY, data.all_data(flag("lamp", 1, "one"), *OTHERS))
        yield server


def relay_of(server: FDv2Upstream, folder: Path, **variables: str) -> RelayProcess:
    given = {
        "STREAM_URI": server.url,
        "BASE_URI": server.url,
        "SNAPSHOT_DIR": str(folder / "snapshots"),
        "LD_ENV_main": SDK_KEY,
        **CLIENTS,
    }
    return RelayProcess(folder, **{**given, **variables})


async def shown(relay: RelayProcess, value: str) -> Transfer:
    """Wait until a client without data gets a value of the lamp; return the transfer."""
    async with asyncio.timeout(PATIENCE):
        while True:
            reply = await poll(relay.address)
            if reply.status == 200 and (found := of_poll(reply)).values.get("lamp") == value:
                assert found.code == "xfer-full"
                assert len(found.put) == 21
                return found
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_change_of_upstream_reaches_clients_as_a_change(server, tmp_path, workers):
    """On streams, and on polls of whoever names the data before it."""
    async with relay_of(server, tmp_path, WORKERS=workers) as relay:
        before = await shown(relay, "one")
        assert before.state
        await server.connected(STREAMS + SDK_KEY)
        stream = await opened(relay.address, before.state)
        assert of_stream(await stream.chunk()).code == "none"
        await server.put(SDK_KEY, data.all_data(flag("lamp", 2, "two"), *OTHERS))
        change = of_stream(await stream.chunk())
        assert (change.code, change.values) == ("xfer-changes", {"lamp": "two"})
        missed = of_poll(await poll(relay.address, before.state))
        assert (missed.code, missed.values, missed.state) == (
            "xfer-changes",
            {"lamp": "two"},
            change.state,
        )
        assert of_poll(await poll(relay.address, change.state)).code == "none"

        await server.put(SDK_KEY, data.all_data(*OTHERS))
        gone = of_stream(await stream.chunk())
        assert (gone.code, gone.gone, gone.put) == ("xfer-changes", {"lamp"}, {})
        stream.close()


@pytest.mark.parametrize("forgets", [False, True], ids=["changes", "everything"])
async def test_clients_of_before_a_restart_get_what_changed(server, tmp_path, forgets):
    """They do both when upstream still knows the relay's basis and when it sends everything."""
    relay = relay_of(server, tmp_path)
    async with relay:
        before = await shown(relay, "one")
        assert before.state
        await written(tmp_path / "snapshots", server.state(SDK_KEY))
        await relay.kill()
        server.serve(SDK_KEY, data.all_data(flag("lamp", 2, "two"), *OTHERS))
        server.forgets = forgets
        server.transfers.clear()
        await relay.start()
        after = await shown(relay, "two")
        missed = of_poll(await poll(relay.address, before.state))
        assert (missed.code, missed.values) == ("xfer-changes", {"lamp": "two"})
        assert missed.state == after.state
        stream = await opened(relay.address, before.state)
        assert of_stream(await stream.chunk()).values == {"lamp": "two"}
        stream.close()
        assert server.transfers[0][0] == ("xfer-full" if forgets else "xfer-changes")


async def test_clients_may_move_between_members_of_a_fleet(server, tmp_path, redis):
    """All members have upstream's names, so each knows what the client of another one misses."""
    async with fleet_of(2, server, tmp_path, redis.url, **CLIENTS) as fleet:
        first, second = fleet.relays
        before = await shown(first, "one")
        assert before.state
        assert (await shown(second, "one")).state == before.state
        await server.connected(STREAMS + SDK_KEY)
        await server.put(SDK_KEY, data.all_data(flag("lamp", 2, "two"), *OTHERS))
        states = {(await shown(relay, "two")).state for relay in fleet.relays}
        assert len(states) == 1
        for relay in fleet.relays:
            missed = of_poll(await poll(relay.address, before.state))
            assert (missed.code, missed.values) == ("xfer-changes", {"lamp": "two"})
            assert {missed.state} == states
