"""The Redis store has the layout that SDKs read, and reports errors without secrets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import socket
import ssl
import sys

import pytest
import uvloop

from relay.config.schema import Redis as RedisOptions
from relay.errors import ConfigError, StoreUnavailable
from relay.model.item import Kind
from relay.model.payload import Payload
from relay.stores import UNREADABLE
from relay.stores.redis.connect import connect
from relay.stores.redis.connections import MAX_CONNECTIONS
from relay.stores.redis.layout import CHUNK
from relay.stores.redis.store import BATCH, RedisStore
from tests.stores.contract import StoreContract, flag, segment
from tests.support.authorities import UNTIDY, Authority
from tests.support.peers import peer
from tests.support.redis import RedisServer, commands_of_ld_relay, encrypted, secret
from tests.support.serving import until

ONE = Payload.of([flag("lamp", 1)])


@pytest.fixture
async def store(server):
    store = RedisStore(connect(server.options()), "p")
    yield store
    await store.aclose()


class TestContract(StoreContract):
    """The contract of all data stores."""


async def test_the_layout_is_that_of_the_sdks(server, store):
    """Two hashes and a marker; tombstones are complete objects that old SDKs can parse."""
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
    store = RedisStore(connect(server.options()))
    await store.init(ONE)
    await store.aclose()
    assert server.do("EXISTS", "launchdarkly:$inited", "launchdarkly:features") == 2


async def test_the_repr_states_server_and_prefix():
    """Passwords are masked."""
    store = RedisStore(connect(RedisOptions(url="redis://anna:geheim@h/3")), "p")
    assert repr(store) == "<RedisStore redis://anna:xxxxx@h/3 'p'>"


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
    """Items sent in several commands are written in one transaction."""
    pad = b"x" * (CHUNK // 3)
    items = [flag(f"f{i}", 1, b'{"version":1,"pad":"%b"}' % pad) for i in range(10)]
    await store.init(Payload.of(items))
    assert set((await store.load()).payload) == set(items)


async def test_two_writers_never_take_a_version_back(server):
    """Stored items only become newer, and the newest version is stored in the end."""
    stores = [RedisStore(connect(server.options()), "p") for _ in range(4)]
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
    """All parts of `redis://user:password@host:port/N` are used."""
    server.do("ACL", "SETUSER", "anna", "on", ">geheim", "~p:*", "+@all", "-@scripting")
    url = f"redis://anna:geheim@127.0.0.1:{server.port}/3"
    store = RedisStore(connect(server.options(url=url)), "p")
    await store.init(ONE)
    assert await store.upsert([flag("lamp", 2)])
    await store.aclose()
    with server.client(db=3) as client:
        assert client.exists("p:$inited") == 1
    assert store.server == f"redis://anna:xxxxx@127.0.0.1:{server.port}/3"


async def test_user_and_password_beside_the_url(server):
    """REDIS_USERNAME and REDIS_PASSWORD are used where the URL has neither."""
    server.do("ACL", "SETUSER", "ben", "on", ">geheim", "~*", "+@all")
    address = f"127.0.0.1:{server.port}"
    for url, password in [
        (f"redis://{address}", "geheim"),
        (f"redis://:geheim@{address}", "is-not-used"),
        (f"redis://geheim@{address}", ""),
    ]:
        options = server.options(url=url, username="ben", password=secret(password))
        store = RedisStore(connect(options))
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
async def test_urls_are_read_like_ld_relay(url, expected):
    """A single word before the `@` is a password."""
    client = connect(RedisOptions(url=url))
    host, port = await client._placement.address_of(0)
    arguments = {"username": None, "path": host, "host": host, "port": port}
    arguments |= client._connections._arguments
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
def test_unsupported_urls_are_refused(url):
    """They would select another database, or one whose certificate is not verified."""
    with pytest.raises(ConfigError, match="the URL cannot be used") as caught:
        connect(RedisOptions(url=url))
    assert "geheim" not in str(caught.value)


async def test_the_commands_of_ld_relay_suffice(tmp_path):
    """A user with permissions for just these suffices; no other command is tried."""
    with RedisServer(tmp_path) as server:
        server.add_user_of_ld_relay("few", "geheim", "p")
        url = f"redis://few:geheim@127.0.0.1:{server.port}/3"
        store = RedisStore(connect(server.options(url=url)), "p")
        many = [flag(f"f{n}", 1) for n in range(2 * BATCH + 1)]
        await store.init(Payload.of([*many, segment("crowd", 1)]))
        newer = [flag("f0", 2), flag(f"f{2 * BATCH}", 2, None), flag("new", 1), segment("crowd", 2)]
        assert await store.upsert([*newer, *many])
        assert set((await store.load()).payload) == set(Payload.of([*many, *newer]))
        assert len(await store.versions()) == len(many) + 2
        server.do("FLUSHALL")
        assert await store.load() is None
        assert not await store.upsert(newer)
        await store.aclose()
        assert server.denied() == []


def test_the_recording_names_what_the_database_needs():
    """The tests grant the permissions of the recording; HMGET is not among them."""
    wanted = "AUTH DEL EXEC EXISTS HGET HGETALL HSET MULTI PING SELECT SET UNWATCH WATCH"
    assert commands_of_ld_relay() == wanted.split()


async def test_a_unix_socket(server):
    """`unix://` works where the server is on the same machine."""
    store = RedisStore(connect(server.options(url=f"unix://{server.socket}")), "p")
    await store.init(ONE)
    await store.aclose()
    assert server.do("EXISTS", "p:$inited") == 1


async def test_tls_with_client_certificates(server, tmp_path):
    """`rediss://` with a private authority and a client certificate."""
    authority = Authority(tmp_path)
    certificate, key = map(str, authority.issue("a client"))
    tls = authority.server("localhost")
    tls.load_verify_locations(authority.file)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.maximum_version = ssl.TLSVersion.TLSv1_2  # refuses within the handshake
    async with encrypted(server, tls) as url:
        trusted = {"url": url, "ca_file": str(authority.file)}
        certified = {"client_certificate_file": certificate, "client_key_file": key}
        store = RedisStore(connect(server.options(**trusted, **certified)))
        await store.init(ONE)
        await store.aclose()
        for options in ({"url": url}, trusted):
            store = RedisStore(connect(server.options(**options)))
            with pytest.raises(StoreUnavailable):
                await store.load()
            await store.aclose()
    assert server.do("EXISTS", "launchdarkly:$inited") == 1


@pytest.mark.parametrize("form", UNTIDY.values(), ids=UNTIDY.keys())
@pytest.mark.parametrize("named", [True, False], ids=["named", "of the system"])
async def test_an_authority_that_is_not_by_the_book_is_trusted(
    server, tmp_path, monkeypatch, form, named
):
    """On every interpreter, with REDIS_CA_FILE or among the system's."""
    authority = Authority(tmp_path, **form)
    if not named:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    async with encrypted(server, authority.server("localhost")) as url:
        store = RedisStore(
            connect(server.options(url=url, ca_file=str(authority.file) if named else ""))
        )
        await store.init(ONE)
        await store.aclose()
    assert server.do("EXISTS", "launchdarkly:$inited") == 1


