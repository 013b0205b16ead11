"""One server per test worker; each test has a table of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.dynamodb import VARIABLES, DynamoDBProxy, DynamoDBServer, Table, store_in


@pytest.fixture(autouse=True)
def credentials(monkeypatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def server() -> Iterator[DynamoDBServer]:
    with DynamoDBServer() as server:
        yield server


@pytest.fixture
def table(server) -> Table:
    return server.new_table()


@pytest.fixture
async def proxy(server):
    async with DynamoDBProxy(server) as proxy:
        yield proxy


@pytest.fixture
async def store(proxy, table):
    """The store of prefix `p`, through the proxy."""
    store = store_in(proxy.url, table.name)
    yield store
    await store.aclose()
