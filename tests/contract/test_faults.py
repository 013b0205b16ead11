"""The relay as people run it, while something around it fails.

Each fault has a defined behaviour, one line in the log where trouble begins and one where it ends,
and no effect on other clients and environments. What a single part does is tested beside that part.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest
from aiohttp import web

from relay.server.run import raise_file_limit
from tests.support import upstream as answers
from tests.support.data import all_data, flag, put
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.serving import SDK_KEY, Reply, Stream, ask, stalled_socket
from tests.support.upstream import Answer, ScriptedUpstream

HEALTHY = "sdk-5ca1ab1e-0001-4000-8000-0000000healthy"
WHOLE_WITHIN = 30.0
"""Seconds after which a database that can be reached is whole again."""
FAST = 0.5
"""Seconds that a poll may take on a busy machine of two cores; usually the slowest takes 20 ms."""
FIRST, SECOND = all_data(flag("lamp", 1)), all_data(flag("lamp", 2))
MiB = 1024 * 1024


def relay_of(upstream: ScriptedUpstream, folder: Path, **variables: str) -> RelayProcess:
    """A relay with one environment unless others are named."""
    environments = {"LD_ENV_main": SDK_KEY} if not any("LD_ENV" in v for v in variables) else {}
    given = {"STREAM_URI": upstream.url, "INIT_TIMEOUT": "20s", **environments, **variables}
    return RelayProcess(folder, **given)


async def poll(relay: RelayProcess, key: str = SDK_KEY) -> Reply:
    return await ask(relay.address, "/sdk/latest-all", [("Authorization", key)])


async def page(relay: RelayProcess, path: str) -> tuple[int, dict]:
    """Ask a health page."""
    reply = await ask(relay.address, path)
    return reply.status, json.loads(reply.body)


async def serves(relay: RelayProcess, version: int, key: str = SDK_KEY) -> bool:
    """True if the flag `lamp` has this version."""
    reply = await poll(relay, key)
    return reply.status == 200 and json.loads(reply.body)["flags"]["lamp"]["version"] == version


def lines(relay: RelayProcess, *texts: str) -> list[str]:
    """The log lines that hold all these texts."""
    return [line for line in relay.log.splitlines() if all(text in line for text in texts)]


async def eventually(see: Callable[[], Awaitable[bool]], seconds: float = 15) -> None:
    """Wait for something that has no event of its own."""
    async with asyncio.timeout(seconds):
        while not await see():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def peak_memory(relay: RelayProcess) -> float:
    """The most that it has ever held, in MiB."""
    status = Path(f"/proc/{relay.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    """LaunchDarkly, with one flag for `SDK_KEY`."""
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, FIRST)
        yield upstream


Opener = Callable[..., Awaitable[Stream]]


@pytest.fixture(name="open_stream")
async def opener() -> AsyncIterator[Opener]:
    """Opens streams, which are closed at the end of the test."""
    opened: list[Stream] = []

    async def open_stream(relay: RelayProcess, key: str = SDK_KEY) -> Stream:
        opened.append(await Stream.open(relay.address, key=key))
        return opened[-1]

    yield open_stream
    for stream in opened:
        stream.close()


# LaunchDarkly


@dataclass(frozen=True)
class Fault:
    """A fault of LaunchDarkly in one environment.

    Args:
        answer: to each request.
        reason: what the log says of it; empty while it says nothing.
    """

    answer: Answer
    reason: str


class Stall:
    """Takes requests and does not answer them, until it is given up."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    async def __call__(self, request: web.Request) -> web.Response:
        await self.over.wait()
        answers.abort(request)
        return web.Response()


def faults(stall: Stall) -> dict[str, Fault]:
    """One for each environment that is named like it."""
    return {
        "refused": Fault(answers.status(401), "Upstream refuses the key: HTTP error 401"),
        "unavailable": Fault(answers.status(503), "(will retry): HTTP error 503"),
        "hung-up": Fault(answers.hang_up, "(will retry): the server closed the connection"),
        "half-a-put": Fault(answers.half_a_put(SECOND), "the server closed the stream"),
        "malformed": Fault(answers.body(b"event: put\ndata: {oops\n\n"), "(will retry): put message"),
        "nothing": Fault(answers.body(b'event: put\ndata: {"data":{}}\n\n'), "put message"),
        "loop": Fault(answers.redirect("/all"), "more than 10 redirects"),
        "web-page": Fault(answers.body(b"<p>", "text/html"), "not an event stream"),
        "stalled": Fault(stall, ""),
    }  # fmt: skip


