"""The measuring clients and the scripted upstream understand each other."""

import base64
import gzip
import json
import math
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit
from xml.etree import ElementTree as ET

import pytest

from bench import data, posts
from bench.__main__ import listed
from bench.axes import axes
from bench.cold_start.__main__ import measure, measure_starts
from bench.cold_start.burst import Run, Setup, standing_ready
from bench.cold_start.companions import Companions, overhear
from bench.cold_start.plot import svg
from bench.cold_start.results import Burst, Results, Scene, judged, verdicts
from bench.cold_start.results import markdown as markdown_of_bursts
from bench.cold_start.ways import (
    DIRECT_POLL,
    DIRECT_STREAM,
    LATENCY,
    PEER_STREAM,
    RELAY_STREAM,
    ways,
)
from bench.crowd import Crowd
from bench.databases import DATABASES, Valkey, until_stored
from bench.environments import await_all
from bench.evaluations import ENVIRONMENT_ID, poll_path, stream_path
from bench.fleet import Fleet, check_feed, missing_figures, watched
from bench.fleetload import Members, entries_of
from bench.machine import CORES
from bench.polls import Client
from bench.replicas import FLAG, Replicas
from bench.servers import OWN_COMMAND, POLL, SDK_KEY, Relay, Session
from bench.table import NGINX, OURS, PEER, Figures, Row, at_least, at_most, markdown
from bench.upstream import Upstream, event
from bench.viewers import Viewers
from bench.workers import on_cores, serving
from relay.evaluation.compiled.program import FlagCompiler, Program
from relay.protocol.bigsegments import PatchReader
from relay.web.contexts import context_in_path
from tests.evaluation.strategies import payload_of
from tests.support.sdk import install_packages


def test_a_crowd_sees_puts_and_patches_of_its_environment() -> None:
    """Every client of a crowd has the first put, and later the last patch of a burst."""
    with Upstream({"sdk-one": "100k", "sdk-two": "2k"}) as upstream:
        port = urlsplit(upstream.url).port
        assert port
        with Crowd(port, "sdk-one", 20) as crowd:
            assert crowd.connect(timeout=10) > 0
            upstream.patch("sdk-two", 2, "not-for-this-crowd")
            sent = upstream.patch("sdk-one", 2, "the-marker", count=5)
            times = crowd.expect("the-marker", timeout=10)
            assert len(times) == 20
            assert times[-1] > sent


def test_a_stream_with_an_unknown_key_is_refused() -> None:
    """The scripted upstream answers 401 for a key that it was not given."""
    with Upstream({"sdk-one": "2k"}) as upstream:
        client = Client(upstream.url, {"Authorization": "sdk-other"})
        assert client.get("/all").status == 401
        client.close()


@pytest.mark.parametrize("name", DATABASES)
def test_a_relay_keeps_each_database_that_is_measured(name: str) -> None:
    """Their clients see what a relay writes, and what it asks is counted."""
    with DATABASES[name]() as database:
        assert database.versions("bench") == []
        variables = {**database.variables, "LD_PREFIX_main": "bench", "LD_PREFIX_small": "small"}
        with Relay(OURS, OWN_COMMAND, variables).serve("2k") as session:
            flags = [data.flag_key(index) for index in range(3)]
            until_stored(database, "bench", flags, 1)
            before = database.requests()
            upstream = session.upstream
            assert upstream
            upstream.change(SDK_KEY, data.flag(flags[0], 2, 500))
            deadline = time.monotonic() + 10
            while database.version("bench", flags[0]) < 2:
                assert time.monotonic() < deadline
            assert database.requests() > before
        database.write("other", flags[0], 7)
        assert database.version("other", flags[0]) == 7
        assert database.versions("other") == []


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("2k", 1_900, 2_300),
        ("100k", 95_000, 105_000),
        ("570k", 550_000, 590_000),
        ("2m", 2_000_000, 2_200_000),
        ("2m-known", 2_000_000, 2_200_000),
    ],
)
def test_data_sets_have_the_size_in_their_name(name: str, least: int, most: int) -> None:
    """A put is as long as its data set's name says, and holds the flags under their keys."""
    put = data.put(name)
    assert least <= len(put) <= most
    flags = json.loads(put)["data"]["flags"]
    assert all(flag["key"] == key for key, flag in flags.items())


