"""Places of every kind, with real files and servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from relay.model.credential import EnvironmentID, SDKKey, Secret
from relay.model.environment import EnvironmentSpec
from relay.stores.documents.connect import Places
from relay.stores.documents.store import DocumentStore
from relay.telemetry.log import environment_log
from relay.upstream import Upstream
from tests.support.keyvalue import TOKEN, KeyValueServer
from tests.support.s3 import Bucket, S3Server

SPEC = EnvironmentSpec("main", SDKKey("sdk-1"), environment_id=EnvironmentID("env-1"))
NAME = "LD-Env-env-1"
LOG = environment_log("main", "...")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server, monkeypatch) -> S3Server:
    """A server that the relay's own S3 client uses."""
    for name, value in s3_server.variables.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def bucket(s3) -> Bucket:
    """A new bucket."""
    return s3.new_bucket()


@pytest.fixture
async def values():
    async with KeyValueServer() as server:
        yield server


@pytest.fixture
def places() -> Places:
    return Places(Upstream)


@pytest.fixture
async def open_store(places):
    """Return a function that makes a store for the document at a URL."""
    stores = []

    def open_(url: str, token: str = TOKEN, maker: Places | None = None) -> DocumentStore:
        [store] = (maker or places).stores([url], Secret(token), SPEC, LOG)
        stores.append(store)
        return store

    yield open_
    for store in stores:
        await store.aclose()


OpenStore = Callable[..., DocumentStore]
