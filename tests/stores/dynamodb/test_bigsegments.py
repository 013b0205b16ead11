"""Big segments in a table of DynamoDB: the layout of SDKs, and transactions that hold together."""

from __future__ import annotations

import pytest

from relay.errors import StoreUnavailable
from relay.stores.bigsegments import Metadata
from relay.stores.dynamodb import table as module
from relay.stores.dynamodb.bigsegments import DynamoDBBigSegmentStore
from relay.stores.dynamodb.connect import connect
from tests.stores.bigsegments_contract import ANN, BEN, CLEO, BigSegmentStoreContract, patch
from tests.support.dynamodb import VARIABLES, failure

METADATA = "p:big_segments_metadata"
USERS = "p:big_segments_user"


def members_in(url: str, table: str, prefix: str = "p") -> DynamoDBBigSegmentStore:
    return DynamoDBBigSegmentStore(connect(url, VARIABLES).share(), table, prefix)


@pytest.fixture
async def store(proxy, table):
    store = members_in(proxy.url, table.name)
    yield store
    await store.aclose()


@pytest.fixture
async def another_store(proxy, table):
    store = members_in(proxy.url, table.name)
    yield store
    await store.aclose()


@pytest.fixture
def no_pause(monkeypatch):
    """Delays too short to notice."""
    monkeypatch.setattr(module, "THROTTLED", module.Backoff(first=0.001, longest=0.001))


class TestContract(BigSegmentStoreContract):
    """DynamoDB keeps the contract."""

    many = 250  # the tests' server takes seconds for a transaction


async def test_the_layout_is_that_of_sdks(table, store):
    """Keys and attributes are as recorded; a context that is in no segment any more keeps an item."""
    await store.apply(patch("v1", include=[ANN, CLEO], exclude=[BEN]), None)
    await store.apply(patch("v2", no_longer=[CLEO]), "v1")
    await store.mark_synchronized(1_700_000_000.5)
    assert table.get(USERS, ANN)["included"] == {"SS": ["team.g2"]}
    assert table.get(USERS, BEN)["excluded"] == {"SS": ["team.g2"]}
    assert table.get(USERS, CLEO).keys() == {"namespace", "key"}
    stored = table.get(METADATA, METADATA)
    assert stored["lastVersion"] == {"S": "v2"}
    assert stored["synchronizedOn"] == {"N": "1700000000500"}
    assert len(table.items()) == 4


async def test_without_a_prefix_there_is_no_colon(server, table):
    """There is no default prefix, unlike in Redis."""
    store = members_in(server.url, table.name, "")
    await store.apply(patch("v1", include=[ANN]), None)
    assert await store.claim("one")
    await store.aclose()
    assert [(each["namespace"]["S"], each["key"]["S"]) for each in table.items()] == [
        ("$relay:big_segments", "$relay:big_segments"),
        ("big_segments_metadata", "big_segments_metadata"),
        ("big_segments_user", ANN),
    ]


async def test_a_small_patch_is_one_transaction(proxy, store):
    """Members and version change together."""
    await store.apply(patch("v1", include=[ANN], exclude=[BEN]), None)
    assert proxy.operations == ["TransactWriteItems"]


async def test_a_large_patch_is_written_in_groups(proxy, store):
    """Each has at most a hundred actions and the condition; the last one moves the version."""
    many = [f"hash-{n}" for n in range(250)]
    await store.apply(patch("v1", include=many), None)
    groups = [each.body["TransactItems"] for each in proxy.asked]
    assert [len(group) for group in groups] == [100, 100, 53]
    heads = [next(iter(group[0])) for group in groups]
    assert heads == ["ConditionCheck", "ConditionCheck", "Update"]


async def test_a_patch_that_was_interrupted_is_applied_again(proxy, table, store):
    """The version has not moved, and writing the same members twice changes nothing."""
    many = [f"hash-{n}" for n in range(250)]
    answers = iter([None, failure("ValidationException")])
    proxy.misbehave = lambda _operation, _body: next(answers, None)
    with pytest.raises(StoreUnavailable, match="ValidationException"):
        await store.apply(patch("v1", include=many), None)
    assert len(table.items()) == 99
    assert (await store.metadata()).cursor is None
    assert await store.apply(patch("v1", include=many), None) == frozenset(many)
    assert len(table.items()) == 251


