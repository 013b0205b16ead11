"""Clients that come back to a restarted relay get what they miss (fdv2 13.8.6)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.data import all_data, flag
from tests.support.deltas import first_transfer, poll, served, written
from tests.support.process import RelayProcess
from tests.support.serving import SDK_KEY
from tests.support.upstream import ScriptedUpstream

OTHERS = [flag(f"other{n}") for n in range(20)]
"""Beside them, any change is small."""


@pytest.fixture(name="server")
async def scripted_upstream():
    async with ScriptedUpstream() as server:
        server.serve(SDK_KEY, all_data(flag("lamp", 1), *OTHERS))
        yield server


def relay_of(server: ScriptedUpstream, folder: Path, **variables: str) -> RelayProcess:
    given = {"STREAM_URI": server.url, "BASE_URI": server.url, "SNAPSHOT_DIR": str(folder / "s")}
    return RelayProcess(folder, LD_ENV_main=SDK_KEY, **{**given, **variables})


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_clients_of_before_a_restart_get_what_they_miss(server, tmp_path, end):
    """While LaunchDarkly is away, too; and what has changed meanwhile once it is back."""
    relay = relay_of(server, tmp_path)
    async with relay:
        first = await served(relay, "lamp 1")
        await server.patch(SDK_KEY, flag("lamp", 2))
        second = await served(relay, "lamp 2")
        if end == "kill":
            await written(tmp_path / "s", second)
            await relay.kill()
        else:
            await relay.stop()
        await server.stop()
        await relay.start()
        assert await served(relay, "lamp 2") == second
        for ask_for in (poll, first_transfer):
            assert (await ask_for(relay, second))[:2] == ("none", [])
            assert (await ask_for(relay, first))[:2] == ("xfer-changes", ["lamp 2"])
            assert (await ask_for(relay, "(p:x:1)"))[0] == "xfer-full"
        server.serve(SDK_KEY, all_data(flag("lamp", 2), flag("new", 1), *OTHERS))
        await server.start()
        third = await served(relay, "new 1")
        assert await poll(relay, second) == ("xfer-changes", ["new 1"], third)
        code, items, _ = await poll(relay, first)
        assert (code, sorted(items)) == ("xfer-changes", ["lamp 2", "new 1"])


async def test_a_relay_without_a_snapshot_names_the_same_data_alike(server, tmp_path):
    """Its clients are up to date, if nothing has changed; else they get everything."""
    relay = relay_of(server, tmp_path, SNAPSHOT_DIR="")
    async with relay:
        first = await served(relay, "lamp 1")
        await relay.kill()
        await relay.start()
        assert await served(relay, "lamp 1") == first
        assert (await poll(relay, first))[0] == "none"
        await relay.kill()
        server.serve(SDK_KEY, all_data(flag("lamp", 2), *OTHERS))
        await relay.start()
        await served(relay, "lamp 2")
        assert (await poll(relay, first))[0] == "xfer-full"