async def test_another_host_and_an_unknown_authority_are_not_trusted(server, tmp_path):
    """The reason is stated in OpenSSL's words."""
    authority, other = (Authority(tmp_path, **UNTIDY["no keyUsage"]) for _ in range(2))
    for known, host, reason in [
        (authority, "another.example", "Hostname mismatch, certificate is not valid for 'localhost'."),
        (other, "localhost", "unable to get local issuer certificate"),
    ]:  # fmt: skip
        async with encrypted(server, authority.server(host)) as url:
            store = RedisStore(connect(server.options(url=url, ca_file=str(known.file))))
            with pytest.raises(StoreUnavailable) as caught:
                await store.load()
            await store.aclose()
        assert str(caught.value) == f"TLS failed: {reason}"


def test_files_for_tls_that_cannot_be_used_are_named(tmp_path):
    """At the start, with the reason."""
    absent = str(tmp_path / "absent.pem")
    certificate, key = map(str, Authority(tmp_path).issue("one"))
    _, other_key = map(str, Authority(tmp_path).issue("other"))
    for options, reason in [
        ({"ca_file": absent}, f"CA file {absent} cannot be used: No such file or directory"),
        ({"client_certificate_file": absent}, "cannot be used: No such file or directory"),
        (
            {"client_certificate_file": certificate, "client_key_file": other_key},
            f"client certificate {certificate} with key {other_key} cannot be used: key values mismatch",
        ),
    ]:  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            RedisStore(connect(RedisOptions(url="rediss://:geheim@h", **options)))
        assert str(caught.value).startswith("Redis at rediss://:xxxxx@h: ")
        assert str(caught.value).endswith(reason)
    RedisStore(
        connect(
            RedisOptions(url="rediss://h", client_certificate_file=certificate, client_key_file=key)
        )
    )


