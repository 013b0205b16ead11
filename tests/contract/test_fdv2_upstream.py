"""Relays that follow upstream by FDv2, as people run them: LaunchDarkly, or another relay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from ldclient import Context, LDClient
from ldclient.config import Config
from ldclient.datasystem import default

from tests.support import upstream as answers
from tests.support.data import all_data, flag
from tests.support.deltas import first_transfer, poll, served, transfer, written
from tests.support.fdv2_upstream import PAYLOAD, STREAMS, FDv2Upstream, state
from tests.support.overhearing import Overheard, overhearing
from tests.support.process import RelayProcess
from tests.support.serving import SDK_KEY, Stream, ask, until
from tests.support.upstream import ScriptedUpstream

OTHERS = [flag(f"other{n}") for n in range(20)]
"""Beside them, any change is small."""

AUTHORISED = [("Authorization", SDK_KEY)]


@pytest.fixture(name="server")
async def scripted_upstream():
    async with FDv2Upstream() as server:
        server.serve(SDK_KEY, all_data(flag("lamp", 1), *OTHERS))
        yield server


def relay_of(url: str, folder: Path, **variables: str) -> RelayProcess:
    given = {
        "STREAM_URI": url,
        "BASE_URI": url,
        "DATA_SYSTEM": "fdv2",
        "SNAPSHOT_DIR": str(folder / "snapshots"),
        "LD_ENV_main": SDK_KEY,
    }
    return RelayProcess(folder, **{**given, **variables})


async def upstream_of(relay: RelayProcess) -> dict[str, str]:
    """Return the section of `/status` about upstream."""
    status = json.loads((await ask(relay.address, "/status")).body)
    upstream: dict[str, str] = status["environments"]["main"]["upstream"]
    metrics = (await ask(relay.address, "/metrics")).body.decode()
    for protocol in ("fdv1", "fdv2"):
        line = f'relay_upstream_protocol{{environment="main",protocol="{protocol}"}} '
        assert f"{line}{int(protocol == upstream['protocol'])}\n" in metrics
    return upstream


def paths(server: ScriptedUpstream) -> list[str]:
    return [request.path.replace("%28", "(").replace("%29", ")") for request in server.requests]


async def test_upstreams_names_are_ours(server, tmp_path):
    """So clients can move between LaunchDarkly and all relays."""
    async with relay_of(server.url, tmp_path) as relay:
        first = await served(relay, "lamp 1")
        assert first == state(PAYLOAD, 1) == server.state(SDK_KEY)
        assert await upstream_of(relay) == {"protocol": "fdv2", "selector": first}
        await server.connected(STREAMS + SDK_KEY)
        stream = await Stream.open(relay.address, f"/sdk/stream?basis={first}")
        assert transfer(await stream.chunk()) == ("none", [])
        await server.put(SDK_KEY, all_data(flag("lamp", 2), *OTHERS))
        assert transfer(await stream.chunk()) == ("xfer-changes", ["lamp 2"])
        assert await poll(relay, first) == ("xfer-changes", ["lamp 2"], state(PAYLOAD, 2))
        stream.close()


async def test_a_restart_costs_upstream_what_has_changed(server, tmp_path):
    """And clients of before as well, whose names are those of upstream."""
    relay = relay_of(server.url, tmp_path)
    async with relay:
        first = await served(relay, "lamp 1")
        await written(tmp_path / "snapshots", first)
        await relay.kill()
        await relay.start()
        await server.connected(STREAMS + SDK_KEY, 2)
        assert (await poll(relay, first))[0] == "none"
        await relay.kill()
        server.serve(SDK_KEY, all_data(flag("lamp", 2), *OTHERS))
        await relay.start()
        second = await served(relay, "lamp 2")
        assert second == state(PAYLOAD, 2)
        assert await poll(relay, first) == ("xfer-changes", ["lamp 2"], second)
    asked = paths(server)
    assert asked == ["/sdk/poll", *[f"/sdk/stream?basis={first}"] * 3]


async def test_polls_only(server, tmp_path):
    """The stream's address is never asked."""
    variables = {"DATA_SOURCE": "polling", "POLL_INTERVAL": "1s"}
    async with relay_of(server.url, tmp_path, **variables) as relay:
        first = await served(relay, "lamp 1")
        await server.put(SDK_KEY, all_data(flag("lamp", 2), *OTHERS))
        await served(relay, "lamp 2")
        assert (await poll(relay, first))[:2] == ("xfer-changes", ["lamp 2"])
    assert set(paths(server)[1:]) <= {f"/sdk/poll?basis={state(PAYLOAD, n)}" for n in (1, 2)}


