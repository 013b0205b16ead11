"""Tokens of clouds instead of passwords, with a real server that knows some of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import botocore.auth
import botocore.session
import pytest
from aiohttp import web
from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.model import ServiceId
from botocore.signers import RequestSigner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from relay.config.schema import Redis as RedisOptions
from relay.errors import ConfigError, StoreUnavailable
from relay.model.payload import Payload
from relay.stores import DataStore
from relay.stores.redis.awsidentity import VALIDITY, make_token
from relay.stores.redis.connect import connect
from relay.stores.redis.divided import data_store
from relay.stores.redis.identity import REAUTHENTICATION, make_identity
from relay.stores.redis.store import RedisStore
from tests.stores.contract import flag
from tests.support.authorities import Authority
from tests.support.aws import ContainerCredentials, without_credentials
from tests.support.clocks import SystemClock
from tests.support.redis import RedisServer, encrypted

KEY_ID, SECRET = "AKIATEST", "secret/of+the=tests"
REGION = "eu-central-1"
TOKEN_OF_A_SESSION = "IQoJb3JpZ2luX2VjE+/=="


class Time:
    """The time by which botocore and the relay go, and google-auth; a test moves it."""

    def __init__(self, patch: pytest.MonkeyPatch, system: SystemClock) -> None:
        self._system = system
        self.now = datetime(2026, 3, 1, 12, 0, 0)  # noqa: DTZ001 - as botocore has it
        patch.setattr(botocore.auth, "get_current_datetime", lambda: self.now)
        patch.setattr("google.auth._helpers.utcnow", lambda: self.now)

    def skip(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self._system.skip(seconds)


@pytest.fixture(name="time")
def moved_time(monkeypatch) -> Any:
    with SystemClock() as system:
        yield Time(monkeypatch, system)


@pytest.fixture(autouse=True)
def credentials(monkeypatch, tmp_path) -> None:
    """Those of variables."""
    without_credentials(monkeypatch, str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", REGION)


def expected(
    user: str = "relay",
    cache: str = "flags",
    service: str = "elasticache",
    *,
    region: str = REGION,
    key_id: str = KEY_ID,
    session_token: str | None = None,
    serverless: bool = False,
) -> str:
    """The token as AWS's examples make it, with botocore's own signer."""
    signer = RequestSigner(
        ServiceId(service),
        region,
        service,
        "v4",
        Credentials(key_id, SECRET, session_token),
        botocore.session.get_session().get_component("event_emitter"),
    )
    query = {"Action": "connect", "User": user}
    if serverless:
        query["ResourceType"] = "ServerlessCache"
    url = f"https://{cache}/?{botocore.compat.urlencode(query)}"
    request = {"method": "GET", "url": url, "body": {}, "headers": {}, "context": {}}
    signed = signer.generate_presigned_url(
        request, operation_name="connect", expires_in=900, region_name=region
    )
    return str(signed).removeprefix("https://")


def iam(**more: Any) -> dict[str, Any]:
    return {"identity": "aws", "username": "relay", "iam_cache": "flags"} | more


# The token


@pytest.mark.parametrize("session_token", [None, TOKEN_OF_A_SESSION])
@pytest.mark.parametrize("user", ["relay", "a user+ä&b=c/d"])
@pytest.mark.parametrize(
    ("service", "signed"),
    [
        ("elasticache", "elasticache"),
        ("elasticache-serverless", "elasticache"),
        ("memorydb", "memorydb"),
    ],
)
def test_a_token_is_that_of_botocores_signer(time, service, signed, user, session_token):
    """Byte for byte, at the same time."""
    credentials = ReadOnlyCredentials(KEY_ID, SECRET, session_token)
    token = make_token(credentials, service, "us-gov-west-1", "flags-1", user)
    wanted = expected(
        user,
        "flags-1",
        signed,
        region="us-gov-west-1",
        session_token=session_token,
        serverless=service != signed,
    )
    assert token == wanted
    assert f"X-Amz-Expires={VALIDITY}&" in token
    assert token.startswith("flags-1/?Action=connect&User=")


def test_names_of_caches_are_in_lower_case(time):
    """AWS keeps them so, whatever was typed when the cache was made."""
    credentials = ReadOnlyCredentials(KEY_ID, SECRET, None)
    token = make_token(credentials, "elasticache", REGION, "Flags", "Relay")
    assert token == expected("Relay", "flags")


@pytest.mark.parametrize(
    ("options", "environ", "region"),
    [
        ({}, {"AWS_REGION": "us-west-2"}, "us-west-2"),
        ({}, {"AWS_DEFAULT_REGION": "eu-west-1"}, "eu-west-1"),
        ({"iam_region": "ap-south-1"}, {"AWS_REGION": "us-west-2"}, "ap-south-1"),
    ],
)
async def test_the_region_is_that_of_the_cache(time, monkeypatch, options, environ, region):
    """Its option counts before AWS's variables."""
    monkeypatch.delenv("AWS_REGION")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    identity = make_identity(RedisOptions(**iam(**options)), os.environ)
    assert await identity.get_credentials_async() == ("relay", expected(region=region))