async def test_a_server_that_speaks_no_tls_or_sends_an_alert_says_so(tmp_path):
    """In OpenSSL's words."""
    authority = Authority(tmp_path)
    demanding = authority.server("localhost")
    demanding.verify_mode = ssl.CERT_REQUIRED
    demanding.maximum_version = ssl.TLSVersion.TLSv1_2
    for tls, words, reason in [
        (None, b"-ERR Protocol error\r\n", "TLS failed: wrong version number"),
        (demanding, b"", "TLS failed: .*alert handshake failure"),
    ]:
        with peer(words, tls=tls) as port:
            url = f"rediss://localhost:{port}"
            store = RedisStore(connect(RedisOptions(url=url, ca_file=str(authority.file))))
            with pytest.raises(StoreUnavailable, match=reason):
                await store.load()
            await store.aclose()


REFUSALS = {
    "-DENIED Redis is running in protected mode": "the server answers: DENIED Redis is running in",
    "-NOAUTH Authentication required.": "the server refuses user or password: NOAUTH Authentication",
    "-WRONGPASS invalid username-password pair": "the server refuses user or password: WRONGPASS inv",
    "-ERR max number of clients reached": "max number of clients reached",
    "-LOADING Redis is loading the dataset in memory": "LOADING Redis is loading the dataset",
    "-MASTERDOWN Link with MASTER is down": "MASTERDOWN Link with MASTER is down",
    "-ERR busy": "the server answers: ERR busy",
    "HTTP/1.1 400 Bad Request": "Protocol error",
}


@pytest.mark.parametrize(("words", "reason"), REFUSALS.items(), ids=lambda text: text.split()[0])
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("listens", [False, True], ids=["at once", "when asked"])
@pytest.mark.parametrize("more", [{}, {"password": secret("geheim")}], ids=["open", "password"])
def test_errors_sent_before_closing_are_reported(run, words, reason, *, listens, more):
    """Before or after the first command, and with both event loops."""

    async def attempt(port: int) -> str:
        store = RedisStore(connect(RedisOptions(url=f"redis://127.0.0.1:{port}/0", **more)))
        try:
            await store.load()
        except StoreUnavailable as e:
            return str(e)
        finally:
            await store.aclose()

    with peer(f"{words}\r\n".encode(), listens=listens) as port:
        for _ in range(5):
            assert reason in run(attempt(port))


async def reason_of(options) -> str:
    store = RedisStore(connect(options))
    with pytest.raises(StoreUnavailable) as caught:
        await store.load()
    await store.aclose()
    return str(caught.value)


def own_address() -> str:
    """Return an address of this machine that is not loopback."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no network")
        return probe.getsockname()[0]


async def test_a_server_in_protected_mode_says_so(tmp_path):
    """A real server sends an explanation and closes the connection."""
    with RedisServer(tmp_path, bind="*", protected_mode="yes") as server:
        options = server.options(url=f"redis://{own_address()}:{server.port}")
        for _ in range(5):
            assert "the server answers: DENIED" in await reason_of(options)
        assert "protected mode" in await reason_of(options)


async def test_a_server_with_too_many_clients_says_so(tmp_path):
    """A real server that accepts a single client."""
    with RedisServer(tmp_path, maxclients="1") as server, server.client() as other:
        other.ping()
        for _ in range(5):
            assert "max number of clients reached" in await reason_of(server.options())


async def test_a_server_that_wants_a_password_says_so(tmp_path):
    """A real server, contacted without a password."""
    with RedisServer(tmp_path, requirepass="the-right-one") as server:
        reason = await reason_of(server.options())
    assert reason == (
        "the server refuses user or password: NOAUTH Authentication required"
        " (set REDIS_PASSWORD, and REDIS_USERNAME unless the user is called default)"
    )


async def test_a_server_that_cannot_be_reached_is_described(tmp_path):
    """In the words of the operating system, without error numbers of libraries."""
    assert await reason_of(RedisOptions(url="redis://127.0.0.1:1")) == "Connection refused"
    assert await reason_of(RedisOptions(url="redis://localhost:1")) == "Connection refused"
    assert "ame" in await reason_of(RedisOptions(url="redis://nowhere.invalid"))
    absent = RedisOptions(url=f"unix://{tmp_path}/absent")
    assert await reason_of(absent) == "No such file or directory"
    with peer(b"") as port:
        options = RedisOptions(url=f"redis://127.0.0.1:{port}")
        assert re.match("Connection (closed by server|reset by peer)", await reason_of(options))


async def test_many_environments_share_few_connections(server):
    """They wait for each other, and leave none behind."""
    client = connect(server.options())
    stores = [RedisStore(client, f"p{n}") for n in range(3 * MAX_CONNECTIONS)]
    await asyncio.gather(*(store.init(ONE) for store in stores))
    assert len(server.do("CLIENT LIST")) <= MAX_CONNECTIONS + 1
    for store in stores[1:]:
        await store.aclose()
    assert await stores[0].load()
    await stores[0].aclose()
    await until(lambda: len(server.do("CLIENT LIST")) == 1)


async def test_authentication_sends_no_other_commands(server):
    """CLIENT SETINFO would hide a refusal, and few users have the permission."""
    with server.client() as monitor, monitor.monitor() as heard:
        store = RedisStore(connect(server.options(url=f"{server.url}/2")))
        await store.load()
        await store.aclose()
        commands = [heard.next_command()["command"] for _ in range(2)]
    assert commands == ["SELECT 2", "MULTI"]


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (("CONFIG", "SET", "requirepass", "geheim"), "the server refuses user or password"),
        (("REPLICAOF", "127.0.0.1", "1"), "the server answers: .*read only"),
        (("CONFIG", "SET", "maxmemory", "1"), "the server answers: .*maxmemory"),
    ],
)  # fmt: skip
async def test_a_server_that_refuses_is_unavailable(tmp_path, break_it, reason):
    """The server's reply is reported, and nothing is changed."""
    with RedisServer(tmp_path) as server:
        store = RedisStore(connect(server.options()), "p")
        await store.init(ONE)
        server.do(*break_it)
        await store.aclose()
        with pytest.raises(StoreUnavailable, match=reason):
            await store.init(Payload.of([]))
        with pytest.raises(StoreUnavailable, match=reason):
            await store.upsert([flag("lamp", 2)])
        await store.aclose()