@pytest.mark.parametrize(("name", "patches"), [("eval-big", 10), ("million", 1000), ("2k", 0)])
def test_big_segments_come_once_in_patches_that_follow_each_other(name: str, patches: int) -> None:
    """The first poll has all of them, for segments of the data set, and the next one none."""
    with Upstream({"sdk-one": name}) as upstream:
        client = Client(upstream.url, {"Authorization": "sdk-one"})
        reader = PatchReader()
        answer = client.get("/sdk/big-segments/revisions").body
        received = [patch for patch in (*reader.feed(answer), *reader.finish()) if patch]
        again = client.get("/sdk/big-segments/revisions?after=v1").body
        client.close()
    assert again == b"[]"
    assert len(received) == patches
    assert all(before.version == patch.previous_version for before, patch in pairwise(received))
    segments = data.everything(name)["segments"]
    references = {f"{key}.g{each['generation']}" for key, each in segments.items()}
    assert {patch.segment_id for patch in received} == references


def test_every_axis_has_a_name_and_figures_of_its_own() -> None:
    """No figure of one axis overwrites another's."""
    figures = [row.figure for axis in axes() for row in axis.rows]
    assert len(figures) == len(set(figures))
    assert len({axis.name for axis in axes()}) == len(axes())


def test_goals_are_judged_on_medians_and_only_where_both_sides_were_measured() -> None:
    """A missed goal shows as **no**, an unmeasured one as a dash."""
    rows = [
        Row("polls", "req/cpu-s", (at_least(5, PEER), at_least(0.9, NGINX))),
        Row("memory", "MB", (at_most(90),)),
        Row("patch", "ms", (at_most(0.75, PEER),)),
    ]
    figures = Figures()
    for polls in (1.0, 60.0, 55.0):
        figures.add(OURS, {"polls": polls, "memory": 91, "patch": 3})
    figures.add(PEER, {"polls": 10})
    figures.add(NGINX, {"polls": 50})
    polls, memory, patch = markdown(rows, figures).splitlines()[2:]
    assert polls.split(" | ")[2:] == ["10", "55", "5.5×", "50", "≥ 5× and ≥ 0.9× nginx", "yes |"]
    assert memory.endswith("| ≤ 90 MB | **no** |")
    assert patch.endswith("| ≤ 0.75× | – |")


def test_a_mailbox_refuses_until_it_is_opened_and_counts_distinct_events() -> None:
    """Posts at a pace all arrive; an event that comes twice counts once, its bytes twice."""
    with Upstream({"sdk-one": "2k"}) as upstream:
        url = f"{upstream.events_url}/bulk"
        with pytest.raises(ConnectionRefusedError):
            posts.post(url, {}, lambda _: b"[]", seconds=0.1, rate=10)
        opened = upstream.open_mailbox(keep=True)
        made = posts.post(
            url, {}, lambda number: data.numbered_event(number % 20, 1000), seconds=0.2, rate=200
        )
        arrived = upstream.arrived(events=True)
        assert (made.requests, arrived.size, arrived.events) == (40, 40_000, 20)
        assert arrived.repeated == 20
        assert arrived.last > opened


def test_a_mailbox_counts_what_comes_again_under_its_payload_id_once() -> None:
    """LaunchDarkly knows a payload by its id, so a post that is repeated does no harm."""
    with Upstream({"sdk-one": "2k"}) as upstream:
        upstream.open_mailbox(keep=True)
        parts = urlsplit(upstream.events_url)
        connection = HTTPConnection(parts.hostname or "", parts.port)
        for payload in ("one", "one", "two"):
            headers = {"X-LaunchDarkly-Payload-ID": payload}
            connection.request("POST", "/bulk", data.numbered_event(7, 500), headers)
            assert connection.getresponse().read() == b""
        connection.close()
        arrived = upstream.arrived(events=True)
        assert (arrived.events, arrived.repeated) == (1, 1)


def test_a_compressed_post_counts_with_the_size_of_its_content() -> None:
    """A relay that compresses delivers as much as one that does not."""
    with Upstream({"sdk-one": "2k"}) as upstream:
        upstream.open_mailbox()
        body = gzip.compress(data.events())
        posts.post(f"{upstream.events_url}/bulk", {}, lambda _: body, seconds=0.1, rate=20)
        assert upstream.arrived().size == 2 * len(data.events())


