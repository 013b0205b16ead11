"""`/metrics`: its values, its cost, and its table in docs/operations.md."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from relay import __version__, clock
from relay.bigsegments.environment import BigSegments
from relay.bigsegments.lease import StoreLease
from relay.bigsegments.synchroniser import Synchroniser
from relay.environment import ConnectionState, Environment, UpstreamConnection
from relay.events.forwarder import Forwarder
from relay.events.spool import MemorySpool
from relay.events.store import Limits
from relay.fleet import FleetStatus, Role
from relay.metrics import catalogue
from relay.model.credential import EnvironmentID, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.item import InvalidItem, Item, Kind
from relay.model.journal import MISSING
from relay.model.payload import Payload
from relay.protocol import fdv1
from relay.protocol.fdv1 import AllFormat, FlagsFormat
from relay.relay import DirectoryChange, Relay
from relay.stores import DOCUMENT, StoreState, StoreStatus
from relay.stores.bigsegments import Metadata
from relay.streams.hub import Hub
from relay.telemetry import process
from relay.telemetry.log import LogHandler
from relay.telemetry.traffic import (
    MAX_USER_AGENT,
    MAX_USER_AGENTS,
    OTHER,
    RequestLabels,
    RequestMetrics,
)
from relay.telemetry.workers import WorkerStatus
from relay.upstream import Upstream
from relay.web.endpoints import metrics
from tests.support.contracts import MemoryMirror, ScriptedSource
from tests.support.figures import samples
from tests.support.serving import SDK_KEY, Served, Stream, ask, serving, until

OPERATIONS = (Path(__file__).parent.parent.parent.parent / "docs/operations.md").read_text()
SDK = ("Authorization", SDK_KEY)
PUT = b'{"path":"/","data":{"flags":{"lamp":{"key":"lamp","version":1}}}}'
PATCH = b'{"path":"/flags/lamp","data":{"key":"lamp","version":2}}'
FEW = 20
"""Number of environments of a small site."""


def environment(name: str, mirrors: Sequence[MemoryMirror] = ()) -> Environment:
    spec = EnvironmentSpec(name, SDKKey(f"sdk-{name}"), environment_id=EnvironmentID(f"id-{name}"))
    hub = Hub({"all": AllFormat(), "flags": FlagsFormat()})
    return Environment(spec, ScriptedSource(), hub, logging.getLogger("test"), mirrors)


class Page:
    """Samples of a page, as read by Prometheus' own library."""

    def __init__(self, page: bytes) -> None:
        self.samples = samples(page)

    def __call__(self, name: str, **labels: str) -> float | None:
        """Return the only value with these labels, and perhaps others; None without one."""
        values = [
            s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()
        ]
        assert len(values) <= 1, values
        return values[0] if values else None


def own_page(relay: Relay, traffic: RequestMetrics | None = None) -> Page:
    return Page(metrics.page(relay, traffic or RequestMetrics()).body)


def exporter_page(
    relay: Relay, traffic: RequestMetrics, prefix: str = "launchdarkly_relay"
) -> Page:
    return Page(metrics.exporter_page(relay, traffic, prefix).body)


def test_the_documentation_lists_every_metric_and_no_other():
    """Its table is the one made from the declarations."""
    (table,) = re.findall(r"(?s)<!-- metrics table -->\n(.*?)<!-- end -->", OPERATIONS)
    assert table == catalogue.table()


def test_the_documentation_states_the_bounds_of_clients():
    """They are those of the code."""
    assert f"up to {MAX_USER_AGENT} characters" in OPERATIONS
    assert f"the first {MAX_USER_AGENTS} clients" in OPERATIONS


def test_names_follow_the_rules():
    """Names and labels are unique, and exactly the counters end in `_total`."""
    declared = [*catalogue.OWN, *catalogue.ld_relay_metrics("launchdarkly_relay")]
    names = [metric.name for metric in declared]
    assert len(set(names)) == len(names)
    for metric in declared:
        assert re.fullmatch(r"[a-z_]+", metric.name)
        assert len(set(metric.labels)) == len(metric.labels)
        assert not metric.help.startswith(" ")
        assert "|" not in metric.help
    for metric in catalogue.OWN:
        assert metric.name.endswith("_total") == (metric.kind == "counter")


