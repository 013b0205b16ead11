"""Payload filters of the configuration, from the variables to LaunchDarkly and to the SDKs.

The recordings are those of ld-relay with a scripted LaunchDarkly, in which the flag `where` says
which stream its data came from.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from ldclient import Context, LDClient
from ldclient.config import Config as SDKConfig

from relay.cli.eval import main as evaluate
from relay.config.load import load
from relay.errors import ConfigError
from relay.server.options import ServerOptions
from relay.server.site import Site, build_site
from relay.web.fastpath.shared import ConnectionLimits
from tests.support.data import all_data, flag, patch
from tests.support.serving import Address, Reply, Stream, ask, serving_site, until
from tests.support.upstream import ScriptedUpstream, filtered, stall, status

GOLDEN = Path(__file__).parent.parent / "golden/filters.jsonl"
SCENES = {s["name"]: s for s in map(json.loads, GOLDEN.read_text("utf-8").splitlines())}
ENVIRONMENTS = ("alpha", "beta", "gamma")
CONTEXT = base64.urlsafe_b64encode(b'{"kind":"user","key":"anna"}').decode()
NORTH, SOUTH = "alpha/north", "alpha/south"
ASKED = re.compile(r"(\w+)\.(sdk1|mob1|id)(?: filter=(\w*))?: (GET|OPTIONS) (/\S+)")
TWICE = {
    "alpha.sdk1 filter twice: GET /sdk/flags/where": "filter=north&filter=south",
    "alpha.sdk1 filter=north then no value": "filter=&filter=north",
}
"""Queries behind the recordings that do not show theirs."""


def credential(environment: str, kind: str) -> str:
    """Return a credential of the recordings."""
    n = ENVIRONMENTS.index(environment) + 1
    if kind == "id":
        return f"5ca1ab1e0000000000000c0{n}"
    prefix, letter = {"sdk1": ("sdk", "a"), "mob1": ("mob", "b")}[kind]
    return f"{prefix}-5ca1ab1e-0a0{n}-4000-8000-0000000{n}{letter}001"


def where(text: str, version: int = 1) -> dict[str, Any]:
    """Return the flag that says where it came from, in the recordings' form."""
    return {
        "key": "where",
        "on": False,
        "prerequisites": [],
        "targets": [],
        "contextTargets": [],
        "rules": [],
        "fallthrough": {},
        "offVariation": 0,
        "variations": [text],
        "clientSideAvailability": {"usingMobileKey": True, "usingEnvironmentId": True},
        "clientSide": True,
        "salt": "s",
        "trackEvents": False,
        "trackEventsFallthrough": False,
        "debugEventsUntilDate": None,
        "version": version,
        "deleted": False,
    }


def upstream_key(name: str) -> str:
    """Return the key by which the scripted LaunchDarkly knows an environment or a variant."""
    environment, _, payload_filter = name.partition("/")
    return filtered(credential(environment, "sdk1"), payload_filter)


def serve(upstream: ScriptedUpstream, name: str) -> None:
    """Let LaunchDarkly have the data of an environment or a variant."""
    upstream.serve(upstream_key(name), all_data(where(f"{name} via sdk1")))


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        yield upstream


@asynccontextmanager
async def relay(
    upstream: ScriptedUpstream, variables: Mapping[str, str], *, front: bool = True, file: str = ""
) -> AsyncGenerator[tuple[Site, Address], None]:
    """Serve what variables and file configure, with LaunchDarkly as it is scripted."""
    uris = ("STREAM_URI", "BASE_URI", "CLIENT_SIDE_BASE_URI", "EVENTS_HOST")
    config = load(file, True, False, {**variables, **dict.fromkeys(uris, upstream.url)})
    site = build_site(config, ConnectionLimits())
    async with serving_site(site, ServerOptions(0, drain=2), front=front) as port:
        yield site, Address(port)


async def have_data(site: Site, names: int) -> None:
    """Wait until so many environments have data."""
    environments = site.relay.environments.values()
    await until(lambda: sum(e.connection.has_data for e in environments) == names)