@dataclass
class Sick:
    """A relay of one healthy environment and one for each fault."""

    upstream: ScriptedUpstream
    relay: RelayProcess
    stall: Stall = field(default_factory=Stall)

    def __post_init__(self) -> None:
        self.faults = faults(self.stall)
        self.keys = {name: f"sdk-of-{name}-{n:04}" for n, name in enumerate(self.faults)}

    def strike(self) -> None:
        """Let all faults begin."""
        for name, fault in self.faults.items():
            self.upstream.always(self.keys[name], fault.answer)
            self.upstream.close_streams(self.keys[name])

    async def attempts(self, n: int) -> None:
        """Wait until each environment that is tried again soon has been so, `n` times from now."""
        before = self._asked()
        wanted = {key for name, key in self.keys.items() if name not in ("stalled", "refused")}

        async def done() -> bool:
            asked = self._asked()
            return all(asked[key] >= before[key] + n for key in wanted)

        await eventually(done)

    def _asked(self) -> Counter[str]:
        return Counter(request.headers["Authorization"] for request in self.upstream.requests)

    def heal(self) -> None:
        """Let all faults end, with data that are new."""
        for key in self.keys.values():
            self.upstream.serve(key, SECOND)
            self.upstream.always(key, None)
        self.stall.over.set()

    def lines(self, name: str, *texts: str) -> list[str]:
        """The log lines of an environment."""
        return lines(self.relay, f"[env: ...{self.keys[name][-4:]}]", *texts)

    async def __aenter__(self) -> Self:
        for name, key in self.keys.items():
            self.upstream.serve(key, FIRST)
            assert name in self.faults
        self.upstream.serve(HEALTHY, FIRST)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stall.over.set()


@asynccontextmanager
async def sick_relay(
    upstream: ScriptedUpstream, folder: Path, patience: str = "20s"
) -> AsyncIterator[Sick]:
    keys = Sick(upstream, RelayProcess(folder)).keys
    variables = {f"LD_ENV_{name}": key for name, key in {**keys, "healthy": HEALTHY}.items()}
    relay = relay_of(upstream, folder, INIT_TIMEOUT=patience, **variables)
    async with Sick(upstream, relay) as sick:
        yield sick


async def test_a_fault_of_launchdarkly_at_the_start_stays_in_its_environment(
    upstream, tmp_path, open_stream
):
    """Streams wait, polls get 503, health tells which; when it is over the data come by themselves."""
    async with sick_relay(upstream, tmp_path, "1s") as sick, AsyncExitStack() as stack:
        sick.strike()
        relay = await stack.enter_async_context(sick.relay)
        await relay.said("Error initializing LaunchDarkly client", len(sick.faults))
        streams = {name: await open_stream(relay, key) for name, key in sick.keys.items()}
        assert {stream.status for stream in streams.values()} == {200}
        assert {(await poll(relay, key)).status for key in sick.keys.values()} == {503}
        assert (await poll(relay, HEALTHY)).status == 200
        status, body = await page(relay, "/readyz")
        assert (status, set(body["unavailable"])) == (200, set(sick.faults))
        assert body["unavailable"]["refused"] == "LaunchDarkly refuses the SDK key"
        assert (await page(relay, "/readyz/unavailable"))[0] == 503
        assert (await page(relay, "/readyz/healthy"))[0] == 200

        healthy = await open_stream(relay, HEALTHY)
        await healthy.until(b"\n\n")
        await sick.attempts(2)
        await upstream.patch(HEALTHY, flag("lamp", 2))
        assert (await healthy.chunk()).startswith(b"event: patch")
        for name, fault in sick.faults.items():
            assert len(sick.lines(name)) == (1 if fault.reason else 0), sick.lines(name)
            assert not fault.reason or sick.lines(name, "WARN", fault.reason)
            failed = f'ERROR: Error initializing LaunchDarkly client for "{name}": '
            assert len(lines(relay, failed)) == 1
        assert len([r for r in upstream.requests if r.headers["Authorization"] == HEALTHY]) == 1

        sick.heal()
        for name, fault in sick.faults.items():
            await relay.until(lambda n=name: sick.lines(n, "INFO: ", "data are current"))
            assert b'"version": 2' in await streams[name].until(b"\n\n")
            assert len(sick.lines(name)) == (2 if fault.reason else 1), sick.lines(name)