async def test_a_relay_falls_back_and_returns(server, tmp_path):
    """Clients get deltas over both switches, and are told nothing of them."""
    fallback = {"X-LD-FD-Fallback": "true", "X-LD-FD-Fallback-TTL": "2"}
    async with relay_of(server.url, tmp_path) as relay:
        first = await served(relay, "lamp 1")
        await server.connected(STREAMS + SDK_KEY)
        server.script_path("/sdk/stream", answers.status(503, **fallback))
        server.close_streams(STREAMS + SDK_KEY)
        await server.connected(SDK_KEY)
        await until(lambda: relay.log.count("it is followed by FDv1 for 2 s") == 1)
        await server.put(SDK_KEY, all_data(flag("lamp", 2), *OTHERS))
        second = await served(relay, "lamp 2")
        assert not second.startswith(f"(p:{PAYLOAD}")
        assert await upstream_of(relay) == {"protocol": "fdv1"}
        assert await poll(relay, first) == ("xfer-changes", ["lamp 2"], second)
        await relay.said("Upstream is followed by FDv2 again")
        reply = await ask(relay.address, f"/sdk/poll?basis={first}", AUTHORISED)
        assert "x-ld-fd-fallback" not in reply.headers
        await server.connected(STREAMS + SDK_KEY, 2)
        await server.put(SDK_KEY, all_data(flag("lamp", 3), *OTHERS))
        third = await served(relay, "lamp 3")
        assert third == state(PAYLOAD, 3)
        for basis in (first, second):
            assert await poll(relay, basis) == ("xfer-changes", ["lamp 3"], third)


async def test_an_older_upstream_is_followed_by_fdv1(tmp_path):
    """The log says so, once."""
    async with ScriptedUpstream() as server:
        server.serve(SDK_KEY, all_data(flag("lamp", 1)))
        async with relay_of(server.url, tmp_path) as relay:
            await served(relay, "lamp 1")
            assert relay.log.count("Upstream does not know FDv2 (HTTP error 404)") == 1


async def test_what_is_created_anew_reaches_all_clients(server, tmp_path):
    """Also in a version that is older than the deletion; FDv1 gets everything then."""
    server.serve(SDK_KEY, all_data(flag("lamp", 7), *OTHERS))
    async with relay_of(server.url, tmp_path) as relay:
        first = await served(relay, "lamp 7")
        old = await Stream.open(relay.address, "/all")
        new = await Stream.open(relay.address, f"/sdk/stream?basis={first}")
        for stream in (old, new):
            await stream.chunk()
        await server.connected(STREAMS + SDK_KEY)
        await server.put(SDK_KEY, all_data(*OTHERS))
        assert b'"version":8' in await old.chunk()
        assert transfer(await new.chunk()) == ("xfer-changes", ["lamp 8"])
        await server.put(SDK_KEY, all_data(flag("lamp", 1), *OTHERS))
        assert (await old.chunk()).startswith(b"event: put")
        code, items = transfer(await new.chunk())
        assert (code, "lamp 1" in items, len(items)) == ("xfer-full", True, 21)
        old.close()
        new.close()


NORTH = answers.filtered(SDK_KEY, "north")
FILTERED = {"LD_PROJ_KEY_main": "p", "LD_FILTER_KEYS_p": "north"}


async def poll_north(relay: RelayProcess, basis: str = "") -> tuple[str, list[str], str]:
    """Intent, items and state of a poll with the filter."""
    return await poll(relay, basis, payload_filter="north")


async def served_north(relay: RelayProcess, *items: str) -> str:
    """Wait until a relay serves just these items with the filter; return the state."""
    async with asyncio.timeout(10):
        while True:
            _, names, name = await poll_north(relay)
            if set(items) == set(names):
                return name
            await asyncio.sleep(0.01)