def test_busy_clients_post_events_of_the_usual_size() -> None:
    """All events that the busy clients say they have posted have arrived."""
    assert 6_800 <= len(data.events()) <= 7_200
    assert len(json.loads(data.events())) == data.EVENTS
    with Upstream({"sdk-one": "2k"}) as upstream:
        upstream.open_mailbox()
        made = posts.load(f"{upstream.events_url}/bulk", {}, data.events(), 1)
        assert made.requests > 0
        assert upstream.arrived().size >= made.requests * len(data.events())


@pytest.mark.parametrize("name", ["eval-1000", "eval-3", "eval-rules"])
def test_mixed_flags_are_of_each_kind_as_many_as_said(name: str) -> None:
    """All are visible to client-side SDKs, and long enough to be waited for by size."""
    flags, counts = data.flags(name).values(), data.SIZES[name].mixed
    assert counts
    rollouts = sum("rollout" in each["fallthrough"] for each in flags)
    ruled = sum(bool(each["rules"]) for each in flags)
    assert len(flags) == sum(counts.values()) == data.SIZES[name].flags
    assert rollouts == counts["rollout"]
    assert len(flags) - rollouts - ruled == counts["constant"]
    assert all(each["clientSideAvailability"]["usingEnvironmentId"] for each in flags)
    assert min(len(data.compact(each)) for each in flags) >= 400


def test_rule_heavy_flags_ask_for_segments_that_are_there() -> None:
    """Rules are over three attributes, with four values each, and few flags have equal ones."""
    everything = data.everything("eval-rules")
    rules = [rule for flag in everything["flags"].values() for rule in flag["rules"]]
    clauses = [clause for rule in rules for clause in rule["clauses"]]
    named = [clause["values"][0] for clause in clauses if clause["op"] == "segmentMatch"]
    assert len(named) == 50
    assert set(named) <= everything["segments"].keys()
    others = [clause for clause in clauses if clause["op"] != "segmentMatch"]
    operators = {(clause["attribute"], clause["op"]) for clause in others}
    assert operators == {("country", "in"), ("email", "endsWith"), ("appVersion", "startsWith")}
    assert {len(clause["values"]) for clause in others} == {4}
    assert len({data.compact(clause) for clause in others}) > 0.9 * len(others)
    assert data.everything("eval-1000")["segments"] == {}


def test_few_of_many_rules_match_a_context() -> None:
    """Some match every context, and hardly two contexts have the same flags."""
    library = FlagCompiler(payload_of(data.everything("eval-rules")))
    flags = {key: library.flag(key) for key in library.payload.flags}
    program = Program({key: flag for key, flag in flags.items() if flag is not None}, 1)
    ruled = [key for key, each in data.flags("eval-rules").items() if each["rules"]]
    contexts = data.CONTEXTS["eval-rules"]
    seen = []
    for number in range(10**6, 10**6 + 200):
        context = context_in_path(contexts.in_base64(number).encode())
        entries = program.some(context, ruled, with_reasons=False)
        seen.append(tuple(json.loads(entry)["variation"] for entry in entries.values()))
    assert len(set(seen)) > 190
    assert 5 < sum(map(sum, seen)) / len(seen) < 30


@pytest.mark.parametrize("name", data.CONTEXTS)
def test_a_context_is_put_together_of_the_base64_of_its_parts(name: str) -> None:
    """The parts that wrk joins equal the encoding of the whole."""
    number, contexts = 123_456_789, data.CONTEXTS[name]
    parts = (each[number % len(each)] for each in contexts.parts)
    digits = "".join(map(data.base64url, ("123", "456", "789")))
    whole = contexts.in_base64(number)
    assert digits.join(map(data.base64url, parts)) == whole
    padding = "=" * (-len(whole) % 4)
    assert json.loads(base64.urlsafe_b64decode(whole + padding))["key"] == "user-123456789"