async def test_a_fault_of_launchdarkly_later_disturbs_nobody(upstream, tmp_path, open_stream):
    """Data stay served and streams stay open; when it is over, what is new comes on the same stream."""
    async with sick_relay(upstream, tmp_path) as sick, AsyncExitStack() as stack:
        relay = await stack.enter_async_context(sick.relay)
        await relay.said("Initialized LaunchDarkly client", len(sick.faults) + 1)
        streams = {name: await open_stream(relay, key) for name, key in sick.keys.items()}
        for stream in streams.values():
            await stream.until(b"\n\n")
        healthy = len(lines(relay, f"[env: ...{HEALTHY[-4:]}]"))
        before = {name: len(sick.lines(name)) for name in sick.faults}
        sick.strike()
        await sick.attempts(2)
        for name, key in sick.keys.items():
            assert await serves(relay, 1, key)
            # All begins with the end of the stream that there was; only what is of another kind
            # than a connection that fails gets a line of its own.
            reasons = ["the server closed the connection"]
            if name in ("refused", "malformed", "nothing"):
                reasons.append(sick.faults[name].reason)
            end = before[name] + len(reasons)
            await relay.until(lambda n=name, end=end: len(sick.lines(n)) >= end)
            new = sick.lines(name)[before[name] :]
            assert len(new) == len(reasons), new
            assert all(reason in line for reason, line in zip(reasons, new, strict=True))
            state = (await page(relay, f"/status/{name}"))[1]["connectionStatus"]["state"]
            assert state == ("OFF" if name == "refused" else "INTERRUPTED")
        assert await page(relay, "/readyz") == (200, {"status": "ready"})

        sick.heal()
        for name in sick.faults:
            await relay.until(lambda n=name: len(sick.lines(n, "data are current")) == 2)
            assert b'"version": 2' in await streams[name].until(b"\n\n")
        assert len(lines(relay, f"[env: ...{HEALTHY[-4:]}]")) == healthy


async def test_of_several_short_outages_each_is_over_soon(upstream, tmp_path):
    """A connection that has delivered makes the next failure a first one, also the fifth time."""
    async with relay_of(upstream, tmp_path) as relay:
        await relay.said("data are current")
        for outage in range(1, 6):
            await upstream.stop()
            upstream.serve(SDK_KEY, all_data(flag("lamp", outage + 1)))
            await asyncio.sleep(1)
            await upstream.start()
            # Connections are tried at intervals of 3 s at most; doubled ones were 8 to 16 s by now.
            await eventually(lambda version=outage + 1: serves(relay, version), seconds=6)
            await asyncio.sleep(1)


async def test_without_launchdarkly_and_without_stored_data_everybody_waits(
    upstream, tmp_path, open_stream
):
    """Nobody is refused, before `initTimeout` and after it; one line says so."""
    await upstream.stop()
    async with relay_of(upstream, tmp_path, INIT_TIMEOUT="2s") as relay:
        stream = await open_stream(relay)
        for text, start in (("cannot connect to", 503), ("Error initializing", 200)):
            await relay.said(text)
            assert (stream.status, (await poll(relay)).status) == (200, 503)
            ready, body = await page(relay, "/readyz")
            assert (ready, body["unavailable"]) == (503, {"main": "no data yet"})
            assert (await page(relay, "/startupz"))[0] == start
            assert await page(relay, "/livez") == (200, {"status": "alive"})
            assert (await page(relay, "/status"))[1]["status"] == "degraded"
        await upstream.start()
        await relay.said("data are current")
        assert (await stream.until(b"\n\n")).startswith(b"event: put\n")
        assert await page(relay, "/readyz") == (200, {"status": "ready"})
        assert len(lines(relay, "WARN")) == len(lines(relay, "cannot connect to")) == 1
        assert len(lines(relay, "ERROR")) == 1
        assert len(lines(relay, "data are current")) == 1


async def fill(relay: RelayProcess) -> None:
    """Let a one-shot run store what LaunchDarkly has."""
    await relay.spawn()
    assert await relay.ended() == 0, relay.log