async def test_filtered_environments_come_by_fdv1_where_upstream_does_not_filter(server, tmp_path):
    """LaunchDarkly sends everything by FDv2, whatever the filter is."""
    server.serve(NORTH, all_data(flag("north", 1)))
    server.filters = False
    async with relay_of(server.url, tmp_path, **FILTERED) as relay:
        await served(relay, "lamp 1")
        await served_north(relay, "north 1")
        await server.connected(NORTH)
        assert relay.log.count("Upstream does not filter by FDv2; it is followed by FDv1") == 1
        status = json.loads((await ask(relay.address, "/status")).body)["environments"]
        assert status["main/north"]["upstream"] == {"protocol": "fdv1"}
        assert status["main"]["upstream"]["protocol"] == "fdv2"


async def test_filtered_environments_have_names_of_their_own(server, tmp_path):
    """Each variant continues by itself after a restart."""
    server.serve(NORTH, all_data(flag("north", 1), *OTHERS))
    others = [f"{other['key']} 1" for other in OTHERS]
    relay = relay_of(server.url, tmp_path, **FILTERED)
    async with relay:
        whole = await served(relay, "lamp 1")
        part = await served_north(relay, "north 1", *others)
        assert (whole, part) == (server.state(SDK_KEY), server.state(NORTH))
        assert whole != part
        await server.connected(STREAMS + NORTH)
        await server.put(NORTH, all_data(flag("north", 2), *OTHERS))
        second = await served_north(relay, "north 2", *others)
        assert await poll_north(relay, part) == ("xfer-changes", ["north 2"], second)
        assert (await poll(relay, whole))[0] == "none"
        assert (await poll_north(relay, whole))[0] == "xfer-full"
        for name in (whole, second):
            await written(tmp_path / "snapshots", name)
        await relay.kill()
        server.serve(NORTH, all_data(flag("north", 3), *OTHERS))
        server.transfers.clear()
        await relay.start()
        third = await served_north(relay, "north 3", *others)
        assert await poll_north(relay, part) == ("xfer-changes", ["north 3"], third)
        await server.connected(STREAMS + SDK_KEY, 2)
    assert sorted(code for code, _ in server.transfers) == ["none", "xfer-changes"]


class Chain:
    """A relay behind a relay, and what the inner one is sent."""

    def __init__(self, outer: RelayProcess, inner: RelayProcess, heard: Overheard) -> None:
        self.outer, self.inner, self.heard = outer, inner, heard

    def hear(self) -> None:
        """Forget what was said so far."""
        self.heard.asked.clear()
        self.heard.answered.clear()

    @property
    def intents(self) -> list[str]:
        """Intents that streams of the outer relay have sent so far; polls are compressed."""
        found = re.findall(rb'"intentCode":"([a-z-]+)"', bytes(self.heard.answered))
        return [each.decode() for each in found]


@contextlib.asynccontextmanager
async def chain(
    url: str, folder: Path, inner: Mapping[str, str] = MappingProxyType({}), **outer: str
) -> AsyncGenerator[Chain, None]:
    folders = [folder / "outer", folder / "inner"]
    for each in folders:
        each.mkdir()
    async with relay_of(url, folders[0], **outer) as first, overhearing(first.address) as heard:
        await served(first, "lamp 1")
        async with relay_of(heard.url, folders[1], **inner) as second:
            await served(second, "lamp 1")
            yield Chain(first, second, heard)


