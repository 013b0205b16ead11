"""Credentials that end while a relay runs, for S3 and DynamoDB alike."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

import pytest

from relay.errors import ConfigError, StoreUnavailable
from relay.stores.aws.session import RENEWAL
from relay.stores.documents.location import Location
from relay.stores.documents.s3 import S3Connection, S3Place
from relay.stores.dynamodb.connect import connect
from relay.stores.dynamodb.store import DynamoDBStore
from tests.support.aws import ContainerCredentials, Guard, without_credentials
from tests.support.clocks import SystemClock
from tests.support.dynamodb import DynamoDBServer, dynamodb
from tests.support.s3 import Bucket, S3Server

__all__ = ["dynamodb"]


@pytest.fixture(autouse=True)
def variables(monkeypatch, tmp_path) -> None:
    """No credentials, but a region."""
    without_credentials(monkeypatch, str(tmp_path))
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@pytest.fixture(scope="session")
def s3(tmp_path_factory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


class OfS3:
    """A place in a bucket, behind a guard."""

    def __init__(self, bucket: Bucket) -> None:
        self._place = S3Place(Location.of(bucket.url, "x"), S3Connection(os.environ))
        self.aclose = self._place.aclose

    async def ask(self) -> None:
        """Send one request."""
        await self._place.is_unchanged(None)


class OfDynamoDB:
    """An environment in a table, behind a guard."""

    def __init__(self, guard: Guard, table: str) -> None:
        self._store = DynamoDBStore(connect(guard.url, os.environ).share(), table, "p")
        self.aclose = self._store.aclose

    async def ask(self) -> None:
        """Send one request."""
        await self._store.versions()


Client = OfS3 | OfDynamoDB


@pytest.fixture(params=["S3", "DynamoDB"])
async def guarded(request, monkeypatch) -> AsyncIterator[tuple[Guard, Client]]:
    """A client of each service, not yet connected, and the guard before the service."""
    client: Client
    if request.param == "S3":
        server: S3Server = request.getfixturevalue("s3")
        async with Guard(f"http://127.0.0.1:{server.port}") as guard:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", guard.url)
            client = OfS3(server.new_bucket())
            yield guard, client
            await client.aclose()
    else:
        dynamodb: DynamoDBServer = request.getfixturevalue("server")
        async with Guard(dynamodb.url) as guard:
            client = OfDynamoDB(guard, dynamodb.new_table().name)
            yield guard, client
            await client.aclose()


@pytest.mark.parametrize(("lifetime", "different"), [(3600, 1), (60, 3)])
async def test_a_containers_credentials_are_renewed_before_they_expire(
    guarded, monkeypatch, lifetime, different
):
    """By one and the same client; not before they are about to."""
    guard, client = guarded
    async with ContainerCredentials(lifetime) as container:
        container.use(monkeypatch)
        for _ in range(3):
            await client.ask()
            assert guard.keys[-1] == container.given[-1]
    assert len(set(guard.keys)) == different
    assert set(guard.regions) == {"us-east-1"}


@pytest.mark.parametrize("status", [400, 403])
async def test_refused_credentials_are_looked_for_again(guarded, monkeypatch, status):
    """Of variables, which do not say when they expire; S3 answers some requests without a body."""
    guard, client = guarded
    guard.status = status
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAOLD")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    await client.ask()
    guard.refused.add("AKIAOLD")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANEW")
    with pytest.raises(StoreUnavailable) as caught:
        await client.ask()
    assert "very-secret" not in str(caught.value)
    assert guard.keys[-1] == "AKIAOLD"
    await client.ask()
    assert guard.keys[-1] == "AKIANEW"


async def test_refused_credentials_are_looked_for_every_few_seconds(guarded, monkeypatch):
    """Not at each request: a hundred environments would make a hundred clients."""
    guard, client = guarded
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    guard.refused |= {"AKIA1", "AKIA2", "AKIA3"}
    steps = [(1, 0.0, 1), (2, 0.0, 2), (3, 0.0, 2), (3, RENEWAL, 2), (3, 0.0, 3)]
    with SystemClock() as system:
        for number, wait, used in steps:
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"AKIA{number}")
            system.skip(wait)
            with pytest.raises(StoreUnavailable):
                await client.ask()
            assert guard.keys[-1] == f"AKIA{used}"


async def test_an_endpoint_for_credentials_may_be_away(guarded, monkeypatch):
    """The request fails, and the next succeeds when it is back."""
    guard, client = guarded
    async with ContainerCredentials(3600) as container:
        container.use(monkeypatch)
        container.is_down = True
        with pytest.raises(StoreUnavailable, match="credentials"):
            await client.ask()
        container.is_down = False
        await client.ask()
    assert guard.keys == ["AKIA1"]


async def test_requests_under_way_keep_their_client(guarded, monkeypatch):
    """A client that is replaced is closed when its last request has its answer."""
    guard, client = guarded
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAOLD")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    await client.ask()
    guard.refused.add("AKIAOLD")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANEW")
    outcomes = await asyncio.gather(*(client.ask() for _ in range(20)), return_exceptions=True)
    assert all(each is None or isinstance(each, StoreUnavailable) for each in outcomes)
    await client.ask()


@pytest.mark.parametrize("connection", [S3Connection, lambda environ: connect("", environ)])
def test_a_profile_that_does_not_exist_is_an_error(connection, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="nobody"):
        connection(os.environ)
