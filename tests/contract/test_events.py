"""Events through the relay as a process: accepted once, delivered once, also when it is killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support import data
from tests.support.data import flag
from tests.support.process import PATIENCE, RelayProcess
from tests.support.sdk import Setup, install_packages, make, sees
from tests.support.serving import SDK_KEY, Address
from tests.support.upstream import ScriptedUpstream, status

ROUNDS = int(os.environ.get("KILL_ROUNDS", "10"))
"""How often the relay is killed; at night more often: KILL_ROUNDS=200."""
ANNA = {"kind": "user", "key": "anna", "name": "Ännä <&> \u2028"}
EXACT = {"big": 9007199254740991, "small": 1.5e-7, "text": 'ü "<&>" \u2028', "list": [None, True]}


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, data.all_data(flag("lamp", value="on")))
        yield upstream


def relay_of(upstream: ScriptedUpstream, folder: Path, **variables: str) -> RelayProcess:
    """A relay that forwards events at once, and keeps them on disk until then."""
    given = {
        "LD_ENV_main": SDK_KEY,
        "LD_CLIENT_SIDE_ID_main": "id-main",
        "STREAM_URI": upstream.url,
        "EVENTS_HOST": upstream.url,
        "USE_EVENTS": "true",
        "EVENTS_FLUSH_INTERVAL": "50ms",
        "EVENTS_SPOOL_DIR": str(folder / "spool"),
    }
    return RelayProcess(folder, **{**given, **variables})


async def send(address: Address, number: int, payload_id: str = "", key: str = SDK_KEY) -> int:
    """Post one event as an SDK does; return the status."""
    body = json.dumps([{"kind": "custom", "key": f"e{number}"}]).encode()
    lines = [
        "POST /bulk HTTP/1.1",
        "Host: x",
        f"Authorization: {key}",
        "X-LaunchDarkly-Event-Schema: 4",
        f"X-LaunchDarkly-Payload-ID: {payload_id or f'id-{number}'}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    answer = await address.ask("\r\n".join([*lines, "", ""]).encode() + body)
    return int(answer.split()[1]) if answer else 0


def arrived(upstream: ScriptedUpstream) -> Iterator[tuple[str, str]]:
    """Each event that upstream took, with the id of the payload in which it came."""
    for post in upstream.accepted:
        if post.path == "/bulk":
            yield from ((e["key"], post.payload_id) for e in post.events if e["kind"] == "custom")


async def until_arrived(upstream: ScriptedUpstream, wanted: set[str], seconds: float) -> None:
    """Wait until upstream has taken these events."""
    async with asyncio.timeout(seconds):
        while not wanted <= {key for key, _ in arrived(upstream)}:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def page(relay: RelayProcess, path: str) -> bytes:
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    return (await relay.address.ask(request.encode())).split(b"\r\n\r\n", 1)[1]


async def events_status(relay: RelayProcess) -> dict:
    """What `/status` says of the events of the environment."""
    return json.loads(await page(relay, "/status"))["environments"]["main"]["events"]


@pytest.fixture(scope="module")
def packages() -> None:
    install_packages()


@pytest.mark.sdk
@pytest.mark.parametrize("name", ["python", "node9", "node7"])
async def test_the_events_of_an_sdk_arrive_unharmed(name, upstream, tmp_path, packages):
    """Evaluations, `track`, `identify`; what is flushed, and what `close` leaves behind."""
    async with relay_of(upstream, tmp_path) as relay:
        async with make(name, Setup(SDK_KEY, relay.url, events=True)) as sdk:
            await sdk.ready()
            await sees(sdk, "lamp", "on", ANNA)
            await sdk.identify(ANNA)
            await sdk.track("flushed", ANNA, EXACT)
            await sdk.flush()
            await until_arrived(upstream, {"flushed"}, PATIENCE)
            await sdk.track("closed", ANNA, EXACT)
        await until_arrived(upstream, {"closed"}, PATIENCE)
    posts = [post for post in upstream.accepted if post.path == "/bulk"]
    events = [event for post in posts for event in post.events]
    kinds = [event["kind"] for event in events]
    assert {"identify", "summary", "custom"} <= set(kinds)
    custom = {event["key"]: event["data"] for event in events if event["kind"] == "custom"}
    assert json.dumps(custom) == json.dumps({"flushed": EXACT, "closed": EXACT})
    (identified,) = (event for event in events if event["kind"] == "identify")
    assert identified["context"]["name"] == ANNA["name"]
    assert all(post.headers["Authorization"] == SDK_KEY for post in posts)
    assert all(post.headers["X-LaunchDarkly-Event-Schema"] == "4" for post in posts)
    diagnostics = [post for post in upstream.accepted if post.path == "/diagnostic"]
    assert [post.events["kind"] for post in diagnostics] == ["diagnostic-init"]


async def test_nothing_acknowledged_is_lost_when_the_relay_is_killed(upstream, tmp_path):
    """Killed again and again while posts come and go: each arrives, and twice only under its id."""
    relay = relay_of(upstream, tmp_path)
    chance = random.Random(0)
    acknowledged: set[str] = set()
    numbers = iter(range(10**6))

    async def post_until_refused() -> None:
        while True:
            number = next(numbers)
            try:
                if await send(relay.address, number) != 202:
                    return
            except OSError:
                return
            acknowledged.add(f"e{number}")

    async with relay:
        for turn in range(ROUNDS):
            if turn:
                await relay.start()
            posting = [asyncio.create_task(post_until_refused()) for _ in range(4)]
            await asyncio.sleep(chance.uniform(0.2, 0.6))  # the moment of the kill is chance
            await relay.kill()
            await asyncio.gather(*posting)
        await relay.start()
        assert len(acknowledged) > ROUNDS
        await until_arrived(upstream, acknowledged, PATIENCE + ROUNDS)
        assert await relay.stop() == 0
    ids = defaultdict(set)
    for key, payload_id in arrived(upstream):
        ids[key].add(payload_id)
    assert {key: found for key, found in ids.items() if len(found) > 1} == {}


async def test_a_retry_of_an_sdk_is_not_counted_twice_also_across_a_restart(upstream, tmp_path):
    """The payload id that the SDK gave is known; a post that is alone keeps it upstream."""
    async with relay_of(upstream, tmp_path) as relay:
        assert await send(relay.address, 1, "11111111-2222-4333-8444-555555555555") == 202
        while (await events_status(relay))["forwarded"] < 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await relay.kill()
        await relay.start()
        assert await send(relay.address, 1, "11111111-2222-4333-8444-555555555555") == 202
        assert await send(relay.address, 2) == 202
        await upstream.took(2)
        assert await relay.stop() == 0
    assert list(arrived(upstream)) == [
        ("e1", "11111111-2222-4333-8444-555555555555"),
        ("e2", "id-2"),
    ]


async def test_the_end_delivers_what_gathers(upstream, tmp_path):
    """SIGTERM does not wait for the flush interval, and loses nothing."""
    async with relay_of(upstream, tmp_path, EVENTS_FLUSH_INTERVAL="1h") as relay:
        assert await send(relay.address, 1) == 202
        assert await relay.stop() == 0
    assert [key for key, _ in arrived(upstream)] == ["e1"]


async def test_what_cannot_be_delivered_at_the_end_is_delivered_by_the_next_relay(
    upstream, tmp_path
):
    """LaunchDarkly's events service is away for longer than this process lives."""
    upstream.always(SDK_KEY, status(503))
    async with relay_of(upstream, tmp_path) as relay:
        assert await send(relay.address, 1) == 202
        await upstream.posted(1)
        assert await relay.stop() == 0
        assert not upstream.accepted
        upstream.always(SDK_KEY, None)
        await relay.start()
        await upstream.took(1)
        assert len({post.payload_id for post in upstream.posts}) == 1