@pytest.mark.parametrize(
    ("versions", "served"),
    [
        ({"snapshot": 1}, 1),
        ({"redis": 1}, 1),
        ({"snapshot": 2, "redis": 1}, 2),
        ({"snapshot": 1, "redis": 2}, 2),
    ],
    ids=str,
)
async def test_stored_data_are_served_while_launchdarkly_is_down(
    upstream, tmp_path, redis, versions, served
):
    """At once, the newer of two copies, and nothing is written; later what LaunchDarkly has."""
    stores = {
        "snapshot": {"SNAPSHOT_DIR": str(tmp_path / "snapshots")},
        "redis": {"USE_REDIS": "true", "REDIS_URL": redis.url},
    }
    for store, version in versions.items():
        upstream.serve(SDK_KEY, all_data(flag("lamp", version)))
        await fill(
            relay_of(upstream, tmp_path, EXIT_ALWAYS="true", INIT_TIMEOUT="9s", **stores[store])
        )
    await upstream.stop()
    variables = {name: value for store in versions for name, value in stores[store].items()}
    async with relay_of(upstream, tmp_path, INIT_TIMEOUT="300ms", **variables) as relay:
        await eventually(lambda: serves(relay, served))
        assert await page(relay, "/readyz") == (200, {"status": "ready"})
        await relay.said("Error initializing")
        assert len(lines(relay, "ERROR: Error", "serving stored data, still trying")) == 1
        stored = lines(relay, "Serving stored data (1 items) until upstream delivers")
        assert 1 <= len(stored) <= len(versions)
        if "snapshot" in versions and served == versions["snapshot"]:
            assert (await page(relay, "/status/main"))[1]["dataAge"] < 60
        if "redis" in versions:
            assert (
                json.loads(redis.hash("launchdarkly:features")["lamp"])["version"]
                == versions["redis"]
            )
        upstream.serve(SDK_KEY, all_data(flag("lamp", 3)))
        await upstream.start()
        await eventually(lambda: serves(relay, 3))


class Poller:
    """A client that polls all the time, in a thread, and remembers how long it had to wait."""

    def __init__(self, relay: RelayProcess, key: str = SDK_KEY) -> None:
        self._port = relay.port
        head = f"GET /sdk/flags HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n\r\n"
        self._request = head.encode()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.slowest = 0.0
        self.polls = 0
        self.failed: list[bytes] = []

    def _run(self) -> None:
        with socket.create_connection(("127.0.0.1", self._port)) as client:
            client.settimeout(10)
            while not self._over.wait(0.002):
                begin = time.monotonic()
                client.sendall(self._request)
                answer = client.recv(65536)
                self.slowest = max(self.slowest, time.monotonic() - begin)
                self.polls += 1
                if not answer.startswith(b"HTTP/1.1 200 "):
                    self.failed.append(answer)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        assert self.polls > 10
        assert self.failed == []


async def test_fifty_megabytes_at_once(upstream, tmp_path):
    """Memory stays within a few times their size, and polls of others are answered meanwhile."""
    text = put(all_data(*(flag(f"f{n}", value="x" * 10_000) for n in range(5000))))
    assert len(text) > 50_000_000
    stall = Stall()
    upstream.always(SDK_KEY, stall)
    upstream.serve(HEALTHY, FIRST)
    variables = {"LD_ENV_main": SDK_KEY, "LD_ENV_healthy": HEALTHY, "INIT_TIMEOUT": "60s"}
    stores = {"SNAPSHOT_DIR": str(tmp_path / "snapshots")}
    async with relay_of(upstream, tmp_path, **variables, **stores) as relay:
        await relay.said("Initialized")
        with Poller(relay, HEALTHY) as poller:
            upstream.always(SDK_KEY, answers.body(text, then="stall"))
            stall.over.set()
            await relay.said("Initialized", 2)
            await relay.until(lambda: len(list((tmp_path / "snapshots").glob("*.snapshot"))) == 2)
        assert poller.slowest < 2 * FAST  # its JSON is read in one go
        assert peak_memory(relay) < 250  # it was held as bytes, as message and as items
        assert len(lines(relay, "data are current (5000 items)")) == 1
        assert await relay.stop() == 0
    assert lines(relay, "WARN") == lines(relay, "ERROR") == []


# The database


@dataclass(frozen=True)
class Harm:
    """A fault of a database, and its repair.

    Args:
        begin: the fault.
        end: the repair.
        reason: what the log says of it.
    """

    begin: Callable[[RedisServer], object]
    end: Callable[[RedisServer], object]
    reason: str