async def test_nothing_is_written_once_another_relay_has_gone_on(proxy, table, store):
    """A relay that was stopped amid a patch finds that others have applied it, and later ones."""
    many = [f"hash-{n}" for n in range(150)]

    def overtake(_operation, _body, _answer):
        table.empty()
        table.put(METADATA, METADATA, lastVersion="v2")

    proxy.amend = overtake
    assert await store.apply(patch("v1", include=many), None) is None
    assert [each["namespace"]["S"] for each in table.items()] == [METADATA]
    assert (await store.metadata()).cursor == "v2"
    assert [each.status for each in proxy.asked[:2]] == [200, 400]


async def test_contexts_are_read_together(proxy, store):
    """One request for each hundred, and no item is asked for twice."""
    many = [f"hash-{n}" for n in range(128)]
    await store.apply(patch("v1", include=many), None)
    proxy.asked.clear()
    assert await store.memberships([*many, *many]) == [{"team.g2": True}] * 256
    assert proxy.operations == ["BatchGetItem"] * 2
    assert await store.memberships([ANN]) == [{}]
    assert proxy.operations[2:] == ["GetItem"]


async def test_reads_that_the_service_leaves_undone_are_sent_again(proxy, table, store, no_pause):
    """Any part of a request."""
    many = [f"hash-{n}" for n in range(40)]
    await store.apply(patch("v1", include=many), None)
    left = []

    def leave_most(operation, body):
        if operation == "BatchGetItem":
            keys = body["RequestItems"][table.name]["Keys"]
            left.append(keys[15:])
            body["RequestItems"][table.name]["Keys"] = keys[:15]

    def say_so(operation, _body, answer):
        if operation == "BatchGetItem" and (keys := left.pop()):
            answer["UnprocessedKeys"] = {table.name: {"Keys": keys, "ConsistentRead": True}}

    proxy.misbehave, proxy.amend = leave_most, say_so
    assert await store.memberships(many) == [{"team.g2": True}] * 40
    assert proxy.operations.count("BatchGetItem") == 3


async def test_a_right_that_ld_relay_does_not_need_is_not_needed(proxy, store):
    """Without the right to read several items at once, each is read by itself."""
    await store.apply(patch("v1", include=[ANN], exclude=[BEN]), None)
    denied = failure("AccessDeniedException")
    proxy.misbehave = lambda operation, _body: denied if operation == "BatchGetItem" else None
    for _ in range(2):
        found = await store.memberships([ANN, BEN, CLEO])
        assert found == [{"team.g2": True}, {"team.g2": False}, {}]
    assert proxy.operations.count("BatchGetItem") == 1
    assert proxy.operations.count("GetItem") == 6


@pytest.mark.parametrize("reason", ["TransactionConflict", "ThrottlingError"])
async def test_a_transaction_that_meets_another_is_sent_again(proxy, store, no_pause, reason):
    """Conflicts and throttling pass by themselves."""
    status, body = failure("TransactionCanceledException")
    body |= {"CancellationReasons": [{"Code": "None"}, {"Code": reason}]}
    answers = iter([(status, body)] * 3)
    proxy.misbehave = lambda _operation, _body: next(answers, None)
    assert await store.apply(patch("v1", include=[ANN]), None) == {ANN}
    assert len(proxy.asked) == 4


async def test_an_item_that_is_too_large_is_an_error(proxy, store):
    """A context in thousands of segments: the service's reason is reported."""
    status, body = failure("TransactionCanceledException")
    reason = {"Code": "ValidationError", "Message": "Item size has exceeded the maximum"}
    body |= {"CancellationReasons": [{"Code": "None"}, reason]}
    proxy.misbehave = lambda _operation, _body: (status, body)
    with pytest.raises(StoreUnavailable, match="ValidationError: Item size has exceeded"):
        await store.apply(patch("v1", include=[ANN]), None)


async def test_an_odd_time_is_none(table, store):
    """A time that is no number is reported, and does not hide the version."""
    table.put(METADATA, METADATA, lastVersion="v1", synchronizedOn="soon")
    assert await store.metadata() == Metadata("v1", None, is_readable=False)


async def test_a_table_that_is_missing_is_named(server):
    """Every method says what is wrong."""
    store = members_in(server.url, "nowhere")
    for attempt in (
        store.metadata(),
        store.memberships([ANN]),
        store.memberships([ANN, BEN]),
        store.mark_synchronized(1.0),
        store.apply(patch("v1"), None),
        store.claim("one"),
        store.release("one"),
    ):
        with pytest.raises(StoreUnavailable, match='there is no table "nowhere"'):
            await attempt
    await store.aclose()