@pytest.mark.parametrize("evaluating", ["false", "true"])
def test_viewers_have_a_changed_flag_by_a_poll_or_in_their_stream(evaluating: str) -> None:
    """A ping leads to a poll, in which the change is; an evaluating stream has it itself."""
    variables = {"LD_CLIENT_SIDE_ID_main": ENVIRONMENT_ID, "EVAL_STREAMS": evaluating}
    with Relay("ours", OWN_COMMAND, variables).serve("eval-3") as session:
        session.await_status(poll_path(0))
        upstream = session.upstream
        assert upstream
        with Viewers(session.port, 20, stream_path, poll_path) as viewers:
            viewers.connect(timeout=20)
            sent = upstream.change(SDK_KEY, data.rollout_flag(0, 2, "the-marker"))
            assert viewers.expect("the-marker", timeout=20) > sent


def test_a_relay_is_told_its_environments_and_a_rotation() -> None:
    """It serves those listed first, one that is added, and ends the streams of an old key."""
    variables = {"EXPIRED_CREDENTIAL_CLEANUP_INTERVAL": "100ms"}
    with Relay("ours", OWN_COMMAND, variables).serve("28k", automatic=2) as session:
        await_all(session, 2)
        upstream = session.upstream
        assert upstream
        upstream.environment("28k", data.environment("added", "sdk-added"))
        with Crowd(session.port, SDK_KEY, 5) as old, Crowd(session.port, "sdk-added", 5) as other:
            old.connect(timeout=20)
            _await_status(session, "sdk-added", 200)
            other.connect(timeout=20)
            expiry = int(time.time() * 1000) + 300
            rotated = data.environment(SDK_KEY, "sdk-new", 2, (SDK_KEY, expiry))
            upstream.environment("28k", rotated)
            _await_status(session, "sdk-new", 200)
            _await_status(session, SDK_KEY, 401)
            assert other.ended() == 0
            until = time.monotonic() + 10
            while (ended := old.ended()) < 5 and time.monotonic() < until:
                time.sleep(0.01)
            assert ended == 5


def test_arrivals_are_when_bytes_came_and_not_when_they_are_read() -> None:
    """A client that comes for another one after a patch was sent does not count."""
    with Upstream({"sdk-one": "2k"}) as upstream:
        port = urlsplit(upstream.url).port
        assert port
        with Crowd(port, "sdk-one", 10, stamped=True) as crowd:
            crowd.connect(timeout=10)
            sent = upstream.patch("sdk-one", 2, "the-marker")
            crowd.replace()
            time.sleep(0.5)
            times = crowd.arrivals("the-marker", sent, timeout=10)
            assert len(times) == 9
            assert all(sent <= each < sent + 0.4 for each in times)


def test_upstream_tells_its_connections_and_new_ones_begin_with_changes() -> None:
    """Each stream that opens or closes is noted with its time."""
    with Upstream({SDK_KEY: "2k"}) as upstream:
        port = urlsplit(upstream.url).port
        assert port
        assert upstream.connections(SDK_KEY) == []
        with Crowd(port, SDK_KEY, 1) as before:
            before.connect(timeout=10)
            upstream.change(SDK_KEY, data.flag(data.flag_key(0), 7, 500))
            with Replicas([port]) as replicas:
                (client,) = replicas.clients
                _until(lambda: client.versions == [7])
                assert [number for _, number in upstream.connections(SDK_KEY)] == [1, 2]
            _until(lambda: upstream.connections(SDK_KEY)[-1][1] == 1)
        times = [when for when, _ in upstream.connections(SDK_KEY)]
        assert times == sorted(times)