HARMS = {
    "killed": Harm(RedisServer.kill, RedisServer.start, ""),
    "hanging": Harm(RedisServer.pause, RedisServer.go_on, "no answer in time"),
    "read-only replica": Harm(
        lambda redis: redis.do("REPLICAOF", "127.0.0.1", "1"),
        lambda redis: redis.do("REPLICAOF", "NO", "ONE"),
        "You can't write against a read only replica",
    ),
    "full": Harm(
        lambda redis: redis.do("CONFIG", "SET", "maxmemory", "1"),
        lambda redis: redis.do("CONFIG", "SET", "maxmemory", "0"),
        "command not allowed when used memory",
    ),
    "another password": Harm(
        lambda redis: (
            redis.do("ACL", "SETUSER", "relay", "resetpass", ">another"),
            redis.do("CLIENT", "KILL", "USER", "relay"),
        ),
        lambda redis: redis.do("ACL", "SETUSER", "relay", ">right-password"),
        "the server refuses user or password",
    ),
}


def in_redis(redis: RedisServer, prefix: str = "launchdarkly") -> int:
    """The version of the flag `lamp` there; 0 if there is none."""
    return json.loads(redis.hash(f"{prefix}:features").get("lamp", b'{"version":0}'))["version"]


def tried(redis: RedisServer) -> int:
    """Number of times that the relay has come to the database since its start, in any way."""
    stats = redis.do("INFO", "commandstats")
    names = ("hgetall", "auth", "hset")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in names)


@pytest.fixture(name="stored")
async def relay_with_redis(upstream, tmp_path, redis) -> AsyncIterator[RelayProcess]:
    """A relay whose database is whole."""
    redis.do("ACL", "SETUSER", "relay", "on", ">right-password", "~*", "+@all")
    async with relay_of(upstream, tmp_path, **access(redis)) as relay:
        await eventually(lambda: holds(redis, 1))
        await relay.said("Initialized")
        yield relay


def access(redis: RedisServer) -> dict[str, str]:
    """The relay's options for a database; without patience."""
    return {
        "USE_REDIS": "true",
        "REDIS_URL": redis.url,
        "REDIS_USERNAME": "relay",
        "REDIS_PASSWORD": "right-password",
        "REDIS_CONNECT_TIMEOUT": "300ms",
        "REDIS_READ_TIMEOUT": "300ms",
    }


async def holds(redis: RedisServer, version: int) -> bool:
    return in_redis(redis) == version


async def database_state(relay: RelayProcess) -> str:
    return (await page(relay, "/status/main"))[1]["dataStoreStatus"]["state"]


@pytest.mark.parametrize("name", HARMS)
async def test_a_database_that_fails_harms_nobody_and_heals(
    stored, upstream, redis, open_stream, name
):
    """Changes reach SDKs at once; the database has them as soon as it works again."""
    harm, relay = HARMS[name], stored
    before = len(relay.log.splitlines())
    stream = await open_stream(relay)
    await stream.until(b"\n\n")
    with Poller(relay) as poller:
        harm.begin(redis)
        await upstream.put(SDK_KEY, SECOND)
        assert b'"version": 2' in await stream.until(b"\n\n")
        await relay.said("is unavailable")
        assert await page(relay, "/readyz") == (200, {"status": "ready"})
        assert await database_state(relay) == "INTERRUPTED"
        if name not in ("killed", "hanging"):
            attempts = tried(redis)
            await eventually(lambda: more_tried(redis, attempts + 2))
            assert in_redis(redis) == 1
        harm.end(redis)
        if name == "killed":  # its data are lost, and its users
            redis.do("ACL", "SETUSER", "relay", "on", ">right-password", "~*", "+@all")
        await eventually(lambda: holds(redis, 2), WHOLE_WITHIN)
        await relay.said("is available again")
        assert await database_state(relay) == "VALID"
    assert poller.slowest < FAST
    new = [line for line in relay.log.splitlines()[before:] if "brought up to date" not in line]
    [began, ended] = [line for line in new if "has lost its data" not in line]
    assert f"ERROR: [env: ...a001] Redis data store {redis.url} is unavailable: " in began
    assert harm.reason in began
    assert "WARN: " in ended


