"""The Consul store has the layout that SDKs read, keeps Consul's limits, and says what is wrong."""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl

import pytest

from relay.errors import ConfigError, StoreUnavailable
from relay.model.credential import Secret
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.steps import finish
from relay.stores import UNREADABLE
from relay.stores.consul.store import MAX_RACES
from relay.stores.fingerprint import Fingerprint
from tests.stores.contract import StoreContract, flag, segment
from tests.support.authorities import Authority
from tests.support.consul import ConsulAgent, ConsulServer, store_in


@pytest.fixture(scope="module")
def agent():
    with ConsulAgent() as agent:
        yield agent


@pytest.fixture
async def server():
    """An empty, working server."""
    async with ConsulServer() as server:
        yield server


@pytest.fixture
async def store(server):
    store = store_in(server.address)
    yield store
    await store.aclose()


class TestContract(StoreContract):
    """The contract of all data stores."""


class TestContractWithConsul(StoreContract):
    """The same with Consul itself, where it is installed; elsewhere its emulation has to do."""

    __test__ = ConsulAgent.binary is not None

    @pytest.fixture
    async def store(self, agent):
        agent.empty()
        store = store_in(agent.address)
        yield store
        await store.aclose()

    async def test_its_limits_are_kept(self, store):
        """Those of operations, of transactions and of values."""
        items = [*(large(f"f{n:03}", 20_000) for n in range(130)), large("big", 512 * 1024)]
        await store.init(Payload.of(items))
        assert set((await store.load()).payload) == set(items)
        newer = [*(large(f"f{n:03}", 20_000, 2) for n in range(130)), large("big", 512 * 1024, 2)]
        assert await store.upsert(newer)
        assert set((await store.load()).payload) == set(newer)


ONE = Payload.of([flag("lamp", 1)])


def large(key: str, size: int, version: int = 1) -> Item:
    """A flag of a size in bytes."""
    head = b'{"key":"%b","version":%d,"pad":"' % (key.encode(), version)
    return flag(key, version, head + b"x" * (size - len(head) - 2) + b'"}')


async def test_the_layout_is_that_of_the_sdks(server, store):
    """A key for each item, and a marker; tombstones are complete objects that old SDKs can parse."""
    await store.init(Payload.of([flag("lamp", 3), flag("gone", 4, None), segment("crowd", 5)]))
    tombstone = server.values.pop("p/features/gone")
    assert server.values == {
        "p/$inited": b"",
        "p/features/lamp": b'{"key":"lamp","version":3}',
        "p/segments/crowd": b'{"key":"crowd","version":5}',
    }
    assert (
        json.loads(tombstone).items() >= {"key": "$deleted", "version": 4, "deleted": True}.items()
    )


async def test_without_a_prefix_keys_begin_with_launchdarkly(server):
    """The default is that of the SDKs."""
    store = store_in(server.address, "")
    await store.init(ONE)
    await store.aclose()
    assert server.values.keys() == {"launchdarkly/$inited", "launchdarkly/features/lamp"}


async def test_a_prefix_that_is_the_beginning_of_anothers_leaves_its_keys(server):
    """`prod` beside `prod-eu`, and beside its own filtered variant; keys of no prefix stay, too."""
    stores = [store_in(server.address, prefix) for prefix in ("prod", "prod-eu", "prod/north")]
    others = {"prod": b"1", "prod/note": b"2", "prod/features-old/x": b"3", "unrelated": b"4"}
    server.values |= others
    for store in stores:
        await store.init(Payload.of([flag("lamp", 1), segment("crowd", 1)]))
    await stores[0].init(Payload.of([flag("b", 1)]))
    await stores[0].upsert([flag("b", 2)])
    assert [len(await store.versions()) for store in stores] == [1, 2, 2]
    assert server.values.items() >= others.items()
    for store in stores:
        await store.aclose()


async def test_an_unreadable_item_is_reported_and_skipped(server, store):
    """One bad item does not hide the others, any version replaces it, and a folder is one, too."""
    await store.init(Payload.of([flag("lamp", 1), flag("bad", 2)]))
    server.values |= {"p/features/bad": b"{nope", "p/segments/": b""}
    stored = await store.load()
    assert list(stored.payload) == [flag("lamp", 1)]
    assert {(bad.kind, bad.key) for bad in stored.invalid} == {
        (Kind.FLAG, "bad"),
        (Kind.SEGMENT, ""),
    }
    assert (await store.versions())[Kind.FLAG, "bad"] == UNREADABLE
    await store.upsert([flag("bad", 2)])
    assert (await store.load()).payload.get(Kind.FLAG, "bad") == flag("bad", 2)
    await store.init(ONE)
    assert "p/segments/" not in server.values