def test_a_replica_knows_since_when_it_has_a_version_and_whether_it_went_back() -> None:
    """A version counts as had with a newer one, and as late as it is missing."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Replicas([listener.getsockname()[1]]) as replicas,
    ):
        (client,) = replicas.clients
        stream, _ = listener.accept()
        for version in (2, 5, 3):
            stream.sendall(event("put", data.compact({"data": _flags(version)})))
        _until(lambda: client.back == 1)
        assert client.versions == [2, 5]
        assert client.has_at(3) == client.has_at(5) == client.times[1]
        assert client.has_at(6) == math.inf
        sent = {2: client.times[0] - 1, 3: client.times[1] - 2, 6: client.times[1] + 10}
        assert client.longest_wait(sent, 0, client.times[1]) == pytest.approx(2)
        stream.close()
        again, _ = listener.accept()
        for version in (4, 6):
            again.sendall(event("put", data.compact({"data": _flags(version)})))
        _until(lambda: client.versions == [2, 5, 6])
        assert (client.back, client.began_older) == (1, 1)
        again.close()


def _flags(version: int) -> dict[str, Any]:
    return {"flags": {FLAG: data.flag(FLAG, version, 500)}}


@pytest.mark.timing
def test_a_fleet_has_one_connection_and_another_leader_when_one_is_killed() -> None:
    """Its clients see each change, and its feed in Redis has no break."""
    with Fleet(Relay(OURS, OWN_COMMAND), 2) as fleet:
        leader = fleet.leader()
        with watched(fleet) as (changes, clients):
            fleet.restart(leader)
            other = fleet.leader()
            version = changes.next_after(time.monotonic())
            _until(lambda: all(each.has_at(version) < math.inf for each in clients))
            assert missing_figures(fleet, other) == 0
        assert not sum(each.back for each in clients)
        broken, terms = check_feed(fleet.database)
        assert broken == 0
        assert terms >= 1
        assert fleet.upstream.connections(SDK_KEY)[-1][1] == 1


def test_members_without_clients_lead_and_follow_and_publish_what_changes() -> None:
    """As many as were started look at Redis, and each environment has one leader."""
    with Valkey() as database, Members(database, 2, "2k", 2, (1,)) as members:
        assert members.roles() == [2, 2, 0, 2]
        before = entries_of(database)
        members.change(20)
        _until(lambda: entries_of(database) > before + 10)
        assert 0 < members.read() < 10


def test_workers_share_the_work_and_the_peer_gets_two_threads() -> None:
    """Each of two workers serves, on all cores."""
    with serving(Relay(OURS, OWN_COMMAND), "2k", 2) as session:
        client = session.client()
        status = json.loads(client.get("/status").body)
        client.close()
        assert [each["state"] for each in status["workers"]] == ["VALID", "VALID"]
        assert os.sched_getaffinity(session.process.pid) == set(CORES)
    relay = on_cores(Relay(PEER, "other"), 2)
    assert relay.variables["GOMAXPROCS"] == "2"


def test_the_list_of_axes_names_rows_with_their_goals() -> None:
    """It is printed without measuring anything."""
    text = listed([axis for axis in axes() if axis.name == "put"])
    assert text == "put\n    put of 2 MB → served (ms): ≤ 1×"


def _until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def _await_status(session: Session, sdk_key: str, status: int) -> None:
    client, until = session.client(sdk_key), time.monotonic() + 10
    while client.get(POLL).status != status:
        assert time.monotonic() < until
        time.sleep(0.01)
    client.close()


def test_a_stream_has_ended_with_its_last_chunk_or_its_connection() -> None:
    """A server that keeps the connection alive has ended the stream all the same."""
    opened = b"HTTP/1.1 200 OK\r\n\r\n" + event("put", b"{}")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with ThreadPoolExecutor(1) as pool, Crowd(port, "sdk-any", 3) as crowd:
            connected = pool.submit(crowd.connect, 10)
            streams = [listener.accept()[0] for _ in range(3)]
            for stream in streams:
                stream.sendall(opened)
            connected.result()
            assert crowd.ended() == 0
            streams[0].sendall(b"0\r\n\r\n")
            streams[1].close()
            until = time.monotonic() + 10
            while (ended := crowd.ended()) < 2 and time.monotonic() < until:
                time.sleep(0.01)
            assert ended == 2
            for stream in streams:
                stream.close()


@pytest.mark.parametrize("sdk", ["python", "node"])
def test_functions_that_start_together_each_get_a_flag_and_lose_no_event(sdk: str) -> None:
    """Every way but the peer's serves real SDKs; only direct ones ask LaunchDarkly for flags."""
    if sdk == "node":
        install_packages()
    for way in ways(OWN_COMMAND, ""):
        burst = measure(Scene(sdk, 10, 2), way)
        assert (burst.errors, burst.events, burst.sent) == (0, 2, 2), way.name
        direct = way.name in (DIRECT_STREAM, DIRECT_POLL)
        assert burst.asked == (2 if direct else 0), way.name
        least = 2 * LATENCY * 1e3 if direct else 0
        assert least < burst.p50_ms <= burst.p99_ms < burst.total_p99_ms, way.name


