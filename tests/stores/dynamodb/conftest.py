"""One server per test worker; each test has a table of its own."""

from __future__ import annotations

import pytest

from tests.support.dynamodb import aws_credentials, dynamodb, proxy, store_in, table

__all__ = ["aws_credentials", "dynamodb", "proxy", "table"]


@pytest.fixture
async def store(proxy, table):
    """The store of prefix `p`, through the proxy."""
    store = store_in(proxy.url, table.name)
    yield store
    await store.aclose()