async def more_tried(redis: RedisServer, n: int) -> bool:
    return tried(redis) >= n


async def test_a_database_that_is_down_at_the_start(upstream, tmp_path):
    """Flags are served; it is filled when it comes."""
    folder = tmp_path / "redis"
    folder.mkdir()
    redis = RedisServer(folder)
    variables = access(redis) | {"REDIS_USERNAME": "", "REDIS_PASSWORD": ""}
    async with relay_of(upstream, tmp_path, **variables) as relay:
        await relay.said("is unavailable")
        await relay.said("Initialized")
        assert await serves(relay, 1)
        assert await page(relay, "/readyz") == (200, {"status": "ready"})
        with redis:
            await eventually(lambda: holds(redis, 1), WHOLE_WITHIN)
            await relay.said("is available again")
        told = lines(relay, "Redis data store redis:")
        assert [line for line in told if "Using" not in line and "brought" not in line] == [
            *lines(relay, "ERROR", "is unavailable: Connection refused"),
            *lines(relay, "WARN", "is available again"),
        ]
        assert len(told) <= 4


async def test_a_database_that_lost_its_data_gets_them_again(stored, redis):
    """Though nothing changes, and nobody tells; one line says so."""
    before = len(stored.log.splitlines())
    redis.do("FLUSHALL")
    await eventually(lambda: holds(redis, 1), WHOLE_WITHIN)
    await stored.said("has lost its data; they are written again")
    assert len(stored.log.splitlines()) == before + 1


async def test_two_relays_on_one_database_one_of_them_behind(upstream, tmp_path, redis):
    """The newer data stay while it is seen whether upstream disowns them; each serves what it has."""
    variables = {"USE_REDIS": "true", "REDIS_URL": redis.url}
    folder = tmp_path / "behind"
    folder.mkdir()
    upstream.serve(SDK_KEY, SECOND)
    async with ScriptedUpstream() as late, relay_of(upstream, tmp_path, **variables) as ahead:
        late.serve(SDK_KEY, FIRST)
        await eventually(lambda: holds(redis, 2))
        async with relay_of(late, folder, **variables) as behind:
            await behind.said("asking upstream for everything")
            await late.connected(SDK_KEY, 2)
            late.close_streams()  # whatever makes it compare
            await late.connected(SDK_KEY, 3)
            assert await serves(behind, 1)
            assert in_redis(redis) == 2
            await late.put(SDK_KEY, all_data(flag("lamp", 3)))
            await eventually(lambda: holds(redis, 3))
            await eventually(lambda: serves(behind, 3))
        assert len(lines(behind, "asking upstream for everything")) == 1
        for relay in (ahead, behind):
            assert not lines(relay, "have replaced it")
            assert not lines(relay, "is unavailable")
        assert not lines(ahead, "brought up to date")


# Clients


async def test_a_crowd_of_hostile_clients(upstream, tmp_path, open_stream):
    """Stalled streams, slow heads and garbage cost little and leave everybody else alone."""
    raise_file_limit()
    large = flag("large", value="x" * 500_000)
    upstream.serve(SDK_KEY, all_data(flag("lamp", 1), large))
    upstream.serve(HEALTHY, FIRST)
    variables = {"LD_ENV_main": SDK_KEY, "LD_ENV_healthy": HEALTHY, "CLIENT_STALL_TIMEOUT": "3s"}
    async with relay_of(upstream, tmp_path, **variables) as relay, AsyncExitStack() as stack:
        await relay.said("Initialized", 2)
        before = peak_memory(relay)
        quiet = len(relay.log)
        stream = await open_stream(relay, HEALTHY)
        await stream.until(b"\n\n")
        with Poller(relay, HEALTHY) as poller:
            for _ in range(1000):
                client = await asyncio.to_thread(stalled_socket, relay.port)
                stack.callback(client.close)
            for n in range(300):
                _, writer = await relay.address.connect()
                stack.callback(writer.close)
                writer.write(
                    b"GET /sdk/flags HTTP/1.1\r\n" if n % 3 else os.urandom(2000) + b"\r\n\r\n"
                )
            await eventually(lambda: has_streams(relay, 1000))
            for version in range(2, 12):
                await upstream.patch(SDK_KEY, {**large, "version": version})
            await upstream.patch(HEALTHY, flag("lamp", 2))
            assert (await stream.chunk()).startswith(b"event: patch")
            await eventually(lambda: has_streams(relay, 0))
        assert poller.slowest < FAST
        assert peak_memory(relay) - before < 60
        assert relay.log[quiet:] == ""
        assert (await page(relay, "/status"))[1]["status"] == "healthy"


