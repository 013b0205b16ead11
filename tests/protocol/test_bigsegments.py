"""Patches of big segments: how they are read from pieces, and which are accepted."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InvalidData
from relay.model.item import Item, Kind
from relay.protocol.bigsegments import (
    PIECE,
    PatchReader,
    context_hash,
    include_big_segment,
    revisions_url,
)
from tests.support.upstream import segment_patch

PATCHES = [
    segment_patch("team.g2", "v1", "", include=["ann", "ben"], exclude=["cleo"]),
    segment_patch('odd{]"\\.g1', "v[2", "v1", no_longer=["ann"]),
    segment_patch("team.g2", "v3", "v[2", no_longer_excluded=["cleo"]),
]


def read(text: bytes, *cuts: int):
    """Return the patches in a text that arrives in pieces."""
    reader, places = PatchReader(), [0, *sorted(cuts), len(text)]
    patches = []
    for start, end in pairwise(places):
        patches += reader.feed(text[start:end])
    return [patch for patch in (*patches, *reader.finish()) if patch is not None]


@given(
    cuts=st.lists(st.integers(0, 2000)),
    indent=st.sampled_from([None, 0, 2]),
    count=st.integers(0, len(PATCHES)),
)
def test_pieces_make_no_difference(cuts, indent, count):
    """An array has the same patches wherever the network cuts it."""
    text = json.dumps(PATCHES[:count], indent=indent).encode() + b" \n"
    patches = read(text, *(cut for cut in cuts if cut < len(text)))
    assert [p.segment_id for p in patches] == [p["segmentId"] for p in PATCHES[:count]]
    for patch, sent in zip(patches, PATCHES, strict=False):
        changes = sent["changes"]
        assert (patch.version, patch.previous_version) == (sent["version"], sent["previousVersion"])
        assert patch.included.add == changes["included"]["add"]
        assert patch.included.remove == changes["included"]["remove"]
        assert patch.excluded.add == changes["excluded"]["add"]
        assert patch.excluded.remove == changes["excluded"]["remove"]


def test_patches_come_before_the_array_is_complete():
    """A patch is there as soon as its last byte is."""
    reader, text = PatchReader(), json.dumps(PATCHES).encode()
    assert len(list(reader.feed(text[: text.index(b"odd")]))) == 1


HASHES = st.lists(st.text(st.sampled_from('",\\[]{}ab')) | st.sampled_from([",", '",', "x" * 90]))


@given(
    members=st.tuples(HASHES, HASHES, HASHES, HASHES),
    cuts=st.lists(st.integers(0, 3000)),
    piece=st.integers(1, 40),
    separators=st.sampled_from([(",", ":"), (", ", ": "), (" , ", ":\n")]),
)
def test_pauses_make_no_difference(members, cuts, piece, separators):
    """Nor what is in strings, or where they are decoded in pieces."""
    included, no_longer, excluded, no_longer_excluded = members
    sent = segment_patch("team.g2", "v1", "")
    sent["changes"] = {
        "included": {"add": included, "remove": no_longer},
        "excluded": {"add": excluded, "remove": no_longer_excluded},
    }
    text = json.dumps([sent, PATCHES[0]], separators=separators).encode()
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("relay.protocol.bigsegments.PIECE", piece)
        patch, other = read(text, *(cut for cut in cuts if cut < len(text)))
    assert (patch.included.add, patch.included.remove) == (included, no_longer)
    assert (patch.excluded.add, patch.excluded.remove) == (excluded, no_longer_excluded)
    assert other.included.add == PATCHES[0]["changes"]["included"]["add"]


@pytest.mark.parametrize("size", [65_536, 10_000_000])
def test_a_patch_of_any_size_is_read_with_pauses(size):
    """Twice for each piece, to find its end and to decode it, however it arrives."""
    many = [context_hash(str(number)) for number in range(100_000)]
    text = json.dumps(
        [segment_patch("team.g2", "v1", "") | {"changes": {"included": {"add": many}}}]
    )
    reader, content = PatchReader(), text.encode()
    steps = []
    for start in range(0, len(content), size):
        steps += reader.feed(content[start : start + size])
    steps += reader.finish()
    assert steps.count(None) > len(content) / PIECE
    [patch] = filter(None, steps)
    assert patch.included.add == many


@pytest.mark.parametrize("wrong", ["[1]", '["a",1]', '"a"', "{}"])
def test_members_that_are_no_strings_are_refused_in_large_patches(wrong):
    """Before anything of them is stored."""
    many = json.dumps(["x" * 100] * 2000)
    sets = f'{{"add":{many},"remove":{wrong}}}'
    with pytest.raises(InvalidData, match="big segment patch"):
        read(f'[{{"segmentId":"a.g1","changes":{{"included":{sets}}}}}]'.encode())


def test_missing_members_are_empty():
    """A patch needs a segment only; null stands for no members."""
    [patch] = read(b'[{"segmentId":"s.g1","changes":{"included":{"add":null}},"new":[{}]}]')
    assert (patch.version, patch.previous_version) == ("", "")
    changes = [patch.included.add, patch.included.remove]
    changes += [patch.excluded.add, patch.excluded.remove]
    assert not any(changes)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[",
        b"]",
        b"{}",
        b"null",
        b"[1]",
        b'["a"]',
        b"[null]",
        b"[{}]",
        b"[]x",
        b"[}",
        b"[[]]",
        b'[{"segmentId":"a"},]',
        b'[{"segmentId":"a"} {"segmentId":"b"}]',
        b'[,{"segmentId":"a"}]',
        b'[{"segmentId":"a"',
        b'[{"segmentId":1}]',
        b'[{"segmentId":"a","changes":[]}]',
        b'[{"segmentId":"a\xff"}]',
    ],
)
def test_anything_else_is_refused(text):
    """Any text but a complete array of patches raises InvalidData, and nothing else."""
    with pytest.raises(InvalidData, match="big segment"):
        read(text)


@pytest.mark.parametrize(
    ("cursor", "previous", "follows"),
    [
        (None, "", True),
        (None, "v8", True),
        ("", "", True),
        ("v1", "v1", True),
        ("v1", "v2", False),
        ("v1", "", False),
        ("", "v1", False),
    ],
)
def test_a_patch_follows_its_previous_version(cursor, previous, follows):
    """A patch is the next if it leads on from what is stored, or if nothing is."""
    [patch] = read(json.dumps([segment_patch("s.g1", "v9", previous)]).encode())
    assert patch.follows(cursor) is follows


def test_hashes_are_those_of_the_layout():
    """Context keys are hashed as in the recorded database."""
    assert context_hash("ann") == "SZFeDX1LQC4wF9AQvBwOg8rGx5fWwW5mNA/jJoaTpqE="
    assert len(context_hash("\ud800")) == 44


def test_the_version_is_in_the_query():
    """A poll asks for what comes after a version, if there is one."""
    url = "https://sdk.example/sdk/big-segments/revisions"
    assert revisions_url("https://sdk.example/", None) == url
    assert revisions_url("https://sdk.example", "") == url
    assert revisions_url("https://sdk.example", "v 1&") == url + "?after=v%201%26"


@pytest.mark.parametrize(
    ("kind", "json", "found"),
    [
        (Kind.SEGMENT, b'{"unbounded":true}', True),
        (Kind.SEGMENT, b'{"unbounded":false,"salt":"unbounded"}', False),
        (Kind.SEGMENT, b'{"salt":"s"}', False),
        (Kind.SEGMENT, None, False),
        (Kind.FLAG, b'{"unbounded":true}', False),
    ],
)
def test_big_segments_are_recognised(kind, json, found):
    """A live segment with `unbounded` is a big one."""
    assert include_big_segment([Item(kind, "k", 1, json)]) is found