async def test_a_wrong_password_is_not_shown(tmp_path):
    """Neither the configured password nor the correct one."""
    with RedisServer(tmp_path, requirepass="the-right-one") as server:
        url = f"redis://:the-wrong-one@127.0.0.1:{server.port}"
        store = RedisStore(connect(server.options(url=url)))
        with pytest.raises(StoreUnavailable, match="refuses user or password") as caught:
            await store.load()
        await store.aclose()
    assert "one" not in str(caught.value) + store.server


async def test_a_server_that_repeats_the_password_is_not_quoted(tmp_path):
    """A server without AUTH repeats its arguments."""
    with RedisServer(tmp_path, rename_command='AUTH ""') as server:
        store = RedisStore(
            connect(server.options(url=f"redis://anna:geheim@127.0.0.1:{server.port}"))
        )
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
    """Any error reply, other protocol or closed connection is a `StoreUnavailable`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answer and (commands := await reader.read(65536)):
            writer.write(answer * commands.count(b"*"))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as fake:
        url = f"redis://127.0.0.1:{fake.sockets[0].getsockname()[1]}"
        store = RedisStore(connect(RedisOptions(url=url, connect_timeout=0.1, read_timeout=0.1)))
        for attempt in (store.load, store.versions):
            with pytest.raises(StoreUnavailable):
                await attempt()
        with pytest.raises(StoreUnavailable):
            await store.init(ONE)
        with pytest.raises(StoreUnavailable):
            await store.upsert([flag("lamp", 2)])
        await store.aclose()


async def test_a_server_that_is_gone_or_hangs_is_unavailable(tmp_path):
    """No call exceeds the configured timeouts, and a new server is used again."""
    with RedisServer(tmp_path) as server:
        store = RedisStore(connect(server.options(read_timeout=0.2)), "p")
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
    """An incomplete transaction has no effect."""
    store = RedisStore(connect(server.options()), "p")
    await store.init(ONE)
    pad = b'{"version":2,"pad":"%b"}' % (b"x" * CHUNK)
    large = Payload.of(flag(f"f{i}", 2, pad) for i in range(40))
    for steps in range(1, 60, 7):
        init = asyncio.create_task(store.init(large))
        for _ in range(steps):
            await asyncio.sleep(0)
        init.cancel()
        await asyncio.wait([init])
        stored = await store.load()
        assert set(stored.payload) in ({*ONE}, {*large})
    await store.aclose()


WRITER = """
import asyncio, sys
from relay.config.schema import Redis
from relay.stores.redis.connect import connect
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.stores.redis.connect import connect
from relay.stores.redis.store import RedisStore

async def write() -> None:
    store = RedisStore(connect(Redis(url=sys.argv[1])), "p")
    for version in range(1, 1000):
        json = b'{"version":%d,"pad":"%b"}' % (version, b"x" * 250_000)
        await store.init(Payload.of(Item(Kind.FLAG, f"f{i}", version, json) for i in range(40)))
        print(version, flush=True)

asyncio.run(write())
"""


async def test_a_relay_that_is_killed_leaves_the_old_or_the_new_data(server, store):
    """After a kill at any moment of an init, all items have the same version."""
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
