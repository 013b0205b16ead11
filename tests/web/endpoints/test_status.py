"""`/status`, and what orchestrators are told."""

from __future__ import annotations

import json
import logging
import time

import pytest

from relay import __version__
from relay.environment import ConnectionState, Environment
from relay.errors import ErrorKind
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.item import InvalidItem, Item, Kind
from relay.model.payload import EMPTY, Payload
from relay.relay import Relay
from relay.stores import StoreState, StoreStatus
from relay.streams.hub import Hub
from relay.telemetry.traffic import RequestMetrics, Series
from relay.web.endpoints import status
from tests.support.contracts import MemoryMirror, ScriptedSource
from tests.support.serving import Served, Stream, ask, serving, until

SECRETS = ("sdk-5ca1ab1e-0001", "mob-5ca1ab1e-0001")


def environment(name: str = "main", copies=()) -> Environment:
    spec = EnvironmentSpec(
        name,
        SDKKey(f"sdk-5ca1ab1e-0001-4000-8000-000{name}"),
        MobileKey(f"mob-5ca1ab1e-0001-4000-8000-000{name}"),
        EnvironmentID(f"id-{name}"),
    )
    return Environment(spec, ScriptedSource(), Hub({}), logging.getLogger("test"), copies)


def connected(given: Environment) -> Environment:
    connection = given.connection
    connection.enter(ConnectionState.VALID)
    connection.has_data, connection.last_confirmed = True, time.monotonic() - 7
    given.payload = EMPTY
    given.init_done.set()
    return given


def said(relay: Relay, name: str = "main") -> dict:
    return json.loads(status.overview(relay, RequestMetrics()).body)["environments"][name]


async def test_the_members_of_an_environment():
    """The reference's members come first and in its order; ours follow."""
    served = connected(environment())
    item = Item(Kind.FLAG, "a", 1, b'{"version":1}')
    served.payload = Payload.of([item])
    served.invalid = {(Kind.FLAG, "bad"): InvalidItem(Kind.FLAG, "bad", "wrong" * 100)}
    served.connection.last_error = (ErrorKind.NETWORK_ERROR, 1700000000.5)
    traffic = RequestMetrics()
    traffic.requests[Series("main", "/sdk/flags", "GET", "server")].value = 3
    traffic.requests[Series("main", "/all", "GET", "server")].value = 2
    traffic.new_streams[Series("main", "/all", "GET", "server")].value = 2
    whole = json.loads(status.overview(Relay([served], 0), traffic).body)
    main = whole["environments"]["main"]
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
    assert list(whole) == ["environments", "status", "version", "clientVersion"]
    assert (whole["status"], whole["version"]) == ("healthy", __version__)
    assert not any(secret in json.dumps(whole) for secret in SECRETS)


async def test_an_outage_shows_after_a_while():
    """An interruption makes an environment disconnected once it has lasted for long enough."""
    lost = connected(environment())
    relay = Relay([lost, connected(environment("other"))], 0, disconnected_after=60)
    lost.connection.enter(ConnectionState.INTERRUPTED)
    assert said(relay)["status"] == "connected"
    lost.connection.entered -= 61
    assert said(relay)["status"] == "disconnected"
    assert json.loads(status.overview(relay, RequestMetrics()).body)["status"] == "degraded"
    lost.connection.enter(ConnectionState.VALID)
    lost.connection.entered -= 61
    assert said(relay)["status"] == "connected"


@pytest.mark.parametrize("jump", [-8 * 86400, 8 * 86400])
async def test_a_clock_that_is_corrected_changes_no_age(monkeypatch, jump):
    """How long an outage lasts and how old the data are is not read off the clock of the day."""
    lost = connected(environment())
    relay = Relay([lost], 0, disconnected_after=60)
    lost.connection.enter(ConnectionState.INTERRUPTED)
    right = time.time
    monkeypatch.setattr("time.time", lambda: right() + jump)
    assert (said(relay)["status"], said(relay)["dataAge"]) == ("connected", 7)
    lost.connection.entered -= 61
    assert said(relay)["status"] == "disconnected"
    lost.connection.enter(ConnectionState.OFF)
    since = said(relay)["connectionStatus"]["stateSince"]
    assert abs(since / 1000 - time.time()) < 60