# Connections


async def lose_connection(server: RedisServer, store: RedisStore) -> None:
    """Close the connection from the server's side, and let the store notice."""
    server.do("CLIENT", "KILL", "USER", "relay")
    with contextlib.suppress(StoreUnavailable):
        await store.load()


@pytest.fixture
async def front(server, tmp_path) -> AsyncIterator[dict[str, str]]:
    """The options for the server behind TLS."""
    authority = Authority(tmp_path)
    server.do("CONFIG", "RESETSTAT")
    async with encrypted(server, authority.server("localhost")) as url:
        yield {"url": url, "ca_file": str(authority.file)}
    server.do("ACL", "DELUSER", "relay")


def allow(server: RedisServer, token: str) -> None:
    """Let the user in with this token, and with no other any more."""
    server.do("ACL", "SETUSER", "relay", "reset", "on", f">{token}", "allkeys", "+@all")


def clients(server: RedisServer) -> set[str]:
    """The IDs of the user's connections."""
    with contextlib.closing(server.client()) as client:
        return {each["id"] for each in client.client_list() if each["user"] == "relay"}


async def write(store: DataStore, version: int) -> None:
    await store.init(Payload.of([flag("lamp", version)]))


async def test_a_connection_shows_a_token(time, server, front):
    """One AUTH for any number of commands."""
    allow(server, expected())
    store = RedisStore(connect(server.options(**front, **iam())))
    for version in (1, 2, 3):
        await write(store, version)
    assert server.calls()["auth"] == 1
    await store.aclose()


async def test_a_connection_shows_a_new_token_before_the_server_closes_it(time, server, front):
    """The same connection, before twelve hours; the former token is worth nothing by then."""
    allow(server, expected())
    store = RedisStore(connect(server.options(**front, **iam())))
    await write(store, 1)
    [client] = clients(server)
    for round_ in (2, 3):
        time.skip(REAUTHENTICATION - 1)
        allow(server, expected())
        await write(store, round_)
        time.skip(1)
        allow(server, expected())
        await write(store, round_)
        assert server.calls()["auth"] == round_
        assert clients(server) == {client}
    assert REAUTHENTICATION < 12 * 3600
    await store.aclose()


async def test_a_new_connection_shows_a_new_token(time, server, front):
    """A token is valid for 15 minutes, and a database may be restarted after days."""
    allow(server, expected())
    store = RedisStore(connect(server.options(**front, **iam())))
    await write(store, 1)
    time.skip(VALIDITY)
    allow(server, expected())
    await lose_connection(server, store)
    await write(store, 2)
    await store.aclose()


async def test_a_connection_that_is_not_let_in_again_is_replaced(time, server, front):
    """If the new token is refused, the reason is told, and nothing is written."""
    allow(server, expected())
    store = RedisStore(connect(server.options(**front, **iam())))
    await write(store, 1)
    allow(server, "another token")
    time.skip(REAUTHENTICATION)
    with pytest.raises(StoreUnavailable, match="refuses user or password") as caught:
        await write(store, 2)
    assert "X-Amz" not in str(caught.value)
    allow(server, expected())
    await write(store, 2)
    await store.aclose()


async def test_refused_credentials_are_looked_for_again(time, server, front, monkeypatch):
    """Files and variables may have others by now."""
    allow(server, expected(key_id="AKIANEW"))
    store = RedisStore(connect(server.options(**front, **iam())))
    with pytest.raises(StoreUnavailable, match="refuses user or password") as caught:
        await write(store, 1)
    assert SECRET not in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANEW")
    await write(store, 1)
    await store.aclose()


async def test_each_server_of_a_cluster_is_shown_a_token(time, cluster):
    """Without TLS here, which the configuration would not allow."""
    for server in cluster.running:
        allow(server, expected())
    store = data_store(connect(cluster.options(**iam())), "p")
    try:
        await write(store, 1)
        assert all(clients(server) for server in cluster.masters)
        time.skip(VALIDITY)
        for server in cluster.running:
            allow(server, expected())
            server.do("CLIENT", "KILL", "USER", "relay")
        with contextlib.suppress(StoreUnavailable):
            await store.load()
        await write(store, 2)
    finally:
        await store.aclose()
        for server in cluster.running:
            server.do("ACL", "DELUSER", "relay")