@pytest.mark.parametrize("protocol", ["fdv1", "fdv2"])
async def test_a_relay_behind_a_relay_gets_deltas(server, tmp_path, protocol):
    """Whichever protocol the outer one speaks with LaunchDarkly, and whichever relay restarts."""
    async with chain(server.url, tmp_path, DATA_SYSTEM=protocol) as pair:
        first = await served(pair.inner, "lamp 1")
        assert await served(pair.outer, "lamp 1") == first
        stream = await Stream.open(pair.inner.address, f"/sdk/stream?basis={first}")
        assert transfer(await stream.chunk()) == ("none", [])

        connection = STREAMS + SDK_KEY if protocol == "fdv2" else SDK_KEY
        await server.connected(connection)
        await until(lambda: pair.intents == ["none"])
        if protocol == "fdv1":
            await server.patch(SDK_KEY, flag("lamp", 2))
        await server.put(SDK_KEY, all_data(flag("lamp", 2), *OTHERS))
        assert transfer(await stream.chunk()) == ("xfer-changes", ["lamp 2"])
        stream.close()
        second = await served(pair.inner, "lamp 2")
        assert pair.intents == ["none", "xfer-changes"]

        # The inner relay is away for a change.
        await written(tmp_path / "inner/snapshots", second)
        await pair.inner.kill()
        pair.hear()
        await server.put(SDK_KEY, all_data(flag("lamp", 3), *OTHERS))
        await served(pair.outer, "lamp 3")
        await pair.inner.start()
        third = await served(pair.inner, "lamp 3")
        assert pair.intents == ["xfer-changes"]
        assert b"other1" not in pair.heard.answered
        for basis in (first, second):
            assert await poll(pair.inner, basis) == ("xfer-changes", ["lamp 3"], third)
            assert await first_transfer(pair.inner, basis) == ("xfer-changes", ["lamp 3"])

        # The outer relay restarts, and nothing has changed.
        await written(tmp_path / "outer/snapshots", third)
        await pair.outer.kill()
        pair.hear()
        await pair.outer.start()
        await until(lambda: pair.intents == ["none"], 10)
        assert await poll(pair.inner, second) == ("xfer-changes", ["lamp 3"], third)


async def test_a_filtered_relay_behind_a_relay_gets_deltas(server, tmp_path):
    """LaunchDarkly filters by FDv1 only, but the outer relay by FDv2 as well."""
    server.serve(NORTH, all_data(flag("north", 1), *OTHERS))
    server.filters = False
    others = [f"{other['key']} 1" for other in OTHERS]
    async with chain(server.url, tmp_path, inner=FILTERED, **FILTERED) as pair:
        first = await served_north(pair.inner, "north 1", *others)
        assert await served_north(pair.outer, "north 1", *others) == first
        await server.connected(NORTH)
        await written(tmp_path / "inner/snapshots", first)
        await pair.inner.kill()
        await server.patch(SDK_KEY + "?filter=north", flag("north", 2))
        server.serve(NORTH, all_data(flag("north", 2), *OTHERS))
        await served_north(pair.outer, "north 2", *others)
        pair.hear()
        await pair.inner.start()
        second = await served_north(pair.inner, "north 2", *others)
        await until(lambda: sorted(pair.intents) == ["none", "xfer-changes"])
        assert b"other1" not in pair.heard.answered
        assert await poll_north(pair.inner, first) == ("xfer-changes", ["north 2"], second)
        status = json.loads((await ask(pair.inner.address, "/status")).body)["environments"]
        assert status["main/north"]["upstream"] == {"protocol": "fdv2", "selector": second}


async def test_an_sdk_behind_two_relays_sees_changes(server, tmp_path):
    """LaunchDarkly's Python SDK, by FDv2, over a restart of the relay that it is connected to."""
    async with chain(server.url, tmp_path) as pair:
        await served(pair.inner, "lamp 1")
        url, context = pair.inner.url, Context.create("anna")
        system = default().build()
        config = Config(
            SDK_KEY, base_uri=url, stream_uri=url, send_events=False, datasystem_config=system,
            initial_reconnect_delay=0.1,
        )  # fmt: skip
        client = await asyncio.to_thread(LDClient, config=config, start_wait=10)
        try:
            assert client.is_initialized()
            first = await served(pair.inner, "lamp 1")
            await server.put(SDK_KEY, all_data(flag("lamp", 2, "two"), *OTHERS))
            await until(lambda: client.variation("lamp", context, "none") == "two")
            second = await served(pair.inner, "lamp 2")
            await written(tmp_path / "inner/snapshots", second)
            await pair.inner.kill()
            await server.put(SDK_KEY, all_data(flag("lamp", 3, "three"), *OTHERS))
            await served(pair.outer, "lamp 3")
            await pair.inner.start()
            await until(lambda: client.variation("lamp", context, "none") == "three", 15)
            assert first != second
            status = json.loads((await ask(pair.inner.address, "/status")).body)
            assert status["environments"]["main"]["status"] == "connected"
        finally:
            await asyncio.to_thread(client.close)