def variables_of(scene: str) -> dict[str, str]:
    return dict(SCENES[scene]["environment variables"])


async def asked(address: Address, text: str) -> Reply:
    """Send the request that a recording describes."""
    match = ASKED.match(text)
    if match is None or text in TWICE:
        key = "sdk-unknown" if text.startswith("unknown") else credential("alpha", "sdk1")
        query = TWICE.get(text) or (text[1:] if text.startswith("?") else "filter=north")
        return await ask(address, f"/sdk/flags/where?{query}", [("authorization", key)])
    environment, kind, payload_filter, method, path = match.groups()
    key = credential(environment, kind)
    if path.endswith("/evalx"):
        path = (
            f"/msdk/evalx/contexts/{CONTEXT}"
            if kind == "mob1"
            else f"/sdk/evalx/{key}/contexts/{CONTEXT}"
        )
    if path == "/sdk/goals":
        path = f"{path}/{key}"
    query = "" if payload_filter is None else f"?filter={payload_filter}"
    headers = [] if kind == "id" else [("authorization", key)]
    return await ask(address, path + query, headers, method=method)


def meaning(body: str) -> Any:
    """Return what is compared of a body: the data of a message, JSON, or the text."""
    text = body.split("data: ", 1)[1] if body.startswith("event: put\n") else body
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.parametrize("front", [True, False], ids=["front", "app"])
async def test_all_endpoints_take_the_filter_as_ld_relay_does(upstream, front):
    """Each answers with the data of the variant, to the credentials of the environment."""
    scene = "two filters, two projects"
    for name in ("alpha", NORTH, SOUTH, "beta", "beta/north", "beta/south", "gamma"):
        serve(upstream, name)
    async with relay(upstream, variables_of(scene), front=front) as (site, address):
        await have_data(site, 7)
        for recorded in SCENES[scene]["steps"][0]["answers"]:
            if "goals" in recorded["ask"]:
                continue  # LaunchDarkly's, whatever the filter
            for _ in range(2):  # the second may come from a cache
                reply = await asked(address, recorded["ask"])
                got = reply.status, meaning(reply.body.decode())
                assert got == (recorded["status"], meaning(recorded["body"])), recorded["ask"]
        page = json.loads((await ask(address, "/status")).body)
    wanted = SCENES[scene]["steps"][0]["status"]["environments"]
    assert page["environments"].keys() == wanted.keys()
    for name, members in wanted.items():
        got = page["environments"][name]
        for member in ("sdkKey", "envId", "mobileKey", "status"):
            assert got[member] == members[member]
    requests = {(r.path, r.headers["Authorization"]) for r in upstream.requests}
    opened = [u for u in SCENES[scene]["steps"][0]["upstream"] if u["what"] == "open"]
    assert {
        (u["request"].removeprefix("GET "), credential(*u["as"].split("."))) for u in opened
    } <= requests


async def test_a_change_reaches_the_streams_of_its_variant_only(upstream):
    """Streams of other filters, and of all data, see nothing of it."""
    for name in ("alpha", NORTH, SOUTH):
        serve(upstream, name)
    variables = variables_of("upstream answers 401 to one filter")
    async with relay(upstream, variables) as (site, address):
        await have_data(site, 3)
        paths = {"sdk1": "/all", "mob1": "/mping", "id": f"/ping/{credential('alpha', 'id')}"}
        streams: dict[str, list[Stream]] = {}
        for name in ("alpha", NORTH, SOUTH):
            query = f"?filter={name.partition('/')[2]}" if "/" in name else ""
            streams[name] = [
                await Stream.open(address, path + query, key=credential("alpha", kind))
                for kind, path in paths.items()
            ]
            for stream in streams[name]:
                await stream.until(b"\n\n")
        for name in (NORTH, "alpha", SOUTH):
            await upstream.patch(upstream_key(name), where(f"{name} patched", 2))
            server, *clients = [await stream.until(b"\n\n") for stream in streams[name]]
            assert f'"{name} patched"'.encode() in server
            assert [each.split(b"\n")[0] for each in clients] == [b"event: ping"] * 2
        for stream in [each for group in streams.values() for each in group]:
            stream.close()