class KnownDirectory:
    """A directory that knows all environments."""

    is_upstream = True

    def __init__(self) -> None:
        self.connection = UpstreamConnection(ConnectionState.VALID, last_confirmed=time.monotonic())
        self.known = asyncio.Event()
        self.changes: Counter[DirectoryChange] = Counter()
        self.invalid_entries = {("environment", "id-beta"): "version is not an integer"}

    async def run(self, relay: Relay) -> None:
        raise NotImplementedError


class EmptyBigSegmentStore:
    """A database in which everything is synchronised, and nobody is a member."""

    label = "a test's store"
    lease_lifetime = 1.0

    async def metadata(self):
        return Metadata("v1", time.time())

    async def memberships(self, hashes):
        return [{} for _ in hashes]


async def used_big_segments() -> BigSegments:
    """Big segments that an evaluation has looked at."""
    store, log = EmptyBigSegmentStore(), logging.getLogger("relay.env.main")
    big_segments = BigSegments(store, log)
    lease = StoreLease(store, big_segments.look, log)
    big_segments.synchroniser = Synchroniser(None, store, None, None, lease=lease, log=log)
    big_segments.start(synchronise=False)
    await big_segments.memberships(["anna"])
    return big_segments


class Leader:
    """Part of a relay that leads its environment in a fleet."""

    status = FleetStatus(Role.LEADER, "this", 3, 7, 0, 0.0, 1, 1, {"published": 7})

    def change_upstream(self, upstream):
        raise NotImplementedError


async def test_a_busy_relay_exports_every_metric():
    """A directory, and an environment with everything that it can have, export the declared metrics and no others."""
    mirror = MemoryMirror()
    mirror.status = StoreStatus(StoreState.VALID, 0.0, "redis", "redis://h", "p")
    document = MemoryMirror()
    document.status = StoreStatus(StoreState.VALID, 0.0, DOCUMENT, "s3://b", "LD-Env-1")
    main = environment("main", [mirror, document])
    main.payload, main.connection.last_confirmed = Payload.of([]), time.monotonic()
    main.big_segments = await used_big_segments()
    main.journal.counter(MISSING).add()
    main._source.protocol = "fdv2"
    traffic = RequestMetrics()
    series = RequestLabels("main", "/all", "GET", "server")
    for counts in (traffic.requests, traffic.new_streams, traffic.streams):
        counts[series].value += 1
    upstream = Upstream()
    forwarder = Forwarder(MemorySpool(Limits()), upstream, "http://h", {"main": main.spec}.get)
    main.spec = main.spec.with_credential(SDKKey("sdk-old"), clock.now() + 60)
    directory = KnownDirectory()
    main.fleet = Leader()
    relay = Relay([main], 0, events=forwarder, directory=directory)
    relay.workers[0] = WorkerStatus(0, 4711, clock.unix(), resident=1, files=1)
    page = exporter_page(relay, traffic)
    suffix = re.compile("_(bucket|sum|count)$")
    seen = {s.name if s.name.endswith("_total") else suffix.sub("", s.name) for s in page.samples}
    assert seen == {
        f.name for f in (*catalogue.OWN, *catalogue.ld_relay_metrics("launchdarkly_relay"))
    }


