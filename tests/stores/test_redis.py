"""The layout in Redis is the one that SDKs read; what the server refuses is said without secrets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
import sys

import pytest
import trustme

from relay.config.schema import Redis as RedisOptions
from relay.errors import ConfigError, StoreUnavailable
from relay.model.item import Kind
from relay.model.payload import Payload
from relay.stores import UNREADABLE
from relay.stores.redis import CHUNK, SLICE, RedisStore
from tests.stores.contract import StoreContract, flag, segment
from tests.support.redis import RedisServer, commands_of_ld_relay, secret

ONE = Payload.of([flag("lamp", 1)])


@pytest.fixture
async def store(server):
    store = RedisStore(server.options(), "p")
    yield store
    await store.aclose()


class TestContract(StoreContract):
    """What every store promises."""


async def test_the_layout_is_that_of_the_sdks(server, store):
    """Two hashes and a marker; tombstones are whole objects that old SDKs can parse."""
    await store.init(Payload.of([flag("lamp", 3), flag("gone", 4, None), segment("crowd", 5)]))
    assert set(server.do("KEYS", "*")) == {b"p:features", b"p:segments", b"p:$inited"}
    assert server.do("GET", "p:$inited") == b""
    assert server.hash("p:segments") == {"crowd": b'{"key":"crowd","version":5}'}
    features = server.hash("p:features")
    assert features["lamp"] == b'{"key":"lamp","version":3}'
    tombstone = json.loads(features["gone"])
    assert (tombstone["key"], tombstone["version"], tombstone["deleted"]) == ("$deleted", 4, True)
    assert server.do("TTL", "p:features") == -1


async def test_without_a_prefix_keys_begin_with_launchdarkly(server):
    """The default is that of the SDKs."""
    store = RedisStore(server.options())
    await store.init(ONE)
    await store.aclose()
    assert server.do("EXISTS", "launchdarkly:$inited", "launchdarkly:features") == 2


async def test_keys_of_others_are_never_touched(server, store):
    """Neither other prefixes nor unrelated keys."""
    server.do("HSET", "p2:features", "x", "1")
    server.do("SET", "unrelated", "1")
    await store.init(ONE)
    await store.init(Payload.of([]))
    assert server.do("EXISTS", "p2:features", "unrelated") == 2


async def test_an_unreadable_item_is_reported_and_skipped(server, store):
    """One bad item does not hide the others, and any version replaces it."""
    await store.init(Payload.of([flag("lamp", 1), flag("bad", 2)]))
    server.do("HSET", "p:features", "bad", "{nope")
    server.do("HSET", "p:segments", "worse", '{"version":"x"}')
    stored = await store.load()
    assert list(stored.payload) == [flag("lamp", 1)]
    assert {(bad.kind, bad.key) for bad in stored.invalid} == {
        (Kind.FLAG, "bad"),
        (Kind.SEGMENT, "worse"),
    }
    assert (await store.versions())[Kind.FLAG, "bad"] == UNREADABLE
    await store.upsert([flag("bad", 2)])
    assert (await store.load()).payload.get(Kind.FLAG, "bad") == flag("bad", 2)


async def test_items_larger_than_a_command_are_whole(server, store):
    """What is sent in several commands is one transaction all the same."""
    pad = b"x" * (CHUNK // 3)
    items = [flag(f"f{i}", 1, b'{"version":1,"pad":"%b"}' % pad) for i in range(10)]
    await store.init(Payload.of(items))
    assert set((await store.load()).payload) == set(items)


async def test_two_writers_never_take_a_version_back(server):
    """Whoever is quicker: what is stored only ever gets newer, and the newest arrives."""
    stores = [RedisStore(server.options(), "p") for _ in range(4)]
    await stores[0].init(Payload.of([]))
    order = [(flag(f"f{n % 3}", version), n % 4) for n, version in enumerate(range(1, 121))]
    random.Random(1).shuffle(order)
    seen: dict[str, int] = {}

    async def write(number: int) -> None:
        for item, owner in order:
            if owner == number:
                await stores[number].upsert([item])

    async def watch() -> None:
        while True:
            for (_, key), version in (await stores[0].versions()).items():
                assert version.number >= seen.get(key, 0)
                seen[key] = version.number

    watching = asyncio.create_task(watch())
    await asyncio.gather(*map(write, range(4)))
    watching.cancel()
    await asyncio.wait([watching])
    assert watching.cancelled()
    newest = {f"f{n}": max(i.version for i, _ in order if i.key == f"f{n}") for n in range(3)}
    versions = await stores[0].versions()
    assert {key: version.number for (_, key), version in versions.items()} == newest
    for store in stores:
        await store.aclose()


async def test_a_database_number_and_a_user_in_the_url(server):
    """`redis://user:password@host:port/N` means what it says."""
    server.do("ACL", "SETUSER", "anna", "on", ">geheim", "~p:*", "+@all", "-@scripting")
    url = f"redis://anna:geheim@127.0.0.1:{server.port}/3"
    store = RedisStore(server.options(url=url), "p")
    await store.init(ONE)
    assert await store.upsert([flag("lamp", 2)])
    await store.aclose()
    with server.client(db=3) as client:
        assert client.exists("p:$inited") == 1
    assert store.server == f"redis://anna:xxxxx@127.0.0.1:{server.port}/3"


async def test_user_and_password_beside_the_url(server):
    """REDIS_USERNAME and REDIS_PASSWORD count where the URL says nothing."""
    server.do("ACL", "SETUSER", "ben", "on", ">geheim", "~*", "+@all")
    address = f"127.0.0.1:{server.port}"
    for url, password in [
        (f"redis://{address}", "geheim"),
        (f"redis://:geheim@{address}", "is-not-used"),
        (f"redis://geheim@{address}", ""),
    ]:
        options = server.options(url=url, username="ben", password=secret(password))
        store = RedisStore(options)
        await store.init(ONE)
        await store.aclose()
        assert "geheim" not in store.server


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", {"host": "h", "port": 6379, "db": 0}),
        ("redis://h:7/", {"port": 7, "db": 0}),
        ("rediss://[::1]:7/12", {"host": "::1", "db": 12}),
        ("redis://anna:p%40ss@h", {"username": "anna", "password": "p@ss"}),
        ("redis://:p%2Fss@h", {"username": None, "password": "p/ss"}),
        ("redis://p%2Fss@h", {"username": None, "password": "p/ss"}),
        ("unix:///run/a%20b.sock", {"path": "/run/a b.sock", "db": 0}),
        ("unix://:p@/run/s?db=4", {"path": "/run/s", "db": 4, "password": "p"}),
    ],
)
def test_a_url_means_what_the_reference_makes_of_it(url, expected):
    """What stands alone before the `@` is a password."""
    arguments = {"username": None, **RedisStore(RedisOptions(url=url))._pool.connection_kwargs}
    assert {name: arguments[name] for name in expected} == expected


@pytest.mark.parametrize(
    "url",
    [
        "redis://:geheim@h/x",
        "redis://:geheim@h/1/2",
        "redis://:geheim@h?password=geheim",
        "rediss://h?ssl_cert_reqs=none",
        "redis://h:1?password=geheim@",
        "redis://anna:1/geheim@h",
        "redis://anna:1?geheim@h",
        "redis://anna:1#geheim@h",
        "unix://",
        "unix:///s?db=x",
        "unix:///s?timeout=1",
    ],
)
def test_a_url_that_means_nothing_is_refused(url):
    """It would be another database than the one that is meant, or one that is not checked."""
    with pytest.raises(ConfigError, match="the URL cannot be used") as caught:
        RedisStore(RedisOptions(url=url))
    assert "geheim" not in str(caught.value)


async def test_the_commands_of_ld_relay_suffice(tmp_path):
    """A user with rights to just these can be used, as before; nothing else is even tried."""
    with RedisServer(tmp_path) as server:
        server.add_user_of_ld_relay("few", "geheim", "p")
        url = f"redis://few:geheim@127.0.0.1:{server.port}/3"
        store = RedisStore(server.options(url=url), "p")
        many = [flag(f"f{n}", 1) for n in range(2 * SLICE + 1)]
        await store.init(Payload.of([*many, segment("crowd", 1)]))
        newer = [flag("f0", 2), flag(f"f{2 * SLICE}", 2, None), flag("new", 1), segment("crowd", 2)]
        assert await store.upsert([*newer, *many])
        assert set((await store.load()).payload) == set(Payload.of([*many, *newer]))
        assert len(await store.versions()) == len(many) + 2
        server.do("FLUSHALL")
        assert await store.load() is None
        assert not await store.upsert(newer)
        await store.aclose()
        assert server.denied() == []


def test_the_recording_names_what_the_database_needs():
    """The rights that the tests give are those of the recording, and HMGET is none of them."""
    wanted = "AUTH DEL EXEC EXISTS HGET HGETALL HSET MULTI PING SELECT SET UNWATCH WATCH"
    assert commands_of_ld_relay() == wanted.split()


async def test_a_unix_socket(server):
    """`unix://` works where the server is on the same machine."""
    store = RedisStore(server.options(url=f"unix://{server.socket}"), "p")
    await store.init(ONE)
    await store.aclose()
    assert server.do("EXISTS", "p:$inited") == 1


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until the end."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()


async def test_tls_with_client_certificates(server, tmp_path):
    """`rediss://` with an authority of one's own and a certificate of the client.

    The server at hand knows no TLS, so something that does stands before it.
    """
    authority = trustme.CA()
    files = {name: str(tmp_path / f"{name}.pem") for name in ("ca", "cert", "key")}
    issued = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(files["ca"])
    issued.cert_chain_pems[0].write_to_path(files["cert"])
    issued.private_key_pem.write_to_path(files["key"])
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files["ca"])
    tls.load_cert_chain(files["cert"], files["key"])
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.maximum_version = ssl.TLSVersion.TLSv1_2  # refuses within the handshake

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(server.socket)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async with await asyncio.start_server(forward, "localhost", 0, ssl=tls) as front:
        url = f"rediss://localhost:{front.sockets[0].getsockname()[1]}"
        trusted = {"url": url, "ca_file": files["ca"]}
        certified = {
            "client_certificate_file": files["cert"],
            "client_key_file": files["key"],
        }
        store = RedisStore(server.options(**trusted, **certified))
        await store.init(ONE)
        await store.aclose()
        for options in ({"url": url}, trusted):
            store = RedisStore(server.options(**options))
            with pytest.raises(StoreUnavailable):
                await store.load()
            await store.aclose()
    assert server.do("EXISTS", "launchdarkly:$inited") == 1


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (("CONFIG", "SET", "requirepass", "geheim"), "the server refuses user or password"),
        (("REPLICAOF", "127.0.0.1", "1"), "the server answers: .*read only"),
        (("CONFIG", "SET", "maxmemory", "1"), "the server answers: .*maxmemory"),
    ],
)  # fmt: skip
async def test_a_server_that_refuses_is_unavailable(tmp_path, break_it, reason):
    """What it answers is passed on; nothing was changed."""
    with RedisServer(tmp_path) as server:
        store = RedisStore(server.options(), "p")
        await store.init(ONE)
        server.do(*break_it)
        await store.aclose()
        with pytest.raises(StoreUnavailable, match=reason):
            await store.init(Payload.of([]))
        with pytest.raises(StoreUnavailable, match=reason):
            await store.upsert([flag("lamp", 2)])
        await store.aclose()


async def test_a_wrong_password_is_not_shown(tmp_path):
    """Neither ours nor the right one."""
    with RedisServer(tmp_path, requirepass="the-right-one") as server:
        url = f"redis://:the-wrong-one@127.0.0.1:{server.port}"
        store = RedisStore(server.options(url=url))
        with pytest.raises(StoreUnavailable, match="refuses user or password") as caught:
            await store.load()
        await store.aclose()
    assert "one" not in str(caught.value) + store.server


async def test_a_server_that_repeats_the_password_is_not_quoted(tmp_path):
    """One that does not know AUTH does so."""
    with RedisServer(tmp_path, rename_command='AUTH ""') as server:
        store = RedisStore(server.options(url=f"redis://anna:geheim@127.0.0.1:{server.port}"))
        with pytest.raises(StoreUnavailable, match="unknown command 'AUTH'") as caught:
            await store.load()
        await store.aclose()
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-MISCONF Redis is configured to save RDB snapshots, but it cannot\r\n",
        b"-NOAUTH Authentication required.\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"",
    ],
)
async def test_whatever_a_server_answers_it_is_unavailable(answer):
    """A database that starts, cannot save, is none, or closes connections: one exception of ours."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answer and (commands := await reader.read(65536)):
            writer.write(answer * commands.count(b"*"))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as fake:
        url = f"redis://127.0.0.1:{fake.sockets[0].getsockname()[1]}"
        store = RedisStore(RedisOptions(url=url, connect_timeout=0.1, read_timeout=0.1))
        for attempt in (store.load, store.versions):
            with pytest.raises(StoreUnavailable):
                await attempt()
        with pytest.raises(StoreUnavailable):
            await store.init(ONE)
        with pytest.raises(StoreUnavailable):
            await store.upsert([flag("lamp", 2)])
        await store.aclose()