async def has_streams(relay: RelayProcess, n: int) -> bool:
    return (await page(relay, "/status/main"))[1]["streams"] == n


# Sudden and orderly ends

ITEMS, ITEM_SIZE = 2000, 10_000


def generation(version: int) -> str:
    """Some megabytes of flags, all of one version."""
    return all_data(*(flag(f"f{n}", version, value="x" * ITEM_SIZE) for n in range(ITEMS)))


def version_of_all(items: Iterable[str | bytes]) -> int:
    """See that all items are there, all of one version, and return that."""
    found = Counter(json.loads(item)["version"] for item in items)
    [(version, number)] = found.items()
    assert number == ITEMS
    return version


async def test_a_kill_while_the_snapshot_is_written(upstream, tmp_path):
    """The next start has the file before or the file after, and leaves nothing lying about."""
    folder = tmp_path / "snapshots"
    variables = {"SNAPSHOT_DIR": str(folder), "EXIT_ALWAYS": "true", "INIT_TIMEOUT": "20s"}
    upstream.serve(SDK_KEY, generation(1))
    await fill(relay_of(upstream, tmp_path, **variables))
    halves = 0
    for version in range(2, 6):
        upstream.serve(SDK_KEY, generation(version))
        relay = relay_of(upstream, tmp_path, **variables)
        await relay.spawn()
        await relay.until(lambda: any(folder.glob("*.tmp")))
        await relay.kill()
        halves += any(folder.glob("*.tmp"))
    assert halves, "no kill has met a file that was being written"
    await upstream.stop()
    async with relay_of(upstream, tmp_path, SNAPSHOT_DIR=str(folder)) as relay:
        await relay.said(f"Serving stored data ({ITEMS} items) until upstream delivers")
        flags = json.loads((await poll(relay)).body)["flags"].values()
        assert version_of_all(json.dumps(each) for each in flags) in range(1, 6)
        assert [file.suffix for file in folder.iterdir()] == [".snapshot"]
        assert "damaged" not in relay.log


CLOCK = """
import os, time
from pathlib import Path
right, wrong_by = time.time, Path(os.environ["WRONG_BY"])
time.time = lambda: right() + wrong_by.stat().st_size
"""
WEEK = 7 * 86400


async def test_a_clock_that_jumps_changes_no_age_and_no_verdict(upstream, tmp_path):
    """An outage is as long as it was; what was stored by a wrong clock is served, its age unknown."""
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    wrong_by = tmp_path / "clock"  # by as many seconds as it is long: that changes in one step
    wrong_by.touch()
    clock = {"PYTHONPATH": str(tmp_path), "WRONG_BY": str(wrong_by)}
    snapshots = str(tmp_path / "snapshots")
    os.truncate(wrong_by, WEEK)
    async with relay_of(upstream, tmp_path, SNAPSHOT_DIR=snapshots, **clock) as relay:
        await relay.said("data are current")
        await upstream.stop()
        await relay.said("the server closed the connection")
        for jump in (0, 2 * WEEK, WEEK):
            os.truncate(wrong_by, jump)
            whole = (await page(relay, "/status"))[1]
            assert whole["status"] == "healthy"
            assert whole["environments"]["main"]["dataAge"] < 60
        assert await relay.stop() == 0
        os.truncate(wrong_by, 0)
        await relay.start()
        await relay.said("Serving stored data")
        assert await serves(relay, 1)
        assert "dataAge" not in (await page(relay, "/status/main"))[1]
        await upstream.start()
        await relay.said("data are current", 2)
        assert (await page(relay, "/status/main"))[1]["dataAge"] < 60