async def test_metrics_of_an_environment():
    """State of upstream and database, age and size of the data, and unusable items."""
    silent, reporting = MemoryMirror(), MemoryMirror()
    bad = InvalidItem(Kind.FLAG, "bad", "not JSON")
    reporting.status = StoreStatus(
        StoreState.INTERRUPTED, 0.0, "redis", "redis://h", "p", (bad, bad)
    )
    main, empty = environment("main", [silent, reporting]), environment("empty")
    main.connection.enter(ConnectionState.VALID)
    main.connection.last_confirmed = time.monotonic() - 90
    main.payload = Payload.of([Item(Kind.FLAG, "a", 1, b"{}"), Item(Kind.FLAG, "b", 1, None)])
    main.invalid, main.rejected, main.changes = {(Kind.FLAG, "bad"): bad}, 3, 4
    page = own_page(Relay([main, empty], 0))
    assert page("relay_upstream_state", environment="main", state="VALID") == 1
    assert page("relay_upstream_state", environment="main", state="OFF") == 0
    assert page("relay_upstream_state", environment="empty", state="INITIALIZING") == 1
    database = {"environment": "main", "database": "redis"}
    assert page("relay_store_state", **database, state="INTERRUPTED") == 1
    assert page("relay_store_state", **database, state="VALID") == 0
    assert page("relay_store_unreadable_items", **database) == 2
    assert page("relay_store_unreadable_items", environment="empty") is None
    age = page("relay_data_age_seconds", environment="main")
    assert age is not None
    assert 90 <= age < 100
    assert page("relay_data_age_seconds", environment="empty") is None
    assert page("relay_items", environment="main", kind="flag") == 2
    assert page("relay_items", environment="main", kind="segment") == 0
    assert page("relay_items", environment="empty", kind="flag") is None
    assert page("relay_invalid_items", environment="main") == 1
    assert page("relay_rejected_total", environment="main") == 3
    assert page("relay_changes_total", environment="main") == 4
    assert page("relay_build_info", version=__version__) == 1


async def test_metrics_of_the_process():
    """CPU, memory, open files and start time are plausible; an opened file is counted."""
    before = own_page(Relay([], 0))
    with closing(socket.socket()):
        after = own_page(Relay([], 0))
    assert after("process_open_fds") == before("process_open_fds") + 1
    assert after("process_cpu_seconds_total") > before("process_cpu_seconds_total") > 0
    assert 1e7 < after("process_resident_memory_bytes") < 1e10
    assert after("process_max_fds") > after("process_open_fds")
    assert after("process_start_time_seconds") == before("process_start_time_seconds")
    assert 0 < time.time() - after("process_start_time_seconds") < 3600


def test_without_proc_metrics_are_omitted(monkeypatch, tmp_path):
    """Without `/proc` the page omits what it cannot measure."""
    monkeypatch.setattr(process, "_SELF", tmp_path / "none")
    process.started.cache_clear()
    try:
        page = own_page(Relay([], 0))
        assert page("process_open_fds") is None
        assert page("process_start_time_seconds") is None
        assert page("process_cpu_seconds_total") > 0
    finally:
        process.started.cache_clear()


def test_open_files_are_counted_on_older_kernels(monkeypatch, tmp_path):
    """Where the folder of descriptors has no size, its entries are counted."""
    folder = tmp_path / "fd"
    folder.mkdir()
    for name in "012":
        (folder / name).touch()
    monkeypatch.setattr(process, "_SELF", tmp_path)
    assert process.open_files() in {3, folder.stat().st_size}
    monkeypatch.setattr(Path, "stat", lambda _: type("Stat", (), {"st_size": 0}))
    assert process.open_files() == 3


def test_lost_log_lines_are_counted():
    """Log lines that could not be written are counted."""
    output = LogHandler()
    root = logging.getLogger()
    root.addHandler(output)
    try:
        before = own_page(Relay([], 0))("relay_log_lines_lost_total")
        output.emit(logging.LogRecord("x", logging.INFO, "", 0, "%d", ("no number",), None))
        assert own_page(Relay([], 0))("relay_log_lines_lost_total") == before + 1
    finally:
        root.removeHandler(output)
        output.close()