async def test_a_filter_that_upstream_refuses_or_delays_affects_its_variant_only(upstream):
    """Polls of that get 503, not 401: LaunchDarkly is asked again, and `/status` says why."""
    serve(upstream, "alpha")
    upstream.always(upstream_key(NORTH), stall)
    variables = variables_of("upstream answers 401 to one filter")
    async with relay(upstream, variables) as (site, address):
        await have_data(site, 1)
        await until(site.relay.environments[SOUTH].init_done.is_set)
        page = json.loads((await ask(address, "/status")).body)
        key = [("authorization", credential("alpha", "sdk1"))]
        codes = [
            (await ask(address, f"/sdk/flags/where?filter={name}", key)).status
            for name in ("", "north", "south")
        ]
    assert codes == [200, 503, 503]
    assert page["status"] == "degraded"
    states = {n: e["connectionStatus"]["state"] for n, e in page["environments"].items()}
    assert states == {"alpha": "VALID", NORTH: "INITIALIZING", SOUTH: "OFF"}


@pytest.mark.parametrize("front", [True, False], ids=["front", "app"])
async def test_unusual_keys(upstream, front):
    """A key is sent form-encoded, and compared decoded; blanks around it do not count."""
    scene = "unusual filter keys"
    keys = [key.strip() for key in variables_of(scene)["LD_FILTER_KEYS_proj"].split(",")]
    for key in ("", *keys):
        serve(upstream, f"alpha/{key}" if key else "alpha")
    async with relay(upstream, variables_of(scene), front=front) as (site, address):
        await have_data(site, 1 + len(keys))
        for recorded in SCENES[scene]["steps"][0]["answers"]:
            reply = await asked(address, recorded["ask"])
            got = reply.status, meaning(reply.body.decode())
            assert got == (recorded["status"], meaning(recorded["body"])), recorded["ask"]
        names = set(json.loads((await ask(address, "/status")).body)["environments"])
    assert names == set(SCENES[scene]["steps"][0]["status"]["environments"])


async def test_filter_key_of_an_environment(upstream, tmp_path):
    """Its credentials open it with the filter only, as by ld-relay."""
    scene = SCENES["an environment of the configuration file with filterKey"]
    file = tmp_path / "relay.conf"
    file.write_text(scene["steps"][0]["did"])
    serve(upstream, NORTH)
    async with relay(upstream, {}, file=str(file)) as (site, address):
        await have_data(site, 1)
        for recorded in scene["steps"][0]["answers"]:
            reply = await asked(address, recorded["ask"])
            got = reply.status, meaning(reply.body.decode())
            assert got == (recorded["status"], meaning(recorded["body"])), recorded["ask"]
        assert list(json.loads((await ask(address, "/status")).body)["environments"]) == ["alpha"]


async def test_each_variant_has_a_prefix_of_its_own(upstream, redis):
    """Also without a configured prefix, where ld-relay's variants overwrite each other."""
    for name in ("alpha", NORTH, SOUTH):
        serve(upstream, name)
    variables = variables_of("with Redis, prefix red")
    variables["REDIS_URL"] = redis.url
    for prefix, in_use in (("red", "red"), ("", "launchdarkly")):
        redis.do("FLUSHALL")
        async with relay(upstream, {**variables, "LD_PREFIX_alpha": prefix}) as (site, address):
            await have_data(site, 3)
            for environment in site.relay.environments.values():
                for mirror in environment.mirrors:
                    await asyncio.wait_for(mirror.flushed(), 5)
            page = json.loads((await ask(address, "/status")).body)
        for name in ("alpha", NORTH, SOUTH):
            place = in_use + name.removeprefix("alpha")
            stored = json.loads(redis.hash(f"{place}:features")["where"])
            assert stored["variations"] == [f"{name} via sdk1"]
            assert page["environments"][name]["dataStoreStatus"]["dbPrefix"] == place


