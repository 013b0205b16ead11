"""A whole relay, and what can happen to each kind of database; `test_faults` has more of Redis."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
from redis.exceptions import RedisError

from tests.support.consul import ConsulServer
from tests.support.data import all_data, flag, segment
from tests.support.dynamodb import (
    VARIABLES,
    DynamoDBProxy,
    aws_credentials,
    dynamodb,
    failure,
    table,
    version_of,
)
from tests.support.keyvalue import TOKEN, KeyValueServer
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.rediscluster import Cluster
from tests.support.serving import SDK_KEY, Stream
from tests.support.upstream import ScriptedUpstream

__all__ = ["aws_credentials", "dynamodb", "table"]

ID = "5ca1ab1e0000000000000001"
PATIENCE = 45.0
"""Seconds after which a database is whole again, whatever has happened to it."""


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """LaunchDarkly, with a flag and a segment."""
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag(value="one"), segment()))
        yield upstream


async def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what is seen in the database only."""
    async with asyncio.timeout(PATIENCE):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


class Subject(ABC):
    """A kind of database, as a test breaks it.

    Args:
        folder: an empty folder.
    """

    harms: ClassVar[Mapping[str, str]] = {}
    """Text of the log for each fault, by its name; `begin` and `end` know the names, and `away`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def serving(self) -> AbstractAsyncContextManager[object]:
        """Let the database run meanwhile."""

    @abstractmethod
    def variables(self) -> dict[str, str]:
        """The relay's variables for it."""

    @abstractmethod
    def version(self, key: str = "lamp") -> int:
        """The version of a stored flag; 0 if there is none, or nobody can be asked."""

    @abstractmethod
    async def begin(self, harm: str) -> None:
        """Begin with a fault."""

    @abstractmethod
    async def end(self, harm: str) -> None:
        """Repair it."""

    @abstractmethod
    def content(self) -> Any:
        """A backup of everything."""

    @abstractmethod
    def restore(self, content: Any) -> None:
        """Put a backup in the place of everything; an empty one for nothing."""