@pytest.mark.parametrize("front", [True, False])
async def test_traffic_by_client(front):
    """ld-relay's metrics count by client, with `_` for `/`; closed streams are subtracted."""
    served = Served()
    agent = ("X-LaunchDarkly-User-Agent", "PythonClient/9.18.0")
    general = ("User-Agent", "curl/8.5")
    async with serving(served, front=front) as address:
        await served.source.give(fdv1.parse("put", PUT))
        for headers in ([SDK, agent, general], [SDK, general], [SDK, general], [SDK]):
            await ask(address, "/sdk/flags/lamp", headers)
        await ask(address, "/mping", [SDK])
        lines = [": ".join(agent)]
        streams = [await Stream.open(address, path, lines) for path in ("/all", "/all", "/flags")]
        page = exporter_page(served.relay, served.traffic)
        python = {"env": "main", "platformCategory": "server", "userAgent": "PythonClient_9.18.0"}
        route = {"route": "_sdk_flags_{key}", "method": "GET"}
        assert page("launchdarkly_relay_requests", **python, **route) == 1
        assert page("launchdarkly_relay_requests", **python, route="_all") == 2
        assert page("launchdarkly_relay_requests", userAgent="curl_8.5", **route) == 2
        assert page("launchdarkly_relay_requests", userAgent="_", **route) == 1
        assert page("launchdarkly_relay_connections", **python) == 3
        assert page("launchdarkly_relay_newconnections", **python) == 3
        assert page("relay_streams", environment="main", stream="all") == 2
        assert page("relay_streams", environment="main", stream="flags") == 1
        assert page("relay_new_streams_total", environment="main", route="/all") == 2
        own = {"environment": "main", "platform": "server", "method": "GET"}
        assert page("relay_requests_total", **own, route="/sdk/flags/{key}") == 4
        for stream in streams[1:]:
            stream.close()
        await until(lambda: len(served.hub) == 1)
        page = exporter_page(served.relay, served.traffic)
        assert page("launchdarkly_relay_connections", **python) == 1
        assert page("launchdarkly_relay_newconnections", **python) == 3
        streams[0].close()
        await until(lambda: len(served.hub) == 0)
    assert (
        exporter_page(served.relay, served.traffic)("launchdarkly_relay_connections", **python) == 0
    )


async def test_routes_that_ld_relay_does_not_count():
    """ld-relay's `requests` omit `/mping`; the relay's own metric includes it."""
    traffic = RequestMetrics()
    traffic.requests[RequestLabels("main", "/mping", "GET", "mobile")].value = 5
    page = exporter_page(Relay([], 0), traffic)
    assert page("launchdarkly_relay_requests") is None
    assert page("relay_requests_total", route="/mping") == 5


async def test_clients_of_one_name_are_one_series():
    """Clients with equal labels are added up: a repeated series would invalidate the page."""
    traffic = RequestMetrics()
    for name in ("a/b", "a_b"):
        for counts in (traffic.requests, traffic.streams):
            counts[RequestLabels("main", "/all", "GET", "server", name)].value = 2
    page = exporter_page(Relay([], 0), traffic)
    assert page("launchdarkly_relay_requests", userAgent="a_b") == 4
    assert page("launchdarkly_relay_connections", userAgent="a_b") == 4


def test_the_prefix():
    """It applies to ld-relay's metrics only, and defaults to ld-relay's."""
    for prefix, start in (("my", "my_"), ("", "launchdarkly_relay_")):
        page = metrics.exporter_page(Relay([], 0), RequestMetrics(), prefix).body.decode()
        own = [name for name in re.findall(r"# TYPE (\S+)", page) if name.startswith(start)]
        assert own == [start + name for name in ("connections", "newconnections", "requests")]


@pytest.mark.parametrize("front", [True, False])
async def test_names_of_clients_are_bounded_and_clean(front):
    """Surplus names share a series, long ones are cut, and keys are masked."""
    served = Served()
    async with serving(served, front=front) as address:
        await ask(address, "/sdk/flags", [SDK, ("User-Agent", f'x {SDK_KEY} \u00e9\u009f\\"')])
        await ask(address, "/sdk/flags", [SDK, ("User-Agent", "y" * 500)])
        for number in range(MAX_USER_AGENTS + 20):
            await ask(address, "/sdk/flags", [SDK, ("User-Agent", f"name {number}")])
    page = metrics.exporter_page(served.relay, served.traffic, "launchdarkly_relay").body
    assert SDK_KEY.encode() not in page
    assert SDK_KEY[5:20].encode() not in page
    agents = {s.labels["userAgent"] for s in Page(page).samples if "userAgent" in s.labels}
    assert len(agents) == MAX_USER_AGENTS + 1
    assert max(map(len, agents)) <= MAX_USER_AGENT
    assert (
        exporter_page(served.relay, served.traffic)("launchdarkly_relay_requests", userAgent=OTHER)
        == 22
    )


