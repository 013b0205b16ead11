"""Keys as SDKs in daemon mode read them, and transactions that Consul accepts."""

from __future__ import annotations

import base64
import itertools
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.model.item import Kind
from relay.stores.consul import layout
from relay.stores.consul.layout import (
    MAX_OPERATIONS,
    MAX_TRANSACTION,
    Layout,
    Operation,
    Scope,
    encode,
    get,
    put,
    put_if,
    reply_of,
    writes,
)

NOWHERE = Scope()


@pytest.mark.parametrize(
    ("prefix", "expected"), [("", "launchdarkly"), ("shop/eu", "shop/eu"), ("a\nb", "a\\nb")]
)
def test_keys_begin_with_the_prefix(prefix, expected):
    """`launchdarkly` without one; a line end must not end a log line."""
    keys = Layout(prefix)
    assert keys.prefix == expected
    assert keys.marker == f"{expected}/$inited"
    assert keys.key(Kind.FLAG, "lamp") == f"{expected}/features/lamp"
    assert keys.key(Kind.SEGMENT, "crowd") == f"{expected}/segments/crowd"


@pytest.mark.parametrize(
    ("key", "item"),
    [
        ("p/features/lamp", (Kind.FLAG, "lamp")),
        ("p/segments/a/b", (Kind.SEGMENT, "a/b")),
        ("p/features/", (Kind.FLAG, "")),
        ("p/features", None),
        ("p/features-old/lamp", None),
        ("p/$inited", None),
        ("p-eu/features/lamp", None),
    ],
)
def test_items_are_told_from_other_keys(key, item):
    assert Layout("p").item_key(key) == item


def test_operations_have_the_form_that_consul_reads():
    """Values are base64; the scope is in each, where it is not the default."""
    written = json.loads(encode([put_if("k", b"\xff", 7), put("m", b""), get("n")], NOWHERE))
    assert [each["KV"] for each in written] == [
        {"Verb": "cas", "Key": "k", "Value": "/w==", "Index": 7},
        {"Verb": "set", "Key": "m", "Value": ""},
        {"Verb": "get", "Key": "n"},
    ]
    [scoped] = json.loads(encode([get("n")], Scope("ns1", "part1")))
    assert scoped["KV"] == {"Verb": "get", "Key": "n", "Namespace": "ns1", "Partition": "part1"}


def test_replies_are_read_with_spaces_and_members_of_later_versions():
    """A value that is null is empty."""
    pair = {"LockIndex": 0, "Key": "k", "Flags": 0, "Value": None, "ModifyIndex": 5, "New": [1]}
    reply = reply_of(json.dumps({"Results": [{"KV": pair}], "Errors": None}, indent=4).encode())
    [raw] = reply.results or ()
    assert layout.pair_of(raw) == layout.Pair("k", b"", 5)
    failed = reply_of(b'{"Errors":[{"OpIndex":1,"What":"key \\"k\\" doesn\'t exist"}]}')
    [failure] = failed.failures or ()
    assert (failure.operation, failure.is_missing, failure.is_stale) == (1, True, False)
    with pytest.raises(msgspec.MsgspecError):
        reply_of(b"[]")


@given(
    st.lists(st.one_of(st.integers(0, 400), st.integers(0, 450_000)), max_size=200),
    st.integers(0, 2),
)
def test_writes_are_within_the_limits_and_in_order(sizes, guards):
    """None could take the next operation as well; guards begin each; too large ones go alone."""
    operations = [put(f"k{n}", b"x" * size) for n, size in enumerate(sizes)]
    checks = [get(f"guard-{n}") for n in range(guards)]
    made = list(writes(operations, NOWHERE, checks))
    written: list[Operation] = []
    for write in made:
        if write.body is None:
            [alone] = write.operations
            assert len(encode([*checks, alone], NOWHERE)) > MAX_TRANSACTION
            written.append(alone)
            continue
        assert len(write.operations) <= MAX_OPERATIONS
        assert len(write.body) <= MAX_TRANSACTION
        assert list(write.operations[:guards]) == checks
        keys = [each["KV"]["Key"] for each in json.loads(write.body)]
        assert keys == [each.key for each in write.operations]
        written += write.operations[guards:]
    assert written == operations
    for one, other in itertools.pairwise(made):
        if one.body and other.body:
            together = [*one.operations, other.operations[guards]]
            size = len(encode(together, NOWHERE))
            assert len(together) > MAX_OPERATIONS or size + 1 >= MAX_TRANSACTION


def test_values_come_back_as_they_were_written():
    value = bytes(range(256))
    [member] = json.loads(encode([put("k", value)], NOWHERE))
    assert base64.b64decode(member["KV"]["Value"]) == value