async def test_a_kill_while_the_database_is_filled(upstream, tmp_path, redis):
    """The database has everything of before or everything of after, never a part."""
    variables = {"USE_REDIS": "true", "REDIS_URL": redis.url, "EXIT_ALWAYS": "true"}
    halves = 0
    for version in range(1, 4):
        upstream.serve(SDK_KEY, generation(version))
        relay = relay_of(upstream, tmp_path, **variables, INIT_TIMEOUT="20s")
        await relay.spawn()
        await relay.until(lambda: fills(redis))
        await relay.kill()
        await eventually(lambda: nobody_connected(redis))
        stored = redis.hash("launchdarkly:features").values()
        assert bool(stored) == bool(redis.do("EXISTS", "launchdarkly:$inited"))
        halves += not stored or version_of_all(stored) < version
    assert halves, "no kill has met a database that was being filled"
    await fill(relay_of(upstream, tmp_path, **variables, INIT_TIMEOUT="20s"))
    assert version_of_all(redis.hash("launchdarkly:features").values()) == version


def fills(redis: RedisServer) -> bool:
    """True if a client is in the middle of a transaction."""
    return any(int(client["multi"]) > 2 for client in redis.do("CLIENT LIST"))


async def nobody_connected(redis: RedisServer) -> bool:
    return all(int(client["multi"]) < 0 for client in redis.do("CLIENT LIST"))


async def test_a_stop_with_a_thousand_streams(upstream, tmp_path, redis, open_stream):
    """All of them end properly, stores are written, and the exit code is 0 within ten seconds."""
    raise_file_limit()
    folder = tmp_path / "snapshots"
    stores = {"USE_REDIS": "true", "REDIS_URL": redis.url, "SNAPSHOT_DIR": str(folder)}
    async with relay_of(upstream, tmp_path, **stores) as relay:
        await relay.said("Initialized")
        streams = [await open_stream(relay) for _ in range(1000)]
        await upstream.put(SDK_KEY, SECOND)
        for stream in streams:
            await stream.until(b"\n\n")
        begin = time.monotonic()
        relay.signal(signal.SIGTERM)
        bodies = await asyncio.gather(*(stream.rest() for stream in streams))
        assert await relay.ended() == 0
        assert time.monotonic() - begin < 10
        assert all(b'"version": 2' in body for body in bodies)
        assert in_redis(redis) == 2
        await upstream.stop()
        await relay.start()
        await eventually(lambda: serves(relay, 2))
        assert await relay.stop() == 0
    assert "Traceback" not in relay.log


# The disk


async def test_a_snapshot_that_cannot_be_written_harms_nothing(upstream, tmp_path):
    """One line says so; everything else works, and the end is orderly."""
    below_a_file = tmp_path / "file" / "snapshots"
    below_a_file.parent.write_text("")
    async with relay_of(upstream, tmp_path, SNAPSHOT_DIR=str(below_a_file)) as relay:
        await relay.said(f"Snapshot {below_a_file}")
        await relay.said("Initialized")
        assert await serves(relay, 1)
        assert await page(relay, "/readyz") == (200, {"status": "ready"})
        assert (await page(relay, "/status"))[1]["status"] == "healthy"
        assert await relay.stop() == 0
    [line] = lines(relay, str(below_a_file))
    assert re.search("WARN: .* cannot be (read|written): Not a directory", line)


async def test_a_full_disk_is_told_once_and_heals(upstream, tmp_path):
    """The file before stays whole meanwhile."""
    folder = tmp_path / "snapshots"
    upstream.serve(SDK_KEY, FIRST)
    await fill(relay_of(upstream, tmp_path, SNAPSHOT_DIR=str(folder), EXIT_ALWAYS="true"))
    [file] = folder.iterdir()
    before = file.read_bytes()
    async with relay_of(upstream, tmp_path, SNAPSHOT_DIR=str(folder)) as relay:
        await relay.said("Initialized")
        no_limit = resource.prlimit(relay.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(relay.pid, resource.RLIMIT_FSIZE, (64 * 1024, no_limit[1]))
        large = flag("large", value="x" * 200_000)
        await upstream.put(SDK_KEY, all_data(flag("lamp", 2), large))
        await relay.said("cannot be written: File too large")
        assert await serves(relay, 2)
        assert file.read_bytes()[512:] == before[512:]
        assert [each.suffix for each in folder.iterdir()] == [".snapshot"]
        resource.prlimit(relay.pid, resource.RLIMIT_FSIZE, no_limit)
        assert await relay.stop() == 0  # which does not wait for the next attempt
        assert lines(relay, "Snapshot", "is written again")
        assert file.stat().st_size > 200_000
        assert len(lines(relay, "Snapshot", "WARN")) == 1
        assert len(lines(relay, "Snapshot", "INFO")) == 1