# Limits


async def test_more_than_fits_into_one_transaction_goes_into_several(server, store):
    """64 operations and 512 KiB each, items before removals, the marker last of all."""
    await store.init(Payload.of([flag(f"old-{n}", 1) for n in range(70)]))
    server.asked.clear()
    items = [segment("crowd", 1)] + [large(f"f{n:03}", 20_000) for n in range(100)]
    await store.init(Payload.of(items))
    operations = [each for batch in server.writes() for each in batch]
    assert operations[0] == ("set", "p/segments/crowd")
    assert [verb for verb, _ in operations] == ["set"] * 101 + ["delete"] * 70 + ["set"]
    assert operations[-1] == ("set", "p/$inited")
    assert {len(batch) for batch in server.writes()} <= set(range(1, 65))
    assert not any(each.status == 413 for each in server.asked)
    assert set((await store.load()).payload) == set(items)


async def test_a_reader_finds_what_both_states_have_in_common_at_any_moment(server, store):
    """Before each write of an `init` all items that stay are there, in one of their versions."""
    before = [flag(f"f{n}", 1) for n in range(200)]
    after = [flag(f"f{n}", 2) for n in range(100, 300)]
    await store.init(Payload.of(before))
    seen: list[set[str]] = []

    def look() -> None:
        seen.append({key for key in server.values if key.startswith("p/features/")})
        server.before_write = look

    server.before_write = look
    await store.init(Payload.of(after))
    common = {f"p/features/f{n}" for n in range(100, 200)}
    assert len(seen) > 4
    assert all(keys >= common for keys in seen)
    assert len(await store.versions()) == 200


async def test_flags_are_written_after_their_prerequisites(server, store):
    """In whichever order they come, also in circles."""

    def needs(key: str, *others: str) -> Item:
        wanted = [{"key": other, "variation": 0} for other in others]
        return flag(
            key, 1, json.dumps({"key": key, "version": 1, "prerequisites": wanted}).encode()
        )

    items = [needs("a", "b", "c"), needs("b", "d"), flag("d", 1), needs("c", "d", "none"),
             needs("x", "y"), needs("y", "x"), segment("s", 1)]  # fmt: skip
    await store.init(Payload.of(items))
    [batch] = server.writes()
    keys = [key.removeprefix("p/features/") for _, key in batch]
    assert keys[0] == "p/segments/s"
    for later, earlier in ["ab", "ac", "bd", "cd"]:
        assert keys.index(earlier) < keys.index(later)
    assert len(keys) == len(items) + 1


async def test_a_value_too_large_for_a_transaction_is_written_alone(server, store):
    """By `init` and by `upsert`, where another writer is noticed as well."""
    size = 512 * 1024
    await store.init(Payload.of([large("big", size), flag("lamp", 1)]))
    assert len(server.values["p/features/big"]) == size
    assert await store.upsert([large("big", size, 2), flag("lamp", 2)])
    server.before_write = lambda: server.values.update({"p/features/big": b'{"version":9}'})
    assert await store.upsert([large("big", size, 8)])
    assert server.item("p/features/big") == {"version": 9}
    assert not any(each.status == 413 for each in server.asked)


async def test_a_value_over_the_limit_of_values_cannot_be_held(server):
    """The limit is the server's, as configured."""
    store = store_in(server.address)
    assert store.problem_with(large("big", 512 * 1024)) is None
    assert "it has 524289 bytes, and Consul takes 524288" in store.problem_with(
        large("big", 512 * 1024 + 1)
    )
    server.max_size = 1024 * 1024
    store = store_in(server.address, max_value_size=1024 * 1024)
    big = large("big", 1024 * 1024)
    assert store.problem_with(big) is None
    await store.init(Payload.of([big]))
    assert list((await store.load()).payload) == [big]
    server.max_size = 512 * 1024
    with pytest.raises(StoreUnavailable, match=r"413: .*maxValueSize is larger than the server's"):
        await store.upsert([large("big", 1024 * 1024, 2)])
    await store.aclose()