@pytest.mark.parametrize("sdk", ["python", "node"])
def test_functions_that_start_one_by_one_have_companions_that_ask_as_they_do(sdk: str) -> None:
    """Each gets its flag, and LaunchDarkly is asked by the others, too, where there is no relay."""
    if sdk == "node":
        install_packages()
    for way in ways(OWN_COMMAND, ""):
        runs, cpu = measure_starts(Scene(sdk, 10, 5), way, 2)
        assert math.isnan(cpu) != (way.name.startswith("Relay") and 0 <= cpu < 10), way.name
        assert [run.error for run in runs] == ["", ""], way.name
        least = 2 * LATENCY if way.name in (DIRECT_STREAM, DIRECT_POLL) else 0
        assert least < min(run.unhindered for run in runs), way.name


def test_functions_that_get_no_flag_count_as_infinitely_late() -> None:
    """A start that fails or says nothing is no fast one."""
    results, scene = Results(), Scene("python", 10, 1)
    failed = Run(0, first=0.1, queued=0, cpu=0, total=1, error="no flag", closed=True)
    results.add_starts(scene, RELAY_STREAM, [failed], 2, cpu=math.nan)
    starts = results.starts(scene, RELAY_STREAM)
    assert starts is not None
    assert (starts.p99_ms, starts.count, starts.errors) == (math.inf, 0, 2)


def test_companions_ask_what_an_sdk_asks() -> None:
    """So many, each as an instance of its own, all of whom get a whole answer."""
    setup = Setup(SDK_KEY, "", "", stream=True)
    overheard = overhear("python", setup)
    assert overheard.request.startswith(b"GET /all HTTP/1.1\r\n")
    assert 0 < overheard.delay < 10
    with Upstream({SDK_KEY: "100k"}) as upstream:
        companions = Companions(upstream.url, overheard, 3)
        assert companions.size > 80_000
        asked = upstream.asked()
        companions.ask()
        assert upstream.asked() - asked == 3


def test_a_process_that_gets_no_flag_counts_as_an_error() -> None:
    """A relay's refusal of the key shows in the figures, and does not end the measurement."""
    setup = Setup("sdk-unknown", "http://127.0.0.1:9", "http://127.0.0.1:9", stream=False, limit=1)
    with standing_ready("python", setup, 1) as standing:
        runs = standing.let_all_go()
    burst = judged(runs, 1, asked=0, events=0, cpu=math.nan)
    assert burst.errors == 1
    assert math.isnan(burst.p99_ms)


def test_cold_starts_are_judged_and_drawn() -> None:
    """The worst ratio decides; every way that was measured is in the table and the drawing."""
    results = Results()
    for count, peer in ((1, 20.0), (50, 9.0)):
        scene = Scene("python", 1000, count)
        for way, took in ((RELAY_STREAM, 10.0), (PEER_STREAM, peer), (DIRECT_STREAM, 150.0)):
            asked = count if way == DIRECT_STREAM else 0
            cpu = {RELAY_STREAM: 0.1, PEER_STREAM: 1.0}.get(way, math.nan)
            results.add(scene, way, Burst(took, took, took, 0, asked, count, count, cpu))
            run = Run(0, first=took / 1e3, queued=0, cpu=0, total=1, error="", closed=True)
            results.add_starts(scene, way, [run] * 2, 2, cpu=2 * cpu)
    told = {verdict.goal: (verdict.worst, verdict.met) for verdict in verdicts(results)}
    slower = told[f"{RELAY_STREAM}, among others: p99 < {PEER_STREAM}"]
    assert slower == ("1.11× (python, 50 × 1000 flags)", False)
    assert told[f"{RELAY_STREAM}, alone: p99 < {PEER_STREAM}"][1]
    assert told[f"{RELAY_STREAM}, among others: p99 < {DIRECT_STREAM}"][1]
    for how in ("at the same moment", "on one core"):
        assert told[f"{RELAY_STREAM}: CPU ≤ 0.2× reference, {scene}, {how}"] == ("0.10×", True)
    assert "| python | 1000 | 50 | direct, streaming | 150 |" in markdown_of_bursts(results)
    drawing = ET.fromstring(svg(results))
    dots = drawing.findall(".//{*}g/{*}circle")
    assert len(dots) == 6
