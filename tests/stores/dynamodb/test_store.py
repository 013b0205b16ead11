"""The DynamoDB store has the layout that SDKs read, loses nothing, and says what is wrong."""

from __future__ import annotations

import asyncio
import json

import pytest

from relay.errors import ConfigError, StoreUnavailable
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.steps import finish
from relay.stores import UNREADABLE, Version
from relay.stores.dynamodb import table as module
from relay.stores.dynamodb.connect import connect
from relay.stores.dynamodb.layout import FINGERPRINT, MAX_KEY
from relay.stores.dynamodb.store import MAX_RACES, WRITERS, DynamoDBStore
from relay.stores.dynamodb.table import MAX_THROTTLED, PAGE
from relay.stores.fingerprint import Fingerprint
from tests.stores.contract import StoreContract, flag, segment
from tests.support.dynamodb import failure, store_in
from tests.support.holding import holding
from tests.support.serving import until

ONE = Payload.of([flag("lamp", 1)])
THROTTLED = "ProvisionedThroughputExceededException"


@pytest.fixture
def no_pause(monkeypatch):
    """Delays too short to notice."""
    monkeypatch.setattr(module, "THROTTLED", module.Backoff(first=0.001, longest=0.001))


class TestContract(StoreContract):
    """The contract of all data stores."""


def large(key: str, size: int, version: int = 1) -> Item:
    """A flag of a size in bytes."""
    head = b'{"key":"%b","version":%d,"pad":"' % (key.encode(), version)
    return flag(key, version, head + b"x" * (size - len(head) - 2) + b'"}')


# Layout


async def test_the_layout_is_that_of_the_sdks(table, store):
    """An item for each flag and segment, and a marker; tombstones are complete objects."""
    await store.init(Payload.of([flag("lamp", 3), flag("gone", 4, None), segment("crowd", 5)]))
    gone, lamp, crowd = (
        table.get("p:features", "gone"),
        table.get("p:features", "lamp"),
        table.get("p:segments", "crowd"),
    )
    tombstone = json.loads(gone.pop("item")["S"])
    assert tombstone.items() >= {"key": "$deleted", "version": 4, "deleted": True}.items()
    assert gone["version"] == {"N": "4"}
    assert lamp == {
        "namespace": {"S": "p:features"},
        "key": {"S": "lamp"},
        "version": {"N": "3"},
        "item": {"S": '{"key":"lamp","version":3}'},
    }
    assert crowd["item"] == {"S": '{"key":"crowd","version":5}'}
    assert table.get("p:$inited", "p:$inited").keys() == {"namespace", "key"}
    assert len(table.items()) == 4


async def test_without_a_prefix_there_is_no_colon(proxy, table):
    """There is no default prefix, unlike in the other databases."""
    store = store_in(proxy.url, table.name, "")
    await store.init(ONE)
    await store.aclose()
    places = [(each["namespace"]["S"], each["key"]["S"]) for each in table.items()]
    assert places == [("$inited", "$inited"), ("features", "lamp")]


async def test_a_prefix_that_is_the_beginning_of_anothers_leaves_its_items(proxy, table):
    """`prod` beside `prod-eu` and beside its own variant; members of big segments stay, too."""
    stores = [store_in(proxy.url, table.name, prefix) for prefix in ("prod", "prod-eu", "prod/n")]
    table.put("prod:big_segments_user", "hash", note="n")
    for each in stores:
        await each.init(Payload.of([flag("lamp", 1), segment("crowd", 1)]))
    await stores[0].init(Payload.of([flag("b", 1)]))
    assert [len(await each.versions()) for each in stores] == [1, 2, 2]
    assert table.get("prod:big_segments_user", "hash") is not None
    for each in stores:
        await each.aclose()


@pytest.mark.parametrize(
    ("version", "json", "expected"),
    [
        ("5", '{"version":3}', Version(5, live=True)),
        (None, '{"version":4}', Version(4, live=True)),
        ("0", '{"version":4}', Version(4, live=True)),
        ("6", '{"version":6,"deleted":true}', Version(6, live=False)),
        ("7", "{nope", UNREADABLE),
        ("8", None, UNREADABLE),
    ],
)
async def test_versions_are_those_of_the_attribute(table, store, version, json, expected):
    """Without one, or with 0, that of the JSON; and what is newer replaces each of them."""
    await store.init(ONE)
    attributes = {"version": version, "item": json}
    table.put("p:features", "odd", **{k: v for k, v in attributes.items() if v is not None})
    assert (await store.versions())[Kind.FLAG, "odd"] == expected
    await store.upsert([flag("odd", max(expected.number, 0))])
    kept = table.get("p:features", "odd").get("item") == ({"S": json} if json else None)
    assert kept is (expected != UNREADABLE)
    await store.upsert([flag("odd", expected.number + 1)])
    assert (await store.load()).payload.get(Kind.FLAG, "odd") == flag("odd", max(
        expected.number + 1, 0
    ))  # fmt: skip