class OneRedis(Subject):
    """One server."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server = RedisServer(folder)

    def serving(self) -> AbstractAsyncContextManager[object]:
        stack = AsyncExitStack()
        stack.enter_context(self.server)
        return stack

    def variables(self) -> dict[str, str]:
        return {"USE_REDIS": "true", "REDIS_URL": self.server.url}

    def version(self, key: str = "lamp") -> int:
        item = self.server.hash("launchdarkly:features").get(key)
        return json.loads(item)["version"] if item else 0

    async def begin(self, harm: str) -> None:
        raise NotImplementedError(harm)

    async def end(self, harm: str) -> None:
        raise NotImplementedError(harm)

    def content(self) -> Any:
        return [{key: self.server.do("DUMP", key) for key in self.server.do("KEYS", "*")}]

    def restore(self, content: Any) -> None:
        self.server.do("FLUSHALL")
        for key, value in dict(*content).items():
            self.server.do("RESTORE", key, 0, value)


class RedisCluster(Subject):
    """Three masters without replicas, which divide the keys of an environment."""

    harms: ClassVar[Mapping[str, str]] = {
        "one killed": "",
        "hanging": "no answer in time",
        "full": "command not allowed when used memory",
        "another password": "the server refuses user or password",
        "no right to write": "NOPERM",
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cluster = Cluster(folder)
        self._broken: RedisServer | None = None

    def serving(self) -> AbstractAsyncContextManager[object]:
        stack = AsyncExitStack()
        stack.enter_context(self.cluster)
        self._allow()
        return stack

    def _allow(self) -> None:
        for server in self.cluster.running:
            self._set_user(server, "reset", "on", ">right-password", "~*", "+@all")

    @staticmethod
    def _set_user(server: RedisServer, *rules: str) -> None:
        server.do("ACL", "SETUSER", "relay", *rules)

    def variables(self) -> dict[str, str]:
        return {
            "USE_REDIS": "true",
            "REDIS_CLUSTER": "true",
            "REDIS_URL": self.cluster.url,
            "REDIS_USERNAME": "relay",
            "REDIS_PASSWORD": "right-password",
            "REDIS_CONNECT_TIMEOUT": "1s",
            "REDIS_READ_TIMEOUT": "1s",
        }

    @property
    def _owner(self) -> RedisServer:
        return self.cluster.master_of("launchdarkly:features")

    def version(self, key: str = "lamp") -> int:
        if self._broken:
            return 0
        try:
            item = self.cluster.hash("launchdarkly:features").get(key)
        except RedisError:
            return 0
        return json.loads(item)["version"] if item else 0

    async def begin(self, harm: str) -> None:
        match harm:
            case "one killed" | "away":
                self._broken = self._owner
                self._broken.kill()
            case "hanging":
                self._broken = self._owner
                self._broken.pause()
            case "full":
                for server in self.cluster.servers:
                    server.do("CONFIG", "SET", "maxmemory", "1")
            case "another password":
                for server in self.cluster.servers:
                    self._set_user(server, "resetpass", ">another")
                    server.do("CLIENT", "KILL", "USER", "relay")
            case "no right to write":
                for server in self.cluster.servers:
                    self._set_user(server, "-@write")

    async def end(self, harm: str) -> None:
        broken, self._broken = self._broken, None
        if broken and harm == "hanging":
            broken.go_on()
        elif broken:
            await asyncio.to_thread(broken.start)  # its data are lost, and its users
        elif harm == "full":
            for server in self.cluster.servers:
                server.do("CONFIG", "SET", "maxmemory", "0")
        if harm != "hanging":
            self._allow()

    def content(self) -> Any:
        return [
            {key: server.do("DUMP", key) for key in server.do("KEYS", "*")}
            for server in self.cluster.servers
        ]

    def restore(self, content: Any) -> None:
        self.cluster.flush()
        for server, those in zip(self.cluster.servers, content, strict=False):
            for key, value in those.items():
                server.do("RESTORE", key, 0, value)


class DynamoDB(Subject):
    """A table; `table` is set by the test."""

    harms: ClassVar[Mapping[str, str]] = {
        "killed": "endpoint URL",
        "no right to write": "AccessDeniedException",
    }

    table: Any

    def serving(self) -> AbstractAsyncContextManager[object]:
        self.proxy = DynamoDBProxy(self.table.server)
        return self.proxy

    def variables(self) -> dict[str, str]:
        return {
            **VARIABLES,
            "LD_PREFIX_main": "p",
            "USE_DYNAMODB": "true",
            "DYNAMODB_URL": self.proxy.url,
            "DYNAMODB_TABLE": self.table.name,
        }

    def version(self, key: str = "lamp") -> int:
        return int(version_of(self.table, key) or 0)

    async def begin(self, harm: str) -> None:
        def refuse(operation: str, _body: dict[str, Any]) -> Any:
            is_read = operation in ("GetItem", "Query", "BatchGetItem")
            return None if is_read else failure("AccessDeniedException")

        if harm in ("killed", "away"):
            await self.proxy.stop()
        else:
            self.proxy.misbehave = refuse

    async def end(self, harm: str) -> None:
        if harm in ("killed", "away"):
            await self.proxy.start()
        self.proxy.misbehave = lambda _operation, _body: None

    def content(self) -> Any:
        return self.table.items()

    def restore(self, content: Any) -> None:
        self.table.empty()
        for item in content:
            self.table.server.client.put_item(TableName=self.table.name, Item=item)


class Consul(Subject):
    """The emulation of an agent."""

    harms: ClassVar[Mapping[str, str]] = {
        "killed": "cannot connect",
        "hanging": "no answer in time",
        "too many requests": "429",
        "full": "no space left on device",
        "token expired": "ACL not found",
        "no right to write": "Permission denied",
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server = ConsulServer(policies={"geheim": ("launchdarkly/",)})

    def serving(self) -> AbstractAsyncContextManager[object]:
        return self.server

    def variables(self) -> dict[str, str]:
        return {"USE_CONSUL": "true", "CONSUL_HOST": self.server.address, "CONSUL_TOKEN": "geheim"}

    def version(self, key: str = "lamp") -> int:
        item = self.server.values.get(f"launchdarkly/features/{key}")
        return json.loads(item)["version"] if item else 0

    async def begin(self, harm: str) -> None:
        match harm:
            case "killed" | "away":
                await self.server.stop()
            case "hanging":
                self.server.pause()
            case "too many requests":
                self.server.failure = 429, "Your IP is issuing too many concurrent connections"
            case "full":
                self.server.failure = 500, "write raft.db: no space left on device"
            case "token expired":
                self.server.policies = {"another": ("launchdarkly/",)}
            case "no right to write":
                self.server.policies = {"geheim": ("elsewhere/",)}

    async def end(self, harm: str) -> None:
        if harm in ("killed", "away"):
            await self.server.start()
        self.server.go_on()
        self.server.failure = None
        self.server.policies = {"geheim": ("launchdarkly/",)}

    def content(self) -> Any:
        return dict(self.server.values)

    def restore(self, content: Any) -> None:
        self.server.values = dict(content)


class Document(Subject):
    """A value of a key-value store."""

    harms: ClassVar[Mapping[str, str]] = {
        "killed": "cannot connect",
        "full": "HTTP status 507",
        "token expired": "the token is missing, wrong, or not permitted",
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server = KeyValueServer()

    def serving(self) -> AbstractAsyncContextManager[object]:
        return self.server

    def variables(self) -> dict[str, str]:
        return {
            "PUBLISH_TO": self.server.url,
            "PUBLISH_TOKEN": TOKEN,
            "LD_CLIENT_SIDE_ID_main": ID,
        }

    def version(self, key: str = "lamp") -> int:
        content = self.server.values.get(f"LD-Env-{ID}")
        return json.loads(content)["flags"].get(key, {}).get("version", 0) if content else 0

    async def begin(self, harm: str) -> None:
        match harm:
            case "killed" | "away":
                await self.server.stop()
            case "full":
                self.server.status = 507
            case "token expired":
                self.server.status = 401

    async def end(self, harm: str) -> None:
        if harm in ("killed", "away"):
            await self.server.start()
        self.server.status = 0

    def content(self) -> Any:
        return dict(self.server.values)

    def restore(self, content: Any) -> None:
        self.server.values = dict(content)


SUBJECTS = {each.__name__: each for each in (OneRedis, RedisCluster, DynamoDB, Consul, Document)}


@pytest.fixture
def subject(request, tmp_path) -> Subject:
    """A database of the kind that the test names."""
    folder = tmp_path / "servers"
    folder.mkdir()
    subject: Subject = SUBJECTS[request.param](folder)
    if isinstance(subject, DynamoDB):
        subject.table = request.getfixturevalue("table")
    return subject


def relay_of(subject: Subject, upstream: ScriptedUpstream, folder: Path) -> RelayProcess:
    """Return a relay with the database."""
    given = {
        "LD_ENV_main": SDK_KEY,
        "STREAM_URI": upstream.url,
        "BASE_URI": upstream.url,
        "INIT_TIMEOUT": "20s",
    }
    return RelayProcess(folder, **subject.variables(), **given)


async def change(upstream: ScriptedUpstream, stream: Stream) -> None:
    """Change a flag, and see that the client of a stream has it."""
    await upstream.patch(SDK_KEY, flag(value="two", version=2))
    assert b'"two"' in await stream.until(b"\n\n")


FAULTS = [(name, harm) for name, each in SUBJECTS.items() for harm in each.harms]


@pytest.mark.parametrize(("subject", "harm"), FAULTS, indirect=["subject"])
async def test_a_fault_is_said_once_harms_nobody_and_ends(subject, harm, upstream, tmp_path):
    """Changes reach clients at once, and the database when it works again."""
    async with subject.serving(), relay_of(subject, upstream, tmp_path) as relay:
        await eventually(lambda: subject.version() == 1)
        stream = await Stream.open(relay.address)
        await stream.until(b"\n\n")
        await subject.begin(harm)
        await change(upstream, stream)
        await relay.said("is unavailable: ")
        await subject.end(harm)
        await eventually(lambda: subject.version() == 2)
        await eventually(lambda: "is available again" in relay.log)
        [line] = [line for line in relay.log.splitlines() if "is unavailable: " in line]
        assert subject.harms[harm] in line
        assert "right-password" not in relay.log
        assert TOKEN not in relay.log
        stream.close()


@pytest.mark.parametrize(
    "subject", [each for each in SUBJECTS if each != "OneRedis"], indirect=True
)
async def test_a_database_that_is_away_at_the_start_is_filled_later(subject, upstream, tmp_path):
    """The relay serves; one line says so."""
    async with subject.serving():
        await subject.begin("away")
        async with relay_of(subject, upstream, tmp_path) as relay:
            await relay.said("is unavailable: ")
            await relay.said("Initialized")
            stream = await Stream.open(relay.address)
            await stream.until(b"\n\n")
            await change(upstream, stream)
            assert subject.version() == 0
            await subject.end("away")
            await eventually(lambda: subject.version() == 2)
            assert relay.log.count("is unavailable: ") == 1
            stream.close()


RESTORED: Mapping[str, Callable[[Any], Any]] = {
    "wiped": lambda _: [],
    "an older backup": lambda backup: backup,
}
AT_ONCE = [each for each in SUBJECTS if each != "Document"]
"""Databases that are probed often enough for a test; see `tests/stores/documents`."""


@pytest.mark.parametrize("state", RESTORED)
@pytest.mark.parametrize("subject", AT_ONCE, indirect=True)
async def test_what_is_lost_under_a_running_relay_is_written_again(
    subject, state, upstream, tmp_path
):
    """Though nothing changes, and nobody tells; clients notice nothing."""
    async with subject.serving(), relay_of(subject, upstream, tmp_path) as relay:
        await eventually(lambda: subject.version() == 1)
        await asyncio.sleep(0.5)
        backup = subject.content()
        stream = await Stream.open(relay.address)
        await stream.until(b"\n\n")
        await upstream.patch(SDK_KEY, flag("added"))
        await stream.until(b"\n\n")
        await change(upstream, stream)
        await eventually(lambda: (subject.version(), subject.version("added")) == (2, 1))
        await asyncio.sleep(0.5)  # its fingerprint is written behind it
        subject.restore(RESTORED[state](backup))
        assert subject.version() == (0 if state == "wiped" else 1)
        await eventually(lambda: (subject.version(), subject.version("added")) == (2, 1))
        assert "is unavailable" not in relay.log
        with pytest.raises(TimeoutError):
            await stream.chunk(within=0.1)
        stream.close()
