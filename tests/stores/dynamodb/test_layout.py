"""Sizes, batches and versions, for any items."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.stores.dynamodb.layout import MAX_BATCH, MAX_BODY, in_batches, stored_version


def text_of(write) -> str:
    return write["PutRequest"]["Item"]["item"]["S"] if "PutRequest" in write else ""


@given(st.lists(st.none() | st.integers(0, 200) | st.integers(0, 500_000), max_size=120))
def test_batches_are_within_the_limits_and_in_order(sizes):
    """None could take the next write as well; a large item goes alone."""
    writes = [
        {"DeleteRequest": {"Key": n}}
        if size is None
        else {"PutRequest": {"Item": {"n": n, "item": {"S": "x" * size}}}}
        for n, size in enumerate(sizes)
    ]
    batches = list(in_batches(writes))
    assert list(itertools.chain(*batches)) == writes
    for batch in batches:
        assert 0 < len(batch) <= MAX_BATCH
        assert len(batch) == 1 or sum(len(text_of(each)) for each in batch) <= MAX_BODY
    for one, other in itertools.pairwise(batches):
        size = sum(len(text_of(each)) for each in [*one, other[0]])
        assert len(one) == MAX_BATCH or size > MAX_BODY


@pytest.mark.parametrize("number", ["7", "7.0", "7E0", "0.7e1"])
def test_numbers_in_any_notation_are_read(number):
    """DynamoDB and its emulations write numbers in their own ways; others count for nothing."""
    json = {"item": {"S": '{"version":3}'}}
    assert stored_version({**json, "version": {"N": number}}).number == 7
    assert stored_version({**json, "version": {"S": "7"}}).number == 3
