"""One real server per test worker, emptied before each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.redis import RedisServer


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared_server) -> RedisServer:
    """An empty, working server. Tests that break a server start their own."""
    shared_server.do("FLUSHALL")
    return shared_server