async def test_a_refused_key_does_not_switch_events_off(upstream, tmp_path):
    """SDKs are told 202, the posts wait, and `/status` and `/metrics` tell so."""
    upstream.always(SDK_KEY, status(401))
    async with relay_of(upstream, tmp_path) as relay:
        for number in range(3):
            assert await send(relay.address, number) == 202
        await upstream.posted(1)
        events = await events_status(relay)
        assert (events["received"], events["waiting"], events["forwarded"]) == (3, 3, 0)
        assert events["kept"] == "on disk"
        metrics = await page(relay, "/metrics")
        assert b'relay_event_posts_waiting{environment="main"} 3\n' in metrics
        assert SDK_KEY not in relay.log


async def test_events_stay_off_unless_switched_on(upstream, tmp_path):
    """Without USE_EVENTS the answer is the reference's."""
    async with relay_of(upstream, tmp_path, USE_EVENTS="false") as relay:
        assert await send(relay.address, 1) == 503


async def test_without_a_directory_events_wait_in_memory_and_the_start_says_so(upstream, tmp_path):
    """They are delivered all the same."""
    async with relay_of(upstream, tmp_path, EVENTS_SPOOL_DIR="") as relay:
        await relay.said("accepted events wait in memory only")
        assert await send(relay.address, 1) == 202
        await upstream.took(1)


async def test_an_unusable_directory_is_said_and_harms_nothing(upstream, tmp_path):
    """The relay is ready, accepts events, and keeps them in memory."""
    (tmp_path / "file").write_text("")
    unusable = str(tmp_path / "file" / "spool")
    async with relay_of(upstream, tmp_path, EVENTS_SPOOL_DIR=unusable) as relay:
        await relay.said("Events are kept in memory only")
        assert await send(relay.address, 1) == 202
        await upstream.took(1)
        assert relay.log.count("Events are kept in memory only") == 1