async def test_stored_data_are_not_a_connection():
    """An environment that serves stored data only is disconnected."""
    waiting = environment()
    waiting.payload = EMPTY
    assert said(Relay([waiting], 60))["status"] == "disconnected"
    assert said(Relay([waiting], 60))["dataStoreStatus"] == {
        "state": "INITIALIZING",
        "stateSince": 0,
    }
    assert said(Relay([waiting], 0))["dataStoreStatus"]["state"] == "VALID"


async def test_the_database():
    """What a copy says of its database is shown, with what it could not read."""
    silent, speaking = MemoryMirror(), MemoryMirror()
    invalid = tuple(InvalidItem(Kind.SEGMENT, f"s{n}", "not JSON") for n in range(50))
    speaking.status = StoreStatus(
        StoreState.INTERRUPTED, 1700000000.0, "redis", "redis://h:6379", "p", invalid
    )
    shown = said(Relay([environment(copies=[silent, speaking])], 0))["dataStoreStatus"]
    named = shown.pop("invalidItems")
    assert shown == {
        "state": "INTERRUPTED",
        "stateSince": 1700000000000,
        "database": "redis",
        "dbServer": "redis://h:6379",
        "dbPrefix": "p",
        "invalidItemCount": 50,
    }
    assert len(named) == status.MAX_INVALID


async def test_environments_are_sorted_and_found_one_by_one():
    """One environment is found by its name or its client-side ID."""
    relay = Relay([environment("b"), environment("a")], 0)
    whole = json.loads(status.overview(relay, RequestMetrics()).body)
    assert list(whole["environments"]) == ["a", "b"]
    for identifier in ("a", "id-a"):
        one = json.loads(status.one(relay, RequestMetrics(), identifier).body)
        assert one == whole["environments"]["a"]
    assert status.one(relay, RequestMetrics(), "sdk-5ca1ab1e-0001-4000-8000-000a").status == 404


HEALTH = [
    # environments with data, refused, starting, stopping: startupz, readyz
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
    """Ready is who has data for anybody once the start is over; a vendor outage does not matter."""
    data, refused, starting, stopping, startup, ready = case
    environments = [environment(str(n)) for n in range(len(data))]
    for n, each in enumerate(environments):
        each.payload = EMPTY if data[n] == "y" else None
        if str(n) in refused:
            each.connection.enter(ConnectionState.OFF)
            each.init_done.set()
    relay = Relay(environments, 60 if starting else 0)
    relay.stopping = stopping
    assert status.live().status == 200
    assert status.started(relay).status == startup
    answer = status.ready(relay)
    assert answer.status == ready
    lacking = {str(n) for n, has in enumerate(data) if has == "n"}
    assert set(json.loads(answer.body).get("unavailable", {})) == lacking
    for n, has in enumerate(data):
        strict = status.environment_ready(relay, str(n)).status
        assert strict == (200 if has == "y" and not stopping else 503)
    assert status.environment_ready(relay, "none").status == 404
    if refused and not stopping:
        assert b"refuses the SDK key" in answer.body


async def test_streams_at_both_doors_are_counted():
    """Open streams, streams that were opened, and requests are counted at whichever door."""
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
    """Each page answers GET and HEAD in JSON, without a credential."""
    served = Served()
    async with serving(served) as address:
        get, head = [await ask(address, path, method=method) for method in ("GET", "HEAD")]
        assert get.headers["content-type"] == "application/json"
        assert (head.status, head.headers["content-type"]) == (get.status, "application/json")
        assert json.loads(get.body)
