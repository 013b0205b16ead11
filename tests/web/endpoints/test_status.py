"""`/status`, and health checks for orchestrators."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from relay import __version__, clock
from relay.bigsegments.environment import BigSegmentStatus
from relay.environment import ConnectionState, Environment, UpstreamConnection
from relay.errors import ErrorKind
from relay.events.forwarder import Forwarder
from relay.events.spool import MemorySpool
from relay.events.store import Limits
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.item import InvalidItem, Item, Kind
from relay.model.payload import EMPTY, Payload
from relay.relay import Relay
from relay.stores import DOCUMENT, StoreState, StoreStatus
from relay.streams.hub import Hub
from relay.telemetry.traffic import RequestLabels, RequestMetrics
from relay.telemetry.workers import WorkerStatus
from relay.upstream import Upstream
from relay.web import expectations
from relay.web.endpoints import status
from tests.support.clocks import SystemClock
from tests.support.contracts import MemoryMirror, ScriptedSource
from tests.support.serving import Served, Stream, ask, serving, until

SECRETS = ("sdk-5ca1ab1e-0001", "mob-5ca1ab1e-0001")


def environment(name: str = "main", mirrors=()) -> Environment:
    spec = EnvironmentSpec(
        name,
        SDKKey(f"sdk-5ca1ab1e-0001-4000-8000-000{name}"),
        MobileKey(f"mob-5ca1ab1e-0001-4000-8000-000{name}"),
        EnvironmentID(f"id-{name}"),
    )
    return Environment(spec, ScriptedSource(), Hub({}), logging.getLogger("test"), mirrors)


def connected(env: Environment) -> Environment:
    connection = env.connection
    connection.enter(ConnectionState.VALID)
    connection.has_data, connection.last_confirmed = True, time.monotonic() - 7
    env.payload = EMPTY
    env.init_done.set()
    return env


def members_of(relay: Relay, name: str = "main") -> dict:
    return json.loads(status.overview(relay, RequestMetrics()).body)["environments"][name]


async def test_the_members_of_an_environment():
    """The members of ld-relay come first, in its order; the relay's own follow."""
    main_environment = connected(environment())
    item = Item(Kind.FLAG, "a", 1, b'{"version":1}')
    main_environment.payload = Payload.of([item])
    main_environment.invalid = {(Kind.FLAG, "bad"): InvalidItem(Kind.FLAG, "bad", "wrong" * 100)}
    main_environment.connection.last_error = (ErrorKind.NETWORK_ERROR, 1700000000.5)
    traffic = RequestMetrics()
    traffic.requests[RequestLabels("main", "/sdk/flags", "GET", "server")].value = 3
    traffic.requests[RequestLabels("main", "/all", "GET", "server")].value = 2
    traffic.new_streams[RequestLabels("main", "/all", "GET", "server")].value = 2
    page = json.loads(status.overview(Relay([main_environment], 0), traffic).body)
    main = page["environments"]["main"]
    created = main["dataStoreStatus"].pop("stateSince")
    assert abs(created / 1000 - time.time()) < 60
    assert list(main.items()) == [
        ("sdkKey", "sdk-********-****-****-****-**0main"),
        ("envId", "id-main"),
        ("mobileKey", "mob-********-****-****-****-**0main"),
        ("status", "connected"),
        ("connectionStatus", main["connectionStatus"]),
        ("dataStoreStatus", {"state": "VALID"}),
        ("dataAge", 7),
        ("items", 1),
        ("invalidItemCount", 1),
        ("invalidItems", {"flag bad": ("wrong" * 100)[: status.MAX_REASON]}),
        ("streams", 0),
        ("requests", 5),
        ("newStreams", 2),
    ]
    error = {"kind": "NETWORK_ERROR", "time": 1700000000500}
    assert main["connectionStatus"]["lastError"] == error
    assert list(page) == ["environments", "status", "version", "clientVersion"]
    assert (page["status"], page["version"]) == ("healthy", __version__)
    assert not any(secret in json.dumps(page) for secret in SECRETS)


