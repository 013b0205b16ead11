"""A server that speaks DynamoDB's protocol (moto's), and a proxy before it that misbehaves."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
import botocore.session
import pytest
from aiohttp import web
from moto.server import ThreadedMotoServer

from relay.stores.dynamodb.connect import connect
from relay.stores.dynamodb.store import DynamoDBStore
from tests.support.process import PATIENCE
from tests.support.serving import SDK_KEY
from tests.support.upstream import ScriptedUpstream

VARIABLES = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "the-secret-key-of-the-tests",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

_numbers = itertools.count()


class DynamoDBServer:
    """One server; entered it runs, left it is ended."""

    def __enter__(self) -> Self:
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.url = "http://{}:{}".format(*self._server.get_host_and_port())
        self.client: Any = botocore.session.get_session().create_client(
            "dynamodb",
            endpoint_url=self.url,
            aws_access_key_id=VARIABLES["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=VARIABLES["AWS_SECRET_ACCESS_KEY"],
            region_name=VARIABLES["AWS_REGION"],
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def new_table(self, name: str = "") -> Table:
        """Create an empty table."""
        table = Table(self, name or f"table-{next(_numbers)}")
        table.create()
        return table


class Table:
    """A table of its own on a shared server."""

    def __init__(self, server: DynamoDBServer, name: str) -> None:
        self.server, self.name = server, name

    def create(self) -> None:
        keys = {"namespace": "HASH", "key": "RANGE"}
        self.server.client.create_table(
            TableName=self.name,
            BillingMode="PAY_PER_REQUEST",
            KeySchema=[{"AttributeName": n, "KeyType": kind} for n, kind in keys.items()],
            AttributeDefinitions=[{"AttributeName": n, "AttributeType": "S"} for n in keys],
        )

    def drop(self) -> None:
        self.server.client.delete_table(TableName=self.name)

    def items(self) -> list[dict[str, Any]]:
        """Return all items, sorted by their keys."""
        pages = self.server.client.get_paginator("scan").paginate(TableName=self.name)
        items = [item for page in pages for item in page["Items"]]
        return sorted(items, key=lambda each: (each["namespace"]["S"], each["key"]["S"]))

    def get(self, namespace: str, key: str) -> dict[str, Any] | None:
        """Return an item; None if there is none."""
        where = {"namespace": {"S": namespace}, "key": {"S": key}}
        answer = self.server.client.get_item(TableName=self.name, Key=where, ConsistentRead=True)
        item: dict[str, Any] | None = answer.get("Item")
        return item

    def put(self, namespace: str, key: str, **attributes: Any) -> None:
        """Write an item with further attributes: texts or numbers."""
        kinds = {name: {"N" if name == "version" else "S": v} for name, v in attributes.items()}
        item = {"namespace": {"S": namespace}, "key": {"S": key}, **kinds}
        self.server.client.put_item(TableName=self.name, Item=item)

    def empty(self) -> None:
        """Remove all items."""
        for each in self.items():
            key = {name: each[name] for name in ("namespace", "key")}
            self.server.client.delete_item(TableName=self.name, Key=key)


@dataclass(frozen=True)
class Asked:
    """A request that the proxy has seen."""

    operation: str
    body: dict[str, Any]
    status: int
    key_id: str = ""
    region: str = ""
    token: str | None = None


Answer = tuple[int, dict[str, Any]]


class DynamoDBProxy:
    """Passes requests on, and records them. Entered it runs, left it is ended.

    One request goes on at a time, since moto's transactions are none while others come.
    `misbehave` may answer in the server's place: it gets operation and body, and returns status and
    body, or None; it may change the body. `amend` may change an answer, `delay` is before each.
    """

    def __init__(self, server: DynamoDBServer) -> None:
        self._server = server
        self._turn = asyncio.Lock()
        self.asked: list[Asked] = []
        self.misbehave: Callable[[str, dict[str, Any]], Answer | None] = lambda _op, _body: None
        self.amend: Callable[[str, dict[str, Any], dict[str, Any]], None] = lambda _o, _b, _a: None
        self.delay = 0.0
        """Seconds before each answer."""
        self.busy = self.busiest = 0
        """Requests under way, now and at most."""
        self.key_id = ""
        """Of the last request."""
        self._port = 0

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession()
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        await self._session.close()

    async def start(self) -> None:
        """Listen; after `stop` on the same port."""
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.05)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        """Close all connections, and refuse others."""
        await self._runner.cleanup()

    @property
    def operations(self) -> list[str]:
        return [each.operation for each in self.asked]

    async def _handle(self, request: web.Request) -> web.Response:
        self.busy += 1
        self.busiest = max(self.busy, self.busiest)
        try:
            return await self._answer(request)
        finally:
            self.busy -= 1

    async def _answer(self, request: web.Request) -> web.Response:
        operation = request.headers["X-Amz-Target"].rpartition(".")[2]
        body = json.loads(await request.read())
        credential = request.headers["Authorization"].partition("Credential=")[2].split("/")
        self.key_id = credential[0]
        await asyncio.sleep(self.delay)
        answer = self.misbehave(operation, body)
        if answer is None:
            headers = {
                name: value
                for name, value in request.headers.items()
                if name.lower() not in ("host", "content-length", "accept-encoding")
            }
            async with (
                self._turn,
                self._session.post(
                    self._server.url, data=json.dumps(body), headers=headers
                ) as response,
            ):
                answer = response.status, json.loads(await response.read())
        self.amend(operation, body, answer[1])
        token = request.headers.get("X-Amz-Security-Token")
        self.asked.append(Asked(operation, body, answer[0], credential[0], credential[2], token))
        return web.Response(
            status=answer[0],
            body=json.dumps(answer[1]).encode(),
            content_type="application/x-amz-json-1.0",
        )


async def eventually(holds: Callable[[], Any]) -> None:
    """Wait for what is seen in the database only."""
    async with asyncio.timeout(PATIENCE):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def given(upstream: ScriptedUpstream, url: str, table: str, **more: str) -> dict[str, str]:
    """The relay's variables for these servers."""
    return {
        **VARIABLES,
        "LD_ENV_main": SDK_KEY,
        "LD_PREFIX_main": "p",
        "STREAM_URI": upstream.url,
        "BASE_URI": upstream.url,
        "USE_DYNAMODB": "true",
        "DYNAMODB_URL": url,
        "DYNAMODB_TABLE": table,
        "INIT_TIMEOUT": "10s",
        **more,
    }