@pytest.mark.parametrize("source", ["streaming", "polling"])
async def test_each_variant_has_a_snapshot_of_its_own(upstream, tmp_path, source):
    """Without LaunchDarkly, each is served from its own."""
    variables = {
        **variables_of("upstream answers 401 to one filter"),
        "SNAPSHOT_DIR": str(tmp_path),
        "DATA_SOURCE": source,
    }
    key = [("authorization", credential("alpha", "sdk1"))]
    for name in ("alpha", NORTH, SOUTH):
        serve(upstream, name)
    async with relay(upstream, variables) as (site, _):
        await have_data(site, 3)
    path = {"streaming": "/all", "polling": "/sdk/latest-all"}[source]
    assert {r.path for r in upstream.requests} == {
        path,
        f"{path}?filter=north",
        f"{path}?filter=south",
    }
    for name in ("alpha", NORTH, SOUTH):
        upstream.always(upstream_key(name), status(503))
    async with relay(upstream, variables) as (site, address):
        environments = site.relay.environments.values()
        await until(lambda: all(e.payload is not None for e in environments))
        for name in ("alpha", NORTH, SOUTH):
            query = f"?filter={name.partition('/')[2]}"
            reply = await ask(address, f"/sdk/flags/where{query}", key)
            assert json.loads(reply.body)["variations"] == [f"{name} via sdk1"]


async def test_events_of_variants_go_out_under_the_key_of_their_environment(upstream):
    """Each variant has posts of its own, as by ld-relay."""
    for name in ("alpha", NORTH, SOUTH):
        serve(upstream, name)
    variables = variables_of("upstream answers 401 to one filter")
    variables |= {"USE_EVENTS": "1", "EVENTS_FLUSH_INTERVAL": "50ms"}
    headers = [("authorization", credential("alpha", "sdk1")), ("x-launchdarkly-event-schema", "4")]
    async with relay(upstream, variables) as (site, address):
        await have_data(site, 3)
        assert site.relay.events
        running = asyncio.create_task(site.relay.events.run())
        for query in ("", "?filter=north", "?filter=south"):
            body = json.dumps([{"kind": "custom", "key": f"with {query}", "creationDate": 1}])
            json_header = ("content-type", "application/json")
            reply = await ask(
                address, f"/bulk{query}", [*headers, json_header], method="POST", body=body.encode()
            )
            assert reply.status == 202
        await upstream.took(3)
        running.cancel()
    posted = [(p.headers["Authorization"], [e["key"] for e in p.events]) for p in upstream.accepted]
    key = credential("alpha", "sdk1")
    assert sorted(posted) == [
        (key, ["with "]),
        (key, ["with ?filter=north"]),
        (key, ["with ?filter=south"]),
    ]


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "polling"])
async def test_the_python_sdk_with_a_payload_filter(upstream, stream):
    """It sees its part of the data, and the changes there."""
    for name in ("alpha", NORTH, SOUTH):
        serve(upstream, name)
    variables = variables_of("upstream answers 401 to one filter")
    async with relay(upstream, variables) as (site, address):
        await have_data(site, 3)
        url = f"http://127.0.0.1:{address.port}"
        config = SDKConfig(
            credential("alpha", "sdk1"),
            base_uri=url,
            stream_uri=url,
            stream=stream,
            send_events=False,
            payload_filter_key="north",
        )
        client = await asyncio.to_thread(lambda: LDClient(config, start_wait=5))
        try:
            seen = client.variation("where", Context.create("anna"), "none")
            assert seen == f"{NORTH} via sdk1"
            if stream:
                await upstream.raw(upstream_key("alpha"), patch(flag("where", 9, "of all")))
                await upstream.raw(upstream_key(NORTH), patch(flag("where", 2, "changed")))
                async with asyncio.timeout(5):
                    while seen == f"{NORTH} via sdk1":
                        await asyncio.sleep(0.01)
                        seen = client.variation("where", Context.create("anna"), "none")
                assert seen == "changed"
        finally:
            await asyncio.to_thread(client.close)


