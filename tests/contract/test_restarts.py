"""Clients that come back to a restarted relay get what they miss (fdv2 13.8.6)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from urllib.parse import quote

import pytest

from relay.protocol import sse
from tests.support.data import all_data, flag
from tests.support.process import PATIENCE, RelayProcess
from tests.support.serving import SDK_KEY, Stream, ask, until
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


def told(events: list[tuple[str, dict]]) -> tuple[str, list[str]]:
    """Return the intent of a transfer, and the items in it."""
    intent, *rest = [data for _, data in events]
    names = [f"{data['key']} {data['version']}" for data in rest if "key" in data]
    return intent["payloads"][0]["intentCode"], names


async def poll(relay: RelayProcess, basis: str = "") -> tuple[str, list[str], str]:
    """Return intent, items and state of a poll; the state is empty if it stays."""
    path = f"/sdk/poll?basis={quote(basis)}" if basis else "/sdk/poll"
    reply = await ask(relay.address, path, [("Authorization", SDK_KEY)])
    if reply.status != 200:
        return f"status {reply.status}", [], ""
    events = [(each["event"], each["data"]) for each in json.loads(reply.body)["events"]]
    return *told(events), events[-1][1].get("state", "")


async def stream(relay: RelayProcess, basis: str) -> tuple[str, list[str]]:
    """Return intent and items of the first transfer of a stream."""
    opened = await Stream.open(relay.address, f"/sdk/stream?basis={quote(basis)}")
    try:
        events = sse.Decoder().feed(await opened.chunk())
        return told([(each.name, json.loads(each.data)) for each in events])
    finally:
        opened.close()


async def served(relay: RelayProcess, *items: str) -> str:
    """Wait until a relay serves items, among others; return the state."""
    async with asyncio.timeout(PATIENCE):
        while True:
            _, names, state = await poll(relay)
            if set(items) <= set(names):
                return state
            await asyncio.sleep(0.01)


async def written(folder: Path, state: str) -> None:
    """Wait until the snapshot holds a state."""
    await until(
        lambda: any(state.encode() in file.read_bytes() for file in folder.glob("s/*.snapshot"))
    )


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_clients_of_before_a_restart_get_what_they_miss(server, tmp_path, end):
    """While LaunchDarkly is away, too; and what has changed meanwhile once it is back."""
    relay = relay_of(server, tmp_path)
    async with relay:
        first = await served(relay, "lamp 1")
        await server.patch(SDK_KEY, flag("lamp", 2))
        second = await served(relay, "lamp 2")
        if end == "kill":
            await written(tmp_path, second)
            await relay.kill()
        else:
            await relay.stop()
        await server.stop()
        await relay.start()
        assert await served(relay, "lamp 2") == second
        for ask_for in (poll, stream):
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
