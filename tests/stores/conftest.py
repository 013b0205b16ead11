"""A real server for all tests of a worker, emptied for each."""

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
    """A server that works and is empty. Who breaks it starts one of his own."""
    shared_server.do("FLUSHALL")
    return shared_server
