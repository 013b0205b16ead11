"""Published documents: the bytes of a payload, and back."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given

from relay.errors import InvalidData
from relay.model.item import Item, Kind
from relay.model.payload import EMPTY, ChangeSet, Payload
from relay.protocol import document
from relay.steps import finish
from tests.stores.contract import flag, segment
from tests.support.strategies import change_sets

GONE = Payload.of([flag("lamp", 3), flag("gone", 2**70, None), segment("was", 1)])


def read(content: bytes) -> Payload:
    return Payload.of(finish(document.read(content)).items)


@given(change_sets)
def test_what_was_written_is_read(changes: ChangeSet):
    """All items with their bytes, and the versions of the deleted ones; in gzip, too."""
    payload, _ = EMPTY.apply(changes)
    written = document.text(payload)
    assert set(read(written)) == set(payload)
    assert set(read(document.compressed(written))) == set(payload)


def test_equal_payloads_give_equal_bytes():
    """However they came about, so that relays agree without a word."""
    items = [flag("b", 1), flag("a", 2), segment("s", 3), flag("z", 9, None), flag("y", 9, None)]
    one, other = document.text(Payload.of(items)), document.text(Payload.of(items[::-1]))
    assert one == other
    assert document.compressed(one) == document.compressed(other)
    assert gzip.decompress(document.compressed(one)) == one


def test_deleted_items_are_a_member_of_their_own_that_is_absent_without_them():
    """The rest is the body of a poll."""
    assert document.text(EMPTY) == b'{"flags":{},"segments":{}}'
    assert json.loads(document.text(GONE))["deleted"] == {"flags": {"gone": 2**70}}
    [tombstone] = [item for item in read(document.text(GONE)) if item.deleted]
    assert tombstone == Item(Kind.FLAG, "gone", 2**70, None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"[]", "object"),
        (b"{}", "neither flags nor segments"),
        (b'{"flags":{},"deleted":[]}', "deleted"),
        (b'{"flags":{},"deleted":{"flags":{"a":"x"}}}', "deleted"),
        (b"\x1f\x8b nonsense", "gzip is corrupt"),
        (document.compressed(document.text(GONE))[:-9], "gzip is cut off"),
    ],
)
def test_whatever_is_no_document_is_refused(content, reason):
    """With a reason."""
    with pytest.raises(InvalidData, match=reason):
        read(content)


def test_a_gzip_bomb_is_refused(monkeypatch):
    """Without decompressing all of it."""
    monkeypatch.setattr(document, "MAX_SIZE", 1000)
    with pytest.raises(InvalidData, match="longer than 1000 bytes"):
        read(gzip.compress(b" " * 10_000_000))


def test_names_are_those_that_edge_sdks_read():
    """Filters follow, and nothing leaves its folder."""
    assert document.name("abc123") == "LD-Env-abc123"
    assert document.name("abc123", "north") == "LD-Env-abc123~north"
    assert document.name("a", "../x y") == "LD-Env-a~..%2Fx%20y"