async def test_the_command_eval_takes_a_filter(upstream, capsys):
    """It shows the value that an SDK with this filter has."""
    for name in ("alpha", NORTH, SOUTH):
        serve(upstream, name)
    variables = variables_of("upstream answers 401 to one filter")
    async with relay(upstream, variables) as (site, address):
        await have_data(site, 3)
        url, key = f"http://127.0.0.1:{address.port}", credential("alpha", "sdk1")
        asked_for = ["where", "--context", '{"kind":"user","key":"anna"}', "--url", url]
        for more, name in (([], "alpha"), (["--filter", "north"], NORTH)):
            options = [*asked_for, "--sdk-key", key, *more]
            assert await asyncio.to_thread(evaluate, options) == 0
            assert f'"{name} via sdk1"' in capsys.readouterr().out


async def test_the_pages_of_a_variant(upstream):
    """`/status` and `/readyz` of one environment, by name, ID, or keys and filter (newer 10.3)."""
    for name in ("alpha", NORTH, SOUTH):
        serve(upstream, name)
    variables = variables_of("upstream answers 401 to one filter")
    async with relay(upstream, {**variables, "LD_ENV_KEY_alpha": "prod"}) as (site, address):
        await have_data(site, 3)
        await ask(
            address, "/sdk/flags?filter=north", [("authorization", credential("alpha", "sdk1"))]
        )
        requests = {}
        for owner in ("alpha", credential("alpha", "id"), "proj/prod"):
            for rest in ("", "/filters/north", "/filters/south", "/filters/west"):
                reply = await ask(address, f"/status/{owner}{rest}")
                requests[owner, rest] = json.loads(reply.body).get("requests", reply.status)
        named = json.loads((await ask(address, "/status/alpha/north")).body)
        assert (await ask(address, "/status/proj/none")).status == 404
        codes = [(await ask(address, f"/readyz/{each}")).status for each in (NORTH, "alpha/west")]
    assert named["requests"] == 1
    assert list(requests.values()) == [0, 1, 0, 404] * 3
    assert codes == [200, 404]


async def test_the_fast_path_knows_clients_by_their_filter(upstream):
    """Requests that differ in their contexts only are parsed once for each filter."""
    for name in ("alpha", NORTH, SOUTH):
        serve(upstream, name)
    variables = variables_of("upstream answers 401 to one filter")
    async with relay(upstream, variables) as (site, address):
        await have_data(site, 3)
        for n in range(3):
            context = base64.urlsafe_b64encode(b'{"kind":"user","key":"%d"}' % n).decode()
            path = f"/sdk/evalx/{credential('alpha', 'id')}/contexts/{context.rstrip('=')}"
            for name, query in [
                ("alpha", ""),
                (NORTH, "?filter=north"),
                (SOUTH, f"?n={n}&filter=south&h=x"),
                (NORTH, "?filter=north&filter=south"),
                (NORTH, "?filter=nor%74h"),
                ("alpha", "?filter=&filter=south"),
            ]:
                reply = await ask(address, path + query)
                assert json.loads(reply.body)["where"]["value"] == f"{name} via sdk1", query
            assert (await ask(address, f"{path}?filter=nowhere")).status == 404
        assert len(site.fast_path.evaluation.profiles) == 3


@pytest.mark.parametrize(
    "recorded",
    [s for s in SCENES["configurations that are refused"]["steps"] if "LD_FILTER" in s["did"]],
    ids=lambda recorded: recorded["step"],
)
def test_refused_configurations(recorded):
    """In ld-relay's words; a key of blanks, with which it makes a second environment, as well."""
    variables = dict(part.split("=", 1) for part in re.split(r", (?=[A-Z])", recorded["did"]))
    with pytest.raises(ConfigError) as caught:
        load("", True, False, variables)
    refusals = [line for line in recorded["log"] if "Configuration error: " in line]
    text = "filter key [1] for project 'proj' is malformed"
    if refusals:
        text = refusals[0].partition("Configuration error: ")[2]
    assert any(problem.startswith(text) for problem in caught.value.problems)