def everything() -> Relay:
    """A relay of which `/status` has every member."""
    bad = InvalidItem(Kind.FLAG, "bad", "not JSON")
    database, other, document = MemoryMirror(), MemoryMirror(), MemoryMirror()
    for mirror in (database, other):
        mirror.status = StoreStatus(StoreState.VALID, 1.0, "redis", "redis://h", "p", (bad,), "t")
    document.status = StoreStatus(StoreState.VALID, 1.0, DOCUMENT, "s3://b/p", "LD-Env-1")
    main = connected(environment(mirrors=[database, other, document]))
    names = {"project_key": "p", "project_name": "P", "environment_key": "m"}
    soon = clock.now() + 60
    expiries = ((SDKKey("sdk-old-12345"), soon), (MobileKey("mob-old-12345"), soon))
    main.spec = replace(main.spec, **names, environment_name="M", expiries=expiries)
    main.payload = Payload.of([])
    main.invalid, main.rejected = {(Kind.FLAG, "bad"): bad}, 1
    main.connection.last_error = (ErrorKind.NETWORK_ERROR, 1.0)
    main.big_segments = cast("Any", SimpleNamespace(status=BigSegmentStatus(True, False, 1.0)))
    directory: Any = SimpleNamespace(
        is_upstream=True,
        connection=UpstreamConnection(last_error=(ErrorKind.ERROR_RESPONSE, 1.0), last_status=401),
        known=asyncio.Event(),
        invalid_entries={("filter", "f"): "there is no key"},
    )
    directory.connection.last_confirmed = clock.monotonic()
    spool, specs = MemorySpool(Limits()), {"main": main.spec}
    relay = Relay(
        [main], 0, directory=directory, events=Forwarder(spool, Upstream(), "http://h", specs.get)
    )
    relay.unusable["id-beta"] = "there is no SDK key"
    relay.unusable_archive = "it is a directory", 1.0
    relay.workers[0] = WorkerStatus(0, 4711, 1.0, 1)
    return relay


