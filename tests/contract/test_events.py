"""Events through the relay as a process: accepted once, delivered once, also when it is killed."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support import data
from tests.support.data import flag
from tests.support.overhearing import overhearing
from tests.support.process import PATIENCE, RelayProcess
from tests.support.sdk import CLIENT_SIDE_SDKS, SOMEBODY, Setup, make, sees
from tests.support.serving import SDK_KEY, Address, ask, until
from tests.support.upstream import ScriptedUpstream, status

ROUNDS = int(os.environ.get("KILL_ROUNDS", "3"))
"""Number of times that the relay is killed; at night more: KILL_ROUNDS=200."""
ANNA = {"kind": "user", "key": "anna", "name": "Ännä <&> \u2028"}
BOOTSTRAP = {"lamp": "on", "$flagsState": {"lamp": {"version": 3, "variation": 0}}, "$valid": True}
MOBILE_KEY = "mob-main"
ORIGIN = "https://shop.example"
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
        "LD_MOBILE_KEY_main": MOBILE_KEY,
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


def arrived(upstream: ScriptedUpstream, path: str = "/bulk") -> Iterator[tuple[str, str]]:
    """Each event that upstream took, with the id of the payload in which it came."""
    for post in upstream.accepted:
        if post.path == path:
            yield from ((e["key"], post.payload_id) for e in post.events if e["kind"] == "custom")


async def until_arrived(
    upstream: ScriptedUpstream, wanted: set[str], seconds: float, path: str = "/bulk"
) -> None:
    """Wait until upstream has taken these events."""
    async with asyncio.timeout(seconds):
        while not wanted <= {key for key, _ in arrived(upstream, path)}:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def page(relay: RelayProcess, path: str) -> bytes:
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    return (await relay.address.ask(request.encode())).split(b"\r\n\r\n", 1)[1]


async def events_status(relay: RelayProcess) -> dict:
    """Return the section of `/status` about the environment's events."""
    return json.loads(await page(relay, "/status"))["environments"]["main"]["events"]


@pytest.mark.sdk
@pytest.mark.parametrize(
    ("name", "compressed"),
    [
        ("python", False),
        ("python", True),
        ("python-async", True),
        ("node9", False),
        ("node9", True),
        ("node7", False),
    ],
)
async def test_the_events_of_an_sdk_arrive_unharmed(name, compressed, upstream, tmp_path, packages):
    """Evaluations, `track`, `identify`; what is flushed, and what `close` leaves behind."""
    async with (
        relay_of(upstream, tmp_path) as relay,
        overhearing(relay.address) as overheard,
    ):
        setup = Setup(SDK_KEY, overheard.url, events=True, compressed=compressed)
        async with make(name, setup) as sdk:
            await sdk.ready()
            await sees(sdk, "lamp", "on", ANNA)
            await sdk.identify(ANNA)
            await sdk.track("flushed", ANNA, EXACT)
            await sdk.flush()
            await until_arrived(upstream, {"flushed"}, PATIENCE)
            await sdk.track("closed", ANNA, EXACT)
        await until_arrived(upstream, {"closed"}, PATIENCE)
    assert (b"content-encoding: gzip" in overheard.asked.lower()) == compressed
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


@pytest.mark.sdk
@pytest.mark.parametrize("name", CLIENT_SIDE_SDKS)
async def test_the_events_of_a_client_side_sdk_arrive_unharmed(name, upstream, tmp_path, packages):
    """They are under the client-side ID, without a key; pages of any origin may read the answers.

    The flags at its start are the SDK's own.
    """
    path = "/events/bulk/id-main"
    async with (
        relay_of(upstream, tmp_path) as relay,
        overhearing(relay.address) as overheard,
    ):
        setup = Setup("id-main", overheard.url, events=True, bootstrap=BOOTSTRAP, context=ANNA)
        async with make(name, setup) as sdk:
            await sdk.ready()
            assert await sdk.value("lamp", ANNA, "(none)") == "on"
            await sdk.track("flushed", ANNA, EXACT)
            await sdk.flush()
            await until_arrived(upstream, {"flushed"}, PATIENCE, path)
            await sdk.identify(SOMEBODY)
            await sdk.track("closed", SOMEBODY, EXACT)
        await until_arrived(upstream, {"closed"}, PATIENCE, path)
    answers = re.findall(rb"HTTP/1\.1 202 .*?\r\n\r\n", overheard.answered, re.DOTALL)
    assert len(answers) == overheard.asked.count(b"POST /events/") >= 3
    assert all(b"\r\naccess-control-allow-origin: *\r\n" in answer.lower() for answer in answers)
    assert all("Authorization" not in post.headers for post in upstream.posts)
    posts = [post for post in upstream.accepted if post.path == path]
    assert all(post.headers["X-LaunchDarkly-Event-Schema"] == "4" for post in posts)
    events = [event for post in posts for event in post.events]
    custom = {event["key"]: event for event in events if event["kind"] == "custom"}
    data = {key: event["data"] for key, event in custom.items()}
    assert json.dumps(data) == json.dumps({"flushed": EXACT, "closed": EXACT})
    assert custom["closed"]["context"] == SOMEBODY
    identified = [event["context"] for event in events if event["kind"] == "identify"]
    assert identified == [ANNA, SOMEBODY]
    # The relay shows this flag to no browser, which the Node client counts after `identify`.
    summary = next(event for event in events if event["kind"] == "summary")
    counter = {"value": "on", "variation": 0, "version": 3, "count": 1}
    assert summary["features"]["lamp"]["counters"] == [counter]
    (diagnostic,) = (p for p in upstream.accepted if p.path == "/events/diagnostic/id-main")
    assert diagnostic.events["kind"] == "diagnostic-init"