async def test_an_unreadable_item_is_reported_and_skipped(table, store):
    """One bad item does not hide the others."""
    await store.init(ONE)
    table.put("p:features", "bad", version="2", item="{nope")
    table.put("p:segments", "empty", version="2")
    stored = await store.load()
    assert list(stored.payload) == [flag("lamp", 1)]
    assert {(bad.kind, bad.key) for bad in stored.invalid} == {
        (Kind.FLAG, "bad"),
        (Kind.SEGMENT, "empty"),
    }


# Limits


async def test_items_over_the_limit_cannot_be_held(store):
    """400,000 bytes by the estimate of the SDKs; keys have limits, too."""
    overhead = 100 + len("namespacekeyversionitem") + len("p:features") + len("big") + 1
    assert store.problem_with(large("big", 400_000 - overhead)) is None
    assert "about 400001 bytes" in store.problem_with(large("big", 400_001 - overhead))
    assert "key has 0 bytes" in store.problem_with(flag("", 1))
    assert store.problem_with(flag("ü" * (MAX_KEY // 2), 1)) is None
    assert "key has 1026 bytes" in store.problem_with(flag("ü" * (MAX_KEY // 2 + 1), 1))


async def test_collections_of_several_pages_are_read(store):
    """A page has one megabyte."""
    items = [large(f"big{n}", 380_000) for n in range(4)]
    await store.init(Payload.of(items))
    assert set((await store.load()).payload) == set(items)
    assert len(await store.versions()) == 4


async def test_a_large_environment_is_read_in_short_answers(proxy, store):
    """So that each can be read between two other tasks."""
    await store.init(Payload.of([flag(f"f{n}", 1) for n in range(3 * PAGE - 1)]))
    proxy.asked.clear()
    assert len((await store.load()).payload) == 3 * PAGE - 1
    assert proxy.operations.count("Query") == 1 + 3
    assert all(each.body["Limit"] == PAGE for each in proxy.asked if each.operation == "Query")


@pytest.mark.timing
async def test_a_large_environment_never_holds_the_event_loop(server, table):
    """Not for 10 ms, whatever is done with 1000 flags of 570 bytes."""
    store = store_in(server.url, table.name)
    await store.load()  # which connects

    def flags(version):
        return [large(f"f{n}", 500, version) for n in range(1000)]

    versions = [flags(n) for n in range(4)]
    first, changed = Payload.of(versions[1]), Payload.of(versions[3])
    with holding() as longest:
        await store.init(first)
        await store.load()
        await store.versions()
        await store.upsert(versions[2][:100])
        await store.init(changed)
    await store.aclose()
    assert longest.seconds < 0.01


async def test_writes_are_in_order_and_25_in_a_request(proxy, store):
    """Segments, flags after those that they need, removals, and alone at the end the marker."""
    await store.init(Payload.of([flag(f"old-{n}", 1) for n in range(30)]))
    proxy.asked.clear()
    needs = b'{"key":"a","version":1,"prerequisites":[{"key":"z","variation":0}]}'
    items = [flag("a", 1, needs), *(flag(f"m{n}", 1) for n in range(50)), flag("z", 1)]
    await store.init(Payload.of([*items, segment("crowd", 1)]))
    batches = [
        each.body["RequestItems"][store.table]
        for each in proxy.asked
        if each.operation == "BatchWriteItem"
    ]
    assert max(map(len, batches)) == 25
    writes = [write for batch in batches for write in batch]
    kinds = [next(iter(write)) for write in writes]
    assert kinds == ["PutRequest"] * 53 + ["DeleteRequest"] * 30
    keys = [each["PutRequest"]["Item"]["key"]["S"] for each in writes[:53]]
    assert keys[0] == "crowd"
    assert keys.index("z") < keys.index("a")
    assert proxy.operations[-1] == "PutItem"
    assert proxy.asked[-1].body["Item"]["key"] == {"S": "p:$inited"}


async def test_changes_are_written_a_few_at_a_time(proxy, table, store):
    """Those that do not need each other; a flag is written after its prerequisites."""
    await store.init(ONE)
    proxy.asked.clear()
    proxy.delay = 0.02
    need = flag("a-needs-z", 1, b'{"version":1,"prerequisites":[{"key":"z","variation":0}]}')
    items = [need, flag("z", 1), *(flag(f"f{n}", 1) for n in range(20)), segment("crowd", 1)]
    assert await store.upsert(items)
    assert proxy.busiest == WRITERS
    puts = (each for each in proxy.asked if each.operation == "PutItem")
    written = [each.body["Item"]["key"]["S"] for each in puts]
    assert written[0] == "crowd"
    assert written[-1] == "a-needs-z"
    assert len(written) == len(items)


async def test_a_write_that_fails_ends_the_others(proxy, store):
    """The error is that of the service; what is written is written, and nothing goes on."""
    await store.init(ONE)
    proxy.misbehave = lambda operation, _body: (
        failure("AccessDeniedException") if operation == "PutItem" else None
    )
    with pytest.raises(StoreUnavailable, match="AccessDeniedException"):
        await store.upsert([flag(f"f{n}", 1) for n in range(20)])
    await until(lambda: not proxy.busy)  # those that were under way
    assert len(proxy.asked) < 20
    proxy.asked.clear()
    proxy.misbehave = lambda _operation, _body: None
    assert await store.upsert([flag("f1", 1)])
    assert sorted(proxy.operations) == ["GetItem", "PutItem"]


async def test_what_is_there_already_is_not_written_again(proxy, store):
    """So that a write that was interrupted goes on where it was."""
    items = [flag(f"f{n}", 1) for n in range(60)]
    await store.init(Payload.of(items))
    proxy.asked.clear()
    await store.init(Payload.of([*items[:-1], flag("f59", 2)]))
    assert proxy.operations == ["Query", "Query", "BatchWriteItem", "PutItem"]


async def test_a_reader_finds_what_both_states_have_in_common_at_any_moment(proxy, table, store):
    """Before each write of an `init` all items that stay are there, in one of their versions."""
    await store.init(Payload.of([flag(f"f{n}", 1) for n in range(100)]))
    seen = []

    def look(operation, _body):
        if operation in ("BatchWriteItem", "PutItem"):
            seen.append({each["key"]["S"] for each in table.items()})

    proxy.misbehave = look
    await store.init(Payload.of([flag(f"f{n}", 2) for n in range(50, 150)]))
    assert len(seen) == 7
    assert all(keys >= {f"f{n}" for n in range(50, 100)} for keys in seen)
    assert len(await store.versions()) == 100


# Throttling


async def test_writes_that_the_service_leaves_undone_are_sent_again(proxy, table, store, no_pause):
    """Any part of a request, in any order, and the marker only when all are done."""
    kept = []

    def leave_most(operation, body):
        if operation == "BatchWriteItem":
            [(name, writes)] = body["RequestItems"].items()
            kept.append(writes[2:])
            body["RequestItems"] = {name: writes[:2]}
        elif operation == "PutItem":
            assert len(table.items()) == 60

    def say_so(operation, _body, answer):
        if operation == "BatchWriteItem" and (left := kept.pop()):
            answer["UnprocessedItems"] = {table.name: left}

    proxy.misbehave, proxy.amend = leave_most, say_so
    items = [flag(f"f{n}", 1) for n in range(60)]
    await store.init(Payload.of(items))
    assert set((await store.load()).payload) == set(items)
    assert proxy.operations.count("BatchWriteItem") == 13 + 13 + 5


@pytest.mark.parametrize("code", [THROTTLED, "ThrottlingException", "InternalServerError"])
async def test_throttled_requests_are_sent_again(proxy, store, no_pause, code):
    """Each kind of request, a few times."""
    turns = {}

    def throttle(operation, _body):
        turns[operation] = turns.get(operation, 0) + 1
        return failure(code) if turns[operation] % 3 else None

    proxy.misbehave = throttle
    await store.init(ONE)
    assert await store.upsert([flag("lamp", 2)])
    assert list((await store.load()).payload) == [flag("lamp", 2)]


async def test_a_throttled_database_is_unavailable_after_a_while(proxy, store, no_pause):
    """With the reason that the service gives; nothing is taken for written."""
    proxy.misbehave = lambda _operation, _body: failure(THROTTLED)
    with pytest.raises(StoreUnavailable, match=f"the service answers {THROTTLED}: no, sorry"):
        await store.versions()
    assert len(proxy.asked) == MAX_THROTTLED + 1
    left = lambda _op, body: (200, {"UnprocessedItems": body["RequestItems"]})  # noqa: E731
    proxy.misbehave = lambda op, body: left(op, body) if op == "BatchWriteItem" else None
    with pytest.raises(StoreUnavailable, match="the service leaves writes undone"):
        await store.init(ONE)
    proxy.misbehave = lambda _operation, _body: None
    assert await store.load() is None


# Other writers


@pytest.mark.parametrize(("stored", "expected"), [(3, 5), (7, 7)])
async def test_another_writer_in_between_is_noticed(proxy, table, store, stored, expected):
    """The newer of both versions stays."""
    await store.init(ONE)

    def interrupt(operation, _body):
        if operation == "PutItem":
            proxy.misbehave = lambda _operation, _body: None
            text = json.dumps({"key": "lamp", "version": stored})
            table.put("p:features", "lamp", version=str(stored), item=text)

    proxy.misbehave = interrupt
    assert await store.upsert([flag("lamp", 5)])
    assert (await store.versions())[Kind.FLAG, "lamp"] == Version(expected, live=True)


async def test_a_writer_that_is_always_faster_does_not_hold_the_relay_for_ever(proxy, table, store):
    """After a hundred attempts it counts as an outage."""
    await store.init(ONE)
    count = 0

    def interrupt(operation, _body):
        nonlocal count
        if operation == "PutItem":
            count += 1
            table.put("p:features", "lamp", item=f"{{nope {count}")

    proxy.misbehave = interrupt
    with pytest.raises(StoreUnavailable, match="other writers leave no room"):
        await store.upsert([flag("lamp", 2)])
    assert count == MAX_RACES + 1


# Probes


async def test_a_probe_is_one_read_of_one_item(proxy, table, store):
    """The fingerprint is an attribute of the marker, which an `init` takes away."""
    fingerprint = finish(Fingerprint.of(ONE))
    await store.init(ONE)
    await store.mark(fingerprint)
    proxy.asked.clear()
    assert await store.holds(fingerprint)
    assert proxy.operations == ["GetItem"]
    assert proxy.asked[0].body["ConsistentRead"] is True
    assert table.get("p:$inited", "p:$inited")[FINGERPRINT] == {"S": str(fingerprint)}
    await store.init(ONE)
    assert not await store.holds(fingerprint)


async def test_a_fingerprint_never_makes_a_marker(table, store):
    """An emptied table stays one."""
    await store.mark(finish(Fingerprint.of(ONE)))
    assert table.items() == []


# Faults


async def test_a_missing_table_is_named(proxy, server):
    """With what it needs; and it is found as soon as it exists."""
    store = store_in(proxy.url, "not-yet")
    with pytest.raises(StoreUnavailable, match=r'there is no table "not-yet" .* "namespace"'):
        await store.load()
    server.new_table("not-yet")
    await store.init(ONE)
    assert await store.load() is not None
    await store.aclose()


async def test_a_service_that_is_away_is_reported(proxy, table):
    store = store_in("http://127.0.0.1:1", table.name)
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        await store.load()
    await store.aclose()


async def test_missing_credentials_and_regions_are_named(table, monkeypatch, tmp_path):
    """In words that say what to do."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    nowhere = DynamoDBStore(connect("", {}).share(), table.name, "p")
    with pytest.raises(StoreUnavailable, match="there is no region; AWS_REGION"):
        await nowhere.load()
    anonymous = DynamoDBStore(connect("http://127.0.0.1:1", {}).share(), table.name, "")
    with pytest.raises(StoreUnavailable, match="there are no AWS credentials"):
        await anonymous.load()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="nobody"):
        connect("", {})


@pytest.mark.parametrize(
    ("environ", "region"),
    [
        ({"AWS_REGION": "us-west-2"}, "us-west-2"),
        ({"AWS_DEFAULT_REGION": "eu-west-1"}, "eu-west-1"),
    ],
)
async def test_the_region_is_that_of_the_variables(proxy, table, monkeypatch, environ, region):
    """`AWS_REGION` counts before `AWS_DEFAULT_REGION`."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    store = DynamoDBStore(connect(proxy.url, environ).share(), table.name, "p")
    with pytest.raises(StoreUnavailable, match="there is no table"):
        await store.load()
    assert proxy.asked[0].region == region
    await store.aclose()


async def test_stores_share_one_client(proxy, table):
    """It is closed with the last one, and opened again by the next."""
    connection = connect(proxy.url, {"AWS_REGION": "us-east-1"})
    stores = [DynamoDBStore(connection.share(), table.name, prefix) for prefix in "abc"]
    await asyncio.gather(*(each.init(ONE) for each in stores))
    for each in stores[:2]:
        await each.aclose()
    assert await stores[2].load() is not None
    await stores[2].aclose()
    assert connection._current is None