# Other writers


async def test_a_change_of_several_items_is_one_transaction(server, store):
    """With the check that the marker stands, and that nobody else has written these items."""
    await store.init(Payload.of([flag("lamp", 1), segment("crowd", 1)]))
    server.asked.clear()
    assert await store.upsert([flag("lamp", 2), flag("new", 1), segment("crowd", 1)])
    [batch] = server.writes()
    assert batch == [("get", "p/$inited"), ("cas", "p/features/lamp"), ("cas", "p/features/new")]


@pytest.mark.parametrize(("stored", "expected"), [(b'{"version":3}', 5), (b'{"version":7}', 7)])
async def test_another_writer_in_between_is_noticed(server, store, stored, expected):
    """The newer of both versions stays."""
    await store.init(Payload.of([flag("lamp", 1), flag("b", 1)]))
    server.before_write = lambda: server.values.update({"p/features/lamp": stored})
    assert await store.upsert([flag("b", 5), flag("lamp", 5)])
    assert server.item("p/features/lamp")["version"] == expected
    assert server.item("p/features/b")["version"] == 5


async def test_a_database_emptied_just_before_a_write_stays_empty(server, store):
    """A few items without all others would be worse than none."""
    await store.init(ONE)
    server.before_write = server.values.clear
    assert not await store.upsert([flag("lamp", 2)])
    assert server.values == {}


async def test_a_writer_that_is_always_faster_does_not_hold_the_relay_for_ever(server, store):
    """After a hundred attempts it counts as an outage."""
    await store.init(ONE)
    count = 0

    def interrupt() -> None:
        nonlocal count
        count += 1
        server.values["p/features/lamp"] = b'{"version":1,"n":%d}' % count
        server.before_write = interrupt

    server.before_write = interrupt
    with pytest.raises(StoreUnavailable, match="other writers leave no room"):
        await store.upsert([flag("lamp", 2)])
    assert count == MAX_RACES


async def test_two_writers_never_take_a_version_back(server):
    """Stored items only become newer, and the newest version is stored in the end."""
    stores = [store_in(server.address) for _ in range(4)]
    await stores[0].init(Payload.of([]))
    order = [(flag(f"f{n % 3}", version), n % 4) for n, version in enumerate(range(1, 81))]
    random.Random(1).shuffle(order)

    async def write(number: int) -> None:
        for item, owner in order:
            if owner == number:
                await stores[number].upsert([item])

    await asyncio.gather(*map(write, range(4)))
    newest = {f"f{n}": max(i.version for i, _ in order if i.key == f"f{n}") for n in range(3)}
    versions = await stores[0].versions()
    assert {key: version.number for (_, key), version in versions.items()} == newest
    for store in stores:
        await store.aclose()


# Tokens, addresses, TLS


async def test_the_token_is_sent_and_never_shown():
    """Whichever option or variable gives it; the relay's own come first."""
    async with ConsulServer(policies={"geheim": ("p/",)}) as server:
        for environ, options in (
            ({}, {"token": Secret("geheim")}),
            ({"CONSUL_HTTP_TOKEN": "geheim"}, {}),
            ({"CONSUL_HTTP_TOKEN": "other"}, {"token": Secret("geheim")}),
        ):
            store = store_in(server.address, environ=environ, **options)
            await store.init(ONE)
            assert "geheim" not in f"{store!r} {store._client!r} {store._client._connection!r}"
            await store.aclose()
    assert {each.token for each in server.asked} == {"geheim"}


@pytest.mark.parametrize("variable", ["", "CONSUL_HTTP_TOKEN_FILE"])
async def test_a_token_file_is_read_again_when_it_changes(tmp_path, variable):
    """Tokens are rotated by those who mount them; a file that vanishes keeps the last one."""
    file = tmp_path / "token"
    file.write_text(" first\n")
    environ = {variable: str(file), "CONSUL_HTTP_TOKEN": "other"} if variable else {}
    options = {} if variable else {"token_file": str(file)}
    async with ConsulServer(policies={"first": ("p/",)}) as server:
        store = store_in(server.address, environ=environ, **options)
        await store.init(ONE)
        server.policies = {"second-token": ("p/",)}
        with pytest.raises(StoreUnavailable, match=r"ACL not found .*token in .*/token: it was"):
            await store.upsert([flag("lamp", 2)])
        file.unlink()
        with pytest.raises(StoreUnavailable, match="ACL not found"):
            await store.upsert([flag("lamp", 2)])
        file.write_text("")
        with pytest.raises(StoreUnavailable, match="ACL not found"):
            await store.upsert([flag("lamp", 2)])
        file.write_text("second-token")
        assert await store.upsert([flag("lamp", 2)])
        await store.aclose()


