"""Keys and items as SDKs in daemon mode read them."""

from __future__ import annotations

import json

import pytest

from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.steps import finish
from relay.stores import UNREADABLE
from relay.stores.items import parse_items, parse_versions
from relay.stores.redis.layout import CHUNK, Layout, chunks, entries, fields
from tests.stores.contract import flag, segment


@pytest.mark.parametrize(
    ("prefix", "expected"), [("", "launchdarkly"), ("shop", "shop"), ("a\nb", "a\\nb")]
)
def test_keys_begin_with_the_prefix(prefix, expected):
    """`launchdarkly` without one; a line end must not end a log line."""
    layout = Layout(prefix)
    keys = [layout.prefix, layout.marker, *map(layout.hash, (Kind.FLAG, Kind.SEGMENT))]
    assert keys == [expected, *(f"{expected}:{n}" for n in ("$inited", "features", "segments"))]


def test_written_items_are_read_again():
    """Live ones verbatim; tombstones have all members that old SDKs ask for."""
    items = [
        flag("lamp", 3),
        flag("gone", 4, None),
        segment("crowd", 5),
        Item(Kind.SEGMENT, "left", 6, None),
    ]
    hashes: dict[Kind, dict[bytes, bytes]] = {kind: {} for kind in Kind}
    for kind in Kind:
        for chunk in chunks(fields(item for item in items if item.kind is kind)):
            pairs = dict(zip(chunk[::2], chunk[1::2], strict=True))
            hashes[kind] |= {str(key).encode(): bytes(value) for key, value in pairs.items()}
    stored = finish(parse_items(entries(hashes)))
    assert set(stored.payload) == set(items)
    assert finish(parse_versions(entries(hashes))) == stored.versions
    assert hashes[Kind.FLAG][b"lamp"] == flag("lamp", 3).json
    for kind, key in ((Kind.FLAG, b"gone"), (Kind.SEGMENT, b"left")):
        assert json.loads(hashes[kind][key])["deleted"] is True


def test_unreadable_items_are_named():
    """The others are used."""
    hashes = {Kind.FLAG: {b"lamp": b'{"version":1}', b"bad": b"{"}, Kind.SEGMENT: {}}
    stored = finish(parse_items(entries(hashes)))
    assert [item.key for item in stored.payload] == ["lamp"]
    assert [(bad.kind, bad.key) for bad in stored.invalid] == [(Kind.FLAG, "bad")]
    assert finish(parse_versions(entries(hashes)))[Kind.FLAG, "bad"] == UNREADABLE
    assert stored.versions[Kind.FLAG, "bad"] == UNREADABLE


def test_large_payloads_go_in_several_commands():
    """None is much longer than `CHUNK`, and nothing is left out."""
    size = CHUNK // 3
    items = [
        Item(Kind.FLAG, f"f{n}", 1, b'{"version":1,"x":"%b"}' % (b"x" * size)) for n in range(10)
    ]
    written = list(chunks(fields(items)))
    assert [key for chunk in written for key in chunk[::2]] == [item.key for item in items]
    assert len(written) == 4
    assert list(chunks([])) == []
    assert len(Payload.of(items)) == 10