async def test_browsers_may_post_events_from_another_origin(upstream, tmp_path):
    """They ask first whether they may, with the headers that the SDK sends."""
    wanted = ["content-type", "x-launchdarkly-event-schema", "x-launchdarkly-payload-id"]
    wanted += ["x-launchdarkly-tags", "x-launchdarkly-user-agent", "x-launchdarkly-wrapper"]
    path = "/events/bulk/id-main"
    question = [
        ("Origin", ORIGIN),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", ",".join(wanted)),
    ]
    post = [("Origin", ORIGIN), ("X-LaunchDarkly-Event-Schema", "4")]
    async with relay_of(upstream, tmp_path) as relay:
        leave = await ask(relay.address, path, question, method="OPTIONS")
        body = b'[{"kind":"custom","key":"e1"}]'
        answer = await ask(relay.address, path, post, method="POST", body=body)
        await upstream.took(1)
    assert leave.status == 200
    assert "POST" in leave.headers["access-control-allow-methods"].split(",")
    allowed = leave.headers["access-control-allow-headers"].lower().split(",")
    assert set(wanted) <= set(allowed)
    assert answer.status == 202
    for each in (leave, answer):
        assert each.headers["access-control-allow-origin"] == ORIGIN
    assert [(p.path, p.body) for p in upstream.accepted] == [(path, body)]


async def test_events_in_the_address_of_an_image_arrive(upstream, tmp_path):
    """Old browsers cannot post elsewhere; in the SDK's alphabet `?` and `>` encode to `_` and `-`."""
    body = json.dumps([{"kind": "custom", "key": "??>>", "data": EXACT}]).encode()
    text = base64.urlsafe_b64encode(body).decode().rstrip("=")
    assert {"_", "-"} & set(text)
    async with relay_of(upstream, tmp_path) as relay:
        answer = await ask(relay.address, f"/a/id-main.gif?d={text}", [("Origin", ORIGIN)])
        await upstream.took(1)
    assert (answer.status, answer.headers["content-type"]) == (200, "image/gif")
    assert answer.body.startswith(b"GIF89a")
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    (post,) = upstream.accepted
    assert (post.path, post.body) == ("/events/bulk/id-main", body)
    assert "Authorization" not in post.headers