@pytest.mark.parametrize(
    ("options", "environ", "problem"),
    [
        ({"token_file": "/none/token"}, {}, "[Consul] tokenFile: /none/token: No such file"),
        ({}, {"CONSUL_HTTP_TOKEN_FILE": "/none/t"}, "CONSUL_HTTP_TOKEN_FILE: /none/t: No such"),
        ({}, {"CONSUL_HTTP_SSL": "perhaps"}, "CONSUL_HTTP_SSL: not a valid boolean"),
        ({}, {"CONSUL_HTTP_SSL": "1", "CONSUL_CACERT": "/none/ca"}, "CA file /none/ca cannot"),
        ({}, {"CONSUL_HTTP_SSL": "1", "CONSUL_CAPATH": "/none"}, "CONSUL_CAPATH: /none: No such"),
        ({}, {"CONSUL_HTTP_SSL": "1", "CONSUL_CLIENT_CERT": "/c"}, "a certificate needs a key"),
        (
            {},
            {"CONSUL_HTTP_SSL": "1", "CONSUL_CLIENT_CERT": "/c", "CONSUL_CLIENT_KEY": "/k"},
            "CONSUL_CLIENT_CERT /c with CONSUL_CLIENT_KEY /k cannot be used: No such file",
        ),
    ],
)
def test_what_cannot_be_used_is_named_before_the_start(options, environ, problem):
    """By option or variable, with the reason."""
    with pytest.raises(ConfigError, match=re.escape(problem)):
        store_in("localhost", environ=environ, **options)


async def test_a_token_without_permission_is_told_what_it_needs():
    """For writing and for reading; nothing is taken for an empty database."""
    async with ConsulServer(policies={"few": (), "all": ("",)}) as server:
        store = store_in(server.address, "p", token=Secret("all"))
        await store.init(ONE)
        await store.aclose()
        store = store_in(server.address, "p", token=Secret("few"))
        advice = r'\(the token needs a policy with key_prefix "p/" { policy = "write" }\)'
        for request in (store.load, store.versions, lambda: store.upsert([flag("lamp", 2)])):
            with pytest.raises(StoreUnavailable, match=r'not read "p/\$inited" ' + advice):
                await request()
        with pytest.raises(StoreUnavailable, match=r"lacks permission 'key:write' on .*" + advice):
            await store.init(ONE)
        await store.aclose()
        store = store_in(server.address, "p")
        with pytest.raises(StoreUnavailable, match="a request without a token needs a policy"):
            await store.load()
        await store.aclose()


async def test_a_token_for_the_keys_of_sdks_alone_suffices():
    """The relays' own key is then not written, and each probe compares."""
    allowed = ("p/features/", "p/segments/", "p/$inited")
    fingerprint = finish(Fingerprint.of(ONE))
    async with ConsulServer(policies={"few": allowed}) as server:
        store = store_in(server.address, token=Secret("few"))
        await store.init(ONE)
        assert not await store.holds(fingerprint)
        await store.mark(fingerprint)
        await store.mark(fingerprint)
        assert not await store.holds(fingerprint)
        assert await store.upsert([flag("lamp", 2)])
        await store.aclose()
    assert "p/$relay" not in server.values
    assert sum(each.status == 409 for each in server.asked) == 2  # the first probe, the first mark


async def test_a_path_before_the_api():
    """`host:port/path`, for a proxy in front of Consul."""
    async with ConsulServer(path="/consul") as server:
        for address in (server.address, f"http://{server.address}/"):
            store = store_in(address)
            await store.init(ONE)
            await store.aclose()
            assert store.server == address
    assert all(each.path == "/consul/v1/txn" for each in server.asked)


async def test_a_unix_socket(tmp_path):
    """`unix://` works where an agent is on the same machine."""
    async with ConsulServer(socket=tmp_path / "s") as server:
        store = store_in(server.address)
        await store.init(ONE)
        assert await store.versions()
        await store.aclose()
        assert store.server == f"unix://{tmp_path}/s"