def content(items: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
    """Items with what matters of them, by namespace and key."""
    result: dict[tuple[str, str], Any] = {}
    for each in items:
        value = json.loads(each["item"]["S"]) if "item" in each else {}
        version = each.get("version", {}).get("N")
        assert version is None or not value or int(version) == value["version"]
        where = each["namespace"]["S"], each["key"]["S"]
        result[where] = version, value.get("deleted") or value.get("variations")
    return result


def version_of(table: Table, key: str) -> str | None:
    item = table.get("p:features", key)
    return item["version"]["N"] if item else None


def failure(code: str, status: int = 400) -> Answer:
    """Return an error as DynamoDB sends it."""
    return status, {"__type": f"com.amazonaws.dynamodb.v20120810#{code}", "message": "no, sorry"}


def store_in(url: str, table: str, prefix: str = "p") -> DynamoDBStore:
    """Return the store of one environment, with a connection of its own."""
    return DynamoDBStore(connect(url, VARIABLES).share(), table, prefix)


@pytest.fixture(autouse=True)
def aws_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables of AWS, in folders that import this."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session", name="server")
def dynamodb() -> Iterator[DynamoDBServer]:
    """One server per test worker; each test has a table of its own."""
    with DynamoDBServer() as server:
        yield server


@pytest.fixture
def table(server: DynamoDBServer) -> Table:
    """A new table."""
    return server.new_table()


@pytest.fixture
async def proxy(server: DynamoDBServer) -> AsyncIterator[DynamoDBProxy]:
    """The proxy before the server."""
    async with DynamoDBProxy(server) as proxy:
        yield proxy