async def test_credentials_of_a_container_are_renewed_before_they_expire(time, monkeypatch):
    """As for all services of AWS; the token is signed with the key of the moment."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    async with ContainerCredentials(lifetime=60) as container:
        container.use(monkeypatch)
        identity = make_identity(RedisOptions(**iam()), os.environ)
        for _ in range(2):
            _, token = await identity.get_credentials_async()
            assert f"Credential={container.given[-1]}%2F" in token
    assert len(container.given) > 2


async def test_what_is_missing_is_told_in_one_line(server, front, monkeypatch):
    """Credentials, and the region."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    store = RedisStore(connect(server.options(**front, **iam())))
    with pytest.raises(StoreUnavailable) as caught:
        await store.load()
    told = "there are no AWS credentials, neither in variables nor elsewhere"
    assert str(caught.value) == told
    await store.aclose()
    monkeypatch.delenv("AWS_REGION")
    store = RedisStore(connect(server.options(**front, **iam())))
    with pytest.raises(StoreUnavailable) as caught:
        await store.load()
    assert str(caught.value) == "there is no region; AWS_REGION or REDIS_IAM_REGION names it"
    await store.aclose()
    assert "auth" not in server.calls()


@pytest.mark.parametrize(
    ("identity", "library", "ours"),
    [("aws", "botocore.auth", "awsidentity"), ("gcp", "google.auth", "gcpidentity")],
)
def test_a_missing_library_is_named(monkeypatch, identity, library, ours):
    """With what to install."""
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"relay.stores.redis.{ours}", raising=False)
    options = RedisOptions(url="rediss://h", identity=identity, username="u", iam_cache="c")
    with pytest.raises(ConfigError, match=re.escape(f"pip install 'relay[{identity}]'")):
        RedisStore(connect(options))


# Google Cloud


class Google:
    """Google's endpoint for access tokens, and a service account that it knows."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "account.json"
        self.given = 0
        self.is_down = False

    async def give(self, request: web.Request) -> web.Response:
        form = await request.post()
        if self.is_down or form["grant_type"] != "urn:ietf:params:oauth:grant-type:jwt-bearer":
            return web.json_response({"error": "unavailable"}, status=400)
        self.given += 1
        token = f"ya29.{self.given}"
        return web.json_response({"access_token": token, "expires_in": 3600, "scope": "x"})

    def install(self, url: str, patch: pytest.MonkeyPatch) -> None:
        """Write the file of the service account, and name it in the variable."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        account = {
            "type": "service_account",
            "project_id": "p",
            "private_key_id": "1",
            "private_key": key.decode(),
            "client_email": "relay@p.iam.gserviceaccount.com",
            "client_id": "1",
            "token_uri": f"{url}/token",
        }
        self._file.write_text(json.dumps(account))
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(self._file))


@pytest.fixture(name="google")
async def google_cloud(tmp_path, monkeypatch) -> AsyncIterator[Google]:
    """It answers in the event loop of the test: whoever holds that gets no token."""
    google = Google(tmp_path)
    app = web.Application()
    app.router.add_post("/token", google.give)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    google.install(f"http://127.0.0.1:{runner.addresses[0][1]}", monkeypatch)
    yield google
    await runner.cleanup()


async def test_an_access_token_is_renewed_before_it_expires(time, server, front, google):
    """The former is worth nothing by then."""
    allow(server, "ya29.1")
    store = RedisStore(connect(server.options(**front, identity="gcp", username="relay")))
    await write(store, 1)
    await write(store, 2)
    assert google.given == 1
    time.skip(3600 - 60)
    allow(server, "ya29.2")
    await lose_connection(server, store)
    await write(store, 3)
    assert google.given == 2
    time.skip(REAUTHENTICATION)
    allow(server, "ya29.3")
    await write(store, 4)
    assert google.given == 3
    await store.aclose()


async def test_connections_share_an_access_token(google):
    """Those that are opened at the same time, too."""
    identity = make_identity(RedisOptions(identity="gcp"), {})
    given = await asyncio.gather(*(identity.get_credentials_async() for _ in range(10)))
    assert set(given) == {("ya29.1",)}
    assert google.given == 1


async def test_the_default_user_shows_the_token_alone(google, tmp_path):
    """As Memorystore's examples do."""
    authority = Authority(tmp_path)
    with RedisServer(tmp_path, requirepass="ya29.1") as server:
        async with encrypted(server, authority.server("localhost")) as url:
            options = server.options(url=url, ca_file=str(authority.file), identity="gcp")
            store = RedisStore(connect(options))
            await write(store, 1)
            await store.aclose()


async def test_a_refusal_of_google_is_told(server, front, google, monkeypatch):
    """As is that there are no credentials; each in one line."""
    allow(server, "ya29.1")
    google.is_down = True
    options = server.options(**front, identity="gcp", username="relay")
    store = RedisStore(connect(options))
    with pytest.raises(StoreUnavailable, match=r"Google gives no access token: .*unavailable"):
        await write(store, 1)
    google.is_down = False
    await write(store, 1)
    await store.aclose()
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", "/nowhere")
    store = RedisStore(connect(options))
    with pytest.raises(StoreUnavailable) as caught:
        await write(store, 1)
    told = (
        "there are no Google credentials, neither in GOOGLE_APPLICATION_CREDENTIALS nor elsewhere"
    )
    assert str(caught.value) == told
    await store.aclose()