@pytest.mark.parametrize(
    ("who", "headers"),
    [
        ("user", [("X-LaunchDarkly-Event-Schema", "2")]),
        (
            "context",
            [("X-LaunchDarkly-Event-Schema", "4"), ("X-LaunchDarkly-Unsummarized", "true")],
        ),
    ],
    ids=["old", "new"],
)
async def test_the_evaluations_of_a_php_sdk_arrive_counted(who, headers, upstream, tmp_path):
    """Each process of PHP reports its own evaluations; the relay knows what others have told."""
    context = {"key": "anna"} if who == "user" else {"kind": "user", "key": "anna"}

    def evaluated(created: int, value: str, variation: int, **members: object) -> dict:
        return {
            "kind": "feature",
            "creationDate": created,
            "key": "lamp",
            who: context,
            "variation": variation,
            "value": value,
            "default": "off",
            "version": 7,
            **members,
        }

    unknown = {"kind": "feature", "key": "gone", "value": "x", "default": "x", who: context}
    bought = {"kind": "custom", "creationDate": 1500, "key": "bought", who: context}
    first = [
        evaluated(1000, "on", 0),
        evaluated(1200, "on", 0),
        evaluated(1400, "dim", 1, trackEvents=True),
        unknown | {"creationDate": 1450},
        bought | {"data": EXACT, "metricValue": 1.5},
    ]
    headers = [
        ("Authorization", SDK_KEY),
        ("User-Agent", "PHPClient/6.4.0"),
        ("Content-Type", "application/json"),
        ("Accept", "application/json"),
        *headers,
    ]
    async with relay_of(upstream, tmp_path) as relay:
        for posted in (first, [evaluated(2000, "on", 0)]):
            body = json.dumps(posted).encode()
            answer = await ask(relay.address, "/bulk", headers, method="POST", body=body)
            assert answer.status == 202
        await upstream.took(5)
    assert all(post.path == "/bulk" for post in upstream.accepted)
    assert {post.headers["X-LaunchDarkly-Event-Schema"] for post in upstream.accepted} == {"4"}
    assert all("X-LaunchDarkly-Unsummarized" not in post.headers for post in upstream.accepted)
    index, feature, custom, summary, later = (e for p in upstream.accepted for e in p.events)
    assert index == {"kind": "index", "creationDate": 1000, "context": context}
    assert (feature["kind"], feature["value"], feature["version"]) == ("feature", "dim", 7)
    assert feature["context"] == context
    assert (custom["kind"], custom["key"], custom["metricValue"]) == ("custom", "bought", 1.5)
    assert json.dumps(custom["data"]) == json.dumps(EXACT)
    assert (summary["kind"], summary["startDate"], summary["endDate"]) == ("summary", 1000, 1450)
    assert summary["features"] == {
        "lamp": {
            "default": "off",
            "counters": [
                {"variation": 0, "version": 7, "value": "on", "count": 2},
                {"variation": 1, "version": 7, "value": "dim", "count": 1},
            ],
            "contextKinds": ["user"],
        },
        "gone": {
            "default": "x",
            "counters": [{"unknown": True, "value": "x", "count": 1}],
            "contextKinds": ["user"],
        },
    }
    assert (later["kind"], later["startDate"], later["endDate"]) == ("summary", 2000, 2000)
    (counter,) = later["features"]["lamp"]["counters"]
    assert counter == {"variation": 0, "version": 7, "value": "on", "count": 1}


async def test_what_a_mobile_sdk_posts_goes_on_with_the_mobile_key(upstream, tmp_path):
    """The requests of React Native: events and diagnostics, and of its headers those that count."""
    events = b'[{"kind":"custom","key":"tapped","data":{"big": 12345678901234567890}}]'
    diagnostic = b'{"kind":"diagnostic-init"}'
    common = [
        ("authorization", MOBILE_KEY),
        ("user-agent", "ReactNativeClient/10.12.0"),
        ("x-launchdarkly-tags", "application-id/shop application-version/2"),
        ("content-type", "application/json"),
    ]
    of_events = [("x-launchdarkly-payload-id", "id-1"), ("x-launchdarkly-event-schema", "4")]
    async with relay_of(upstream, tmp_path) as relay:
        for path, headers, body in (
            ("/mobile", [*common, *of_events], events),
            ("/mobile/events/diagnostic", common, diagnostic),
        ):
            answer = await ask(relay.address, path, headers, method="POST", body=body)
            assert answer.status == 202
        await until(lambda: len(upstream.accepted) == 2)
    posts = {post.path: post for post in upstream.accepted}
    assert set(posts) == {"/mobile", "/mobile/events/diagnostic"}
    assert all(post.headers["Authorization"] == MOBILE_KEY for post in posts.values())
    post = posts["/mobile"]
    assert (post.body, post.payload_id) == (events, "id-1")
    assert post.headers["X-LaunchDarkly-Event-Schema"] == "4"
    assert post.headers["X-LaunchDarkly-Tags"] == "application-id/shop application-version/2"
    assert posts["/mobile/events/diagnostic"].body == diagnostic


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


async def test_an_upstream_that_rejects_everything_for_seconds_costs_nothing(upstream, tmp_path):
    """A proxy says 400 or 413 to all for a while; all that SDKs post meanwhile arrives, each once."""
    async with relay_of(upstream, tmp_path) as relay:
        for first, code in ((0, 400), (100, 413)):
            upstream.always(SDK_KEY, status(code))
            for number in range(first, first + 100):
                assert await send(relay.address, number) == 202
            await upstream.posted(len(upstream.posts) + 4)
            upstream.always(SDK_KEY, None)
            wanted = {f"e{number}" for number in range(first + 100)}
            await until_arrived(upstream, wanted, PATIENCE)
        events = await events_status(relay)
        assert events["quarantined"] == events["evicted"] == 0
    assert len(list(arrived(upstream))) == 200