@pytest.mark.parametrize("front", [True, False])
async def test_delivery_is_timed(front):
    """A change is timed until the last open stream has it; without streams it is not timed."""
    served = Served()
    async with serving(served, front=front) as address:
        await served.source.give(fdv1.parse("put", PUT))
        assert own_page(served.relay)("relay_change_delivery_seconds_count") == 0
        stream = await Stream.open(address)
        await stream.until(b"\n\n")
        begin = time.monotonic()
        await served.source.give(fdv1.parse("patch", PATCH))
        await stream.until(b"\n\n")
        page = own_page(served.relay)
        assert page("relay_changes_total", environment="main") == 2
        assert page("relay_change_delivery_seconds_count", environment="main") == 1
        total = page("relay_change_delivery_seconds_sum", environment="main")
        assert total is not None
        assert 0 < total < time.monotonic() - begin
        stream.close()


@pytest.mark.parametrize("front", [True, False])
async def test_the_page(front):
    """GET and HEAD are served without a credential, and without ld-relay's metrics."""
    served = Served()
    async with serving(served, front=front) as address:
        get, head, post = [
            await ask(address, "/metrics", method=method) for method in ("GET", "HEAD", "POST")
        ]
    assert (get.status, head.status, post.status) == (200, 200, 405)
    assert get.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert Page(get.body)("relay_streams", environment="main", stream="all") == 0
    assert b"launchdarkly" not in get.body
    assert post.headers["allow"] == "GET, HEAD"


async def test_the_work_of_a_page_grows_with_the_environments_and_not_faster():
    """The cost is linear even with every kind of client in every environment."""
    few, many = scrape_time(FEW), scrape_time(10 * FEW)
    # There are ten times as many environments; a quadratic cost would be a hundred times as high.
    assert many < 30 * few


def scrape_time(environments: int) -> float:
    """Return the CPU seconds of one page, the best of seven."""
    served, traffic = [], RequestMetrics()
    for number in range(environments):
        mirror = MemoryMirror()
        mirror.status = StoreStatus(StoreState.VALID, 0.0, "redis", "redis://h", "p")
        one = environment(f"environment {number}", [mirror])
        one.payload, one.connection.last_confirmed = Payload.of([]), time.monotonic()
        served.append(one)
        for agent in ("PythonClient/9.18.0", "NodeJSClient/9.9.1", "Go/1"):
            for route in ("/all", "/sdk/flags", "/sdk/latest-all"):
                series = RequestLabels(one.spec.name, route, "GET", "server", agent)
                for counts in (traffic.requests, traffic.new_streams, traffic.streams):
                    counts[series].value += 1
    relay = Relay(served, 0)
    times = []
    for _ in range(7):
        begin = time.process_time()
        metrics.exporter_page(relay, traffic, "launchdarkly_relay")
        times.append(time.process_time() - begin)
    return min(times)


async def test_published_documents_are_told_apart_from_databases():
    """By their URLs, as there may be several."""
    mirrors = []
    for url, state in (("s3://b", StoreState.VALID), ("file:///d", StoreState.INTERRUPTED)):
        mirrors.append(MemoryMirror())
        mirrors[-1].status = StoreStatus(state, 0.0, DOCUMENT, url, "LD-Env-1")
    page = own_page(Relay([environment("main", mirrors)], 0))
    where = {"environment": "main", "url": "file:///d"}
    assert page("relay_publication_state", **where, state="INTERRUPTED") == 1
    assert page("relay_publication_state", **where, state="VALID") == 0
    assert page("relay_publication_state", **(where | {"url": "s3://b"}), state="VALID") == 1
    assert page("relay_store_state", environment="main", database=DOCUMENT, state="VALID") is None