def covered(value: object, schema: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the schema at which a page has values; all of them must be there."""
    if isinstance(value, list):
        for each in value:
            yield from covered(each, schema["[]"], (*path, "[]"))
    elif isinstance(value, dict):
        for name, each in value.items():
            step = name if name in schema else "*"
            assert step in schema, (*path, name)
            yield from covered(each, schema[step], (*path, step))
    else:
        assert schema is None, path
        yield path


def paths_of(schema: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if schema is None:
        yield path
    for name, each in (schema or {}).items():
        yield from paths_of(each, (*path, name))


async def test_every_member_can_be_expected():
    """The schema of expectations has all that the page can have, and little else."""
    page = json.loads(status.overview(everything(), RequestMetrics()).body)
    schema = expectations.OVERVIEW
    missing = {*paths_of(schema)} - {*covered(page, schema)}
    names = {path[-2:] for path in missing if "fdv2" not in path}  # no client has asked
    assert names == {("[]", "key"), ("lastError", "statusCode")}  # ld-relay 9 tells them


async def test_an_outage_shows_after_a_while():
    """An interruption counts as disconnected once it has lasted long enough."""
    main = connected(environment())
    relay = Relay([main, connected(environment("other"))], 0, disconnected_after=60)
    main.connection.enter(ConnectionState.INTERRUPTED)
    assert members_of(relay)["status"] == "connected"
    main.connection.entered -= 61
    assert members_of(relay)["status"] == "disconnected"
    assert json.loads(status.overview(relay, RequestMetrics()).body)["status"] == "degraded"
    main.connection.enter(ConnectionState.VALID)
    main.connection.entered -= 61
    assert members_of(relay)["status"] == "connected"


@pytest.mark.parametrize("jump", [-8 * 86400, 8 * 86400])
async def test_a_clock_that_is_corrected_changes_no_age(jump):
    """Ages of outages and data do not depend on the wall clock."""
    main = connected(environment())
    relay = Relay([main], 0, disconnected_after=60)
    main.connection.enter(ConnectionState.INTERRUPTED)
    with SystemClock() as system:
        system.correct(jump)
        assert (members_of(relay)["status"], members_of(relay)["dataAge"]) == ("connected", 7)
        main.connection.entered -= 61
        assert members_of(relay)["status"] == "disconnected"
        main.connection.enter(ConnectionState.OFF)
    since = members_of(relay)["connectionStatus"]["stateSince"]
    assert abs(since / 1000 - time.time() - jump) < 60


async def test_stored_data_are_not_a_connection():
    """An environment with stored data but no connection is disconnected."""
    waiting = environment()
    waiting.payload = EMPTY
    assert members_of(Relay([waiting], 60))["status"] == "disconnected"
    assert members_of(Relay([waiting], 60))["dataStoreStatus"] == {
        "state": "INITIALIZING",
        "stateSince": 0,
    }
    assert members_of(Relay([waiting], 0))["dataStoreStatus"]["state"] == "VALID"


async def test_the_state_of_the_database():
    """The status of a mirror is shown, with the items that it could not read."""
    silent, reporting = MemoryMirror(), MemoryMirror()
    invalid = tuple(InvalidItem(Kind.SEGMENT, f"s{n}", "not JSON") for n in range(50))
    reporting.status = StoreStatus(
        StoreState.INTERRUPTED, 1700000000.0, "redis", "redis://h:6379", "p", invalid
    )
    members = members_of(Relay([environment(mirrors=[silent, reporting])], 0))["dataStoreStatus"]
    invalid_items = members.pop("invalidItems")
    assert members == {
        "state": "INTERRUPTED",
        "stateSince": 1700000000000,
        "database": "redis",
        "dbServer": "redis://h:6379",
        "dbPrefix": "p",
        "invalidItemCount": 50,
    }
    assert len(invalid_items) == status.MAX_INVALID


async def test_environments_are_sorted_and_served_singly():
    """Environments are listed by name, and served singly by name or client-side ID."""
    relay = Relay([environment("b"), environment("a")], 0)
    page = json.loads(status.overview(relay, RequestMetrics()).body)
    assert list(page["environments"]) == ["a", "b"]
    for identifier in ("a", "id-a"):
        one = json.loads(status.one(relay, RequestMetrics(), identifier).body)
        assert one == page["environments"]["a"]
    assert status.one(relay, RequestMetrics(), "sdk-5ca1ab1e-0001-4000-8000-000a").status == 404


HEALTH = [
    # environments with data (y/n), refused, starting, stopping, status of startupz, of readyz
    ("yy", "", True, False, 200, 200),
    ("yn", "", True, False, 503, 503),
    ("yn", "", False, False, 200, 200),
    ("yn", "1", False, False, 200, 200),
    ("nn", "", False, False, 200, 503),
    ("nn", "01", False, False, 200, 503),
    ("yy", "", False, True, 200, 503),
]


@pytest.mark.parametrize("case", HEALTH)
async def test_health(case):
    """A started relay is ready if any environment has data; an upstream outage does not matter."""
    data, refused, starting, stopping, startup, ready = case
    environments = [environment(str(n)) for n in range(len(data))]
    for n, one in enumerate(environments):
        one.payload = EMPTY if data[n] == "y" else None
        if str(n) in refused:
            one.connection.enter(ConnectionState.OFF)
            one.init_done.set()
    relay = Relay(environments, 60 if starting else 0)
    relay.stopping = stopping
    assert status.live().status == 200
    assert status.started(relay).status == startup
    response = status.ready(relay)
    assert response.status == ready
    unavailable = {str(n) for n, has in enumerate(data) if has == "n"}
    assert set(json.loads(response.body).get("unavailable", {})) == unavailable
    for n, has in enumerate(data):
        strict = status.environment_ready(relay, str(n)).status
        assert strict == (200 if has == "y" and not stopping else 503)
    assert status.environment_ready(relay, "none").status == 404
    if refused and not stopping:
        assert b"refuses the SDK key" in response.body


async def test_streams_on_both_paths_are_counted():
    """Open streams, opened streams and requests are counted on the fast path and without it."""
    for front in (True, False):
        served = Served()
        async with serving(served, front=front) as address:
            streams = [await Stream.open(address, path) for path in ("/all", "/all", "/flags")]
            streams.pop().close()
            await until(lambda hub=served.hub: len(hub) == 2)
            await ask(
                address, "/sdk/poll", [("Authorization", served.environment.spec.sdk_key.value)]
            )
            reply = await ask(address, "/status", method="GET")
            main = json.loads(reply.body)["environments"]["main"]
            assert (main["streams"], main["newStreams"], main["requests"]) == (2, 3, 4)
            for stream in streams:
                stream.close()


@pytest.mark.parametrize(
    "path", ["/status", "/status/main", "/livez", "/startupz", "/readyz", "/readyz/main"]
)
async def test_pages(path):
    """Each page serves GET and HEAD in JSON, without a credential."""
    served = Served()
    async with serving(served) as address:
        get, head = [await ask(address, path, method=method) for method in ("GET", "HEAD")]
        assert get.headers["content-type"] == "application/json"
        assert (head.status, head.headers["content-type"]) == (get.status, "application/json")
        assert json.loads(get.body)


async def test_published_documents_have_a_member_of_their_own():
    """`dataStoreStatus` stays that of a database, as ld-relay's readers expect it."""
    document, database = MemoryMirror(), MemoryMirror()
    document.status = StoreStatus(StoreState.INTERRUPTED, 7.0, DOCUMENT, "s3://b/p", "LD-Env-1")
    assert members_of(Relay([environment(mirrors=[document])], 60))["published"] == [
        {"state": "INTERRUPTED", "stateSince": 7000, "document": "LD-Env-1", "url": "s3://b/p"}
    ]
    database.status = StoreStatus(StoreState.VALID, 0.0, "redis", "redis://h", "p")
    members = members_of(Relay([environment(mirrors=[document, database])], 60))
    assert members["dataStoreStatus"]["database"] == "redis"
    assert "published" not in members_of(Relay([environment(mirrors=[database])], 60))