async def test_bodies_that_are_not_well_formed_are_set_aside(upstream, tmp_path):
    """They are answered like others, and counted; those posted together with them arrive."""
    bad = (
        b'[{"kind":"custom","key":"x"]',
        b"[NaN]",
        b'["\x00"]',
        b'["\xff"]',
        b'[{"k":"]',
        b'["}]',
    )
    headers = [("Authorization", SDK_KEY), ("X-LaunchDarkly-Event-Schema", "4")]
    async with relay_of(upstream, tmp_path, EVENTS_FLUSH_INTERVAL="1s") as relay:
        for number, body in enumerate(bad):
            assert await send(relay.address, number) == 202
            answer = await ask(relay.address, "/bulk", headers, method="POST", body=body)
            assert answer.status == 202
        await until_arrived(upstream, {f"e{number}" for number in range(len(bad))}, PATIENCE)
        while (events := await events_status(relay))["waiting"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        figures = await page(relay, "/metrics")
        assert (events["quarantined"], events["forwarded"]) == (len(bad), len(bad))
        assert b'relay_event_payloads_quarantined_total{environment="main"} 6\n' in figures
        assert relay.log.count("as they are no well-formed JSON") == 1
    assert {post.status for post in upstream.posts} == {202}, "upstream never saw them"


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
    """SDKs are told 202, the posts wait, `/status` and `/metrics` tell so, and 5 s later they go."""
    upstream.always(SDK_KEY, status(401))
    async with relay_of(upstream, tmp_path) as relay:
        for number in range(3):
            assert await send(relay.address, number) == 202
        await upstream.posted(1)
        events = await events_status(relay)
        assert (events["received"], events["waiting"], events["forwarded"]) == (3, 3, 0)
        assert events["kept"] == "on disk"
        metrics = await page(relay, "/metrics")
        assert b'relay_event_payloads_waiting{environment="main"} 3\n' in metrics
        upstream.always(SDK_KEY, None)
        await upstream.took(3)
        assert SDK_KEY not in relay.log


ENDPOINTS = [
    ("/bulk", "sdk"),
    ("/diagnostic", "sdk"),
    *((f"/mobile{rest}", "mob") for rest in ("", "/events", "/events/bulk", "/events/diagnostic")),
    *(("/events/bulk/{}", "id"), ("/events/diagnostic/{}", "id")),
]
"""Where SDKs post events, and with which credential."""


async def test_events_stay_off_unless_switched_on(upstream, tmp_path):
    """Without USE_EVENTS the answer begins like the reference's, and says which setting is missing."""
    keys = {"sdk": SDK_KEY, "mob": MOBILE_KEY, "id": "none"}
    answers = []
    async with relay_of(upstream, tmp_path, USE_EVENTS="false") as relay:
        for path, kind in ENDPOINTS:
            given = [("Authorization", keys[kind])]
            url = path.format("id-main")
            answers.append(await ask(relay.address, url, given, method="POST", body=b"[{}]"))
        answers.append(await ask(relay.address, "/a/id-main.gif?d=W3t9XQ"))
    text = "Event proxy is not enabled for this environment"
    for answer in answers:
        assert answer.status == 503
        assert json.loads(answer.body)["message"].startswith(text)
        assert b"[Events] sendEvents (USE_EVENTS=true)" in answer.body


@pytest.mark.parametrize("switched", ["true", "false"])
async def test_a_relay_with_a_flags_file_takes_events_and_drops_them(switched, tmp_path):
    """As the reference does in offline mode: whatever is posted, wherever; counted, not announced."""
    flags = tmp_path / "flags.json"
    flags.write_text('{"flagValues": {"lamp": true}}')
    keys = {"sdk": "sdk-demo", "mob": "mob-demo", "id": "none"}
    bodies = (b"[{}]", b'[{"kind":"custom","key":"k"}]', b"hello", b"", b"[]", b"x" * 300_000)
    relay = RelayProcess(tmp_path, "serve", "--flags", str(flags), USE_EVENTS=switched)
    posted = 0
    async with relay:
        for path, kind in ENDPOINTS:
            for body in bodies:
                for schema in ("4", "2"):
                    given = [("Authorization", keys[kind]), ("X-LaunchDarkly-Event-Schema", schema)]
                    url = path.format("demo-client-side-id")
                    answer = await ask(relay.address, url, given, method="POST", body=body)
                    assert (answer.status, answer.body) == (202, b"")
                    posted += 1
        image = await ask(relay.address, "/a/demo-client-side-id.gif?d=W3t9XQ")
        assert (image.status, image.body[:5]) == (200, b"GIF89")
        status = json.loads(await page(relay, "/status"))
        assert status["environments"]["demo"]["events"] == {"discarded": posted + 1}
        figure = b'relay_event_payloads_discarded_total{environment="demo"} %d\n' % (posted + 1)
        assert figure in await page(relay, "/metrics")
    assert relay.log.count("Events will be accepted, but will be discarded") == 1
    assert "memory" not in relay.log
    assert "Forwarding events" not in relay.log


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