async def test_tls_with_the_variables_of_consuls_own_client(tmp_path):
    """A private authority as file or folder, a client certificate, and the name to verify."""
    authority = Authority(tmp_path)
    certificate, key = map(str, authority.issue("a client"))
    tls = authority.server("consul.example")
    tls.load_verify_locations(authority.file)
    tls.verify_mode = ssl.CERT_REQUIRED
    folder = tmp_path / "authorities"
    folder.mkdir()
    (folder / "ca.pem").write_bytes(authority.file.read_bytes())
    client = {"CONSUL_CLIENT_CERT": certificate, "CONSUL_CLIENT_KEY": key}
    name = {"CONSUL_TLS_SERVER_NAME": "consul.example"}
    async with ConsulServer(tls=tls) as server:
        plain = server.address.removeprefix("https://")
        for address, environ in (
            (server.address, {"CONSUL_CACERT": str(authority.file), **client, **name}),
            (server.address, {"CONSUL_CAPATH": str(folder), **client, **name}),
            (plain, {"CONSUL_HTTP_SSL": "true", "CONSUL_HTTP_SSL_VERIFY": "false", **client}),
            (f"http://{plain}", {"CONSUL_HTTP_SSL": "1", "CONSUL_HTTP_SSL_VERIFY": "0", **client}),
        ):
            store = store_in(address, environ=environ)
            await store.init(ONE)
            await store.aclose()
        for environ, reason in (
            ({**client, **name}, "is not trusted"),
            ({"CONSUL_CACERT": str(authority.file), **client}, "is not trusted: .*mismatch"),
        ):
            store = store_in(server.address, environ=environ)
            with pytest.raises(StoreUnavailable, match=reason):
                await store.load()
            await store.aclose()


async def test_namespace_and_partition_are_those_of_the_variables():
    """In each request and in each operation of a transaction, as Enterprise wants them."""
    async with ConsulServer(namespace="ns1") as server:
        environ = {"CONSUL_NAMESPACE": "ns1", "CONSUL_PARTITION": "part1"}
        store = store_in(server.address, environ=environ)
        await store.init(Payload.of([flag("lamp", 1), large("big", 500_000)]))
        assert await store.versions()
        await store.aclose()
    assert all("ns=ns1&partition=part1" in each.path for each in server.asked)
    operations = [op["KV"] for each in server.asked if "/txn" in each.path for op in each.body]
    assert all((op["Namespace"], op["Partition"]) == ("ns1", "part1") for op in operations)


# Outages


async def test_what_consul_says_is_passed_on_with_advice(server, store):
    """In its own words, shortened."""
    server.failure = 500, "No cluster leader"
    with pytest.raises(StoreUnavailable, match=r"answers 500: No cluster leader \(.*majority"):
        await store.load()
    server.failure = 429, "Your IP is issuing too many concurrent connections, please rate limit"
    with pytest.raises(StoreUnavailable, match="answers 429: Your IP is issuing too many"):
        await store.versions()
    server.failure = 503, ""
    with pytest.raises(StoreUnavailable, match="answers 503: Service Unavailable"):
        await store.holds(finish(Fingerprint.of(ONE)))
    for status, text in ((200, "<html>"), (200, "[1]"), (409, "{}x"), (200, '{"Results":[1]}')):
        server.failure = status, text
        with pytest.raises(StoreUnavailable, match="the answer is not one of Consul's"):
            await store.load()
    server.failure = None
    assert await store.load() is None


@pytest.mark.parametrize("limit", ["READ_TIMEOUT", "REQUEST_TIMEOUT"])
async def test_a_server_that_is_away_and_comes_back(server, store, monkeypatch, limit):
    """Each failure is named: refused, silent, or slow as a whole."""
    await store.init(ONE)
    await server.stop()
    with pytest.raises(StoreUnavailable, match="cannot connect to localhost:"):
        await store.load()
    await server.start()
    assert await store.load()
    await store.aclose()
    monkeypatch.setattr(f"relay.stores.consul.client.{limit}", 0.1)
    server.pause()
    with pytest.raises(StoreUnavailable, match="no answer in time"):
        await store.load()
    server.go_on()
    assert await store.load()


async def test_the_repr_states_server_and_prefix(store, server):
    assert repr(store) == f"<ConsulStore {server.address} 'p'>"