async def test_a_server_that_is_gone_or_hangs_is_unavailable(tmp_path):
    """Nothing waits for longer than the configured times, and a new server is found again."""
    with RedisServer(tmp_path) as server:
        store = RedisStore(server.options(read_timeout=0.2), "p")
        await store.init(ONE)
        server.pause()
        with pytest.raises(StoreUnavailable, match="no answer in time"):
            await store.load()
        server.go_on()
        assert await store.load()
        server.kill()
        with pytest.raises(StoreUnavailable):
            await store.load()
        server.start()
        assert await store.load() is None
        await store.aclose()


async def test_a_killed_init_leaves_the_old_data(server):
    """A transaction that was not completed has not happened."""
    store = RedisStore(server.options(), "p")
    await store.init(ONE)
    pad = b'{"version":2,"pad":"%b"}' % (b"x" * CHUNK)
    large = Payload.of(flag(f"f{i}", 2, pad) for i in range(40))
    for turns in range(1, 60, 7):
        init = asyncio.create_task(store.init(large))
        for _ in range(turns):
            await asyncio.sleep(0)
        init.cancel()
        await asyncio.wait([init])
        stored = await store.load()
        assert set(stored.payload) in ({*ONE}, {*large})
    await store.aclose()


WRITER = """
import asyncio, sys
from relay.config.schema import Redis
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.stores.redis import RedisStore

async def write() -> None:
    store = RedisStore(Redis(url=sys.argv[1]), "p")
    for version in range(1, 1000):
        json = b'{"version":%d,"pad":"%b"}' % (version, b"x" * 250_000)
        await store.init(Payload.of(Item(Kind.FLAG, f"f{i}", version, json) for i in range(40)))
        print(version, flush=True)

asyncio.run(write())
"""


async def test_a_relay_that_is_killed_leaves_the_old_or_the_new_data(server, store):
    """Never half: killed at any moment of an init, all items are of one version."""
    for inits in range(1, 6):
        writer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, server.url, stdout=asyncio.subprocess.PIPE
        )
        for _ in range(inits):
            assert await writer.stdout.readline()
        await asyncio.sleep(0.003 * inits)  # somewhere within the next
        writer.kill()
        await writer.communicate()
        numbers = [version.number for version in (await store.versions()).values()]
        assert len(numbers) == 40
        assert len(set(numbers)) == 1
