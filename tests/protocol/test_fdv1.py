"""FDv1 messages: parsing and encoding."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InvalidData
from relay.model.item import Item, Kind
from relay.model.payload import Change, ChangeSet, Payload
from relay.protocol.fdv1 import AllFormat, FlagsFormat, all_data, parse, parse_all

LAMP = b'{"key":"lamp","version":3,"x":1e21}'
CREW = b'{"key":"crew","version":4}'


def put(flags=b"{}", segments=b"{}"):
    return b'{"path":"/","data":{"flags":%b,"segments":%b}}' % (flags, segments)


def test_a_put_is_a_full_change_set():
    """Flags and segments have the keys of the map."""
    changes = parse("put", put(b'{"lamp":%b}' % LAMP, b'{"c":%b}' % CREW))
    assert changes == ChangeSet(
        (Item(Kind.FLAG, "lamp", 3, LAMP), Item(Kind.SEGMENT, "c", 4, CREW)), full=True
    )


@pytest.mark.parametrize("path", [b'"path":"/other",', b"", b'"path":"/",'])
def test_the_path_of_a_put_does_not_matter(path):
    """Any value, or none (streams 2.6)."""
    assert parse("put", b"{" + path + b'"data":{"flags":{}}}') == ChangeSet((), full=True)


def test_unknown_kinds_are_skipped():
    """A put may contain unknown kinds of items."""
    data = b'{"data":{"flags":{},"configurations":{"x":5}}}'
    assert parse("put", data) == ChangeSet((), full=True)


@pytest.mark.parametrize("flags", [b"null", b"{}"])
def test_a_kind_may_be_empty_or_null(flags):
    """An environment without flags is an environment."""
    assert parse("put", put(flags)) == ChangeSet((), full=True)


def test_an_unusable_item_is_reported_separately():
    """The others stay valid; the unusable item is named with a reason."""
    changes = parse("put", put(b'{"lamp":%b,"w":{"version":"x"}}' % LAMP))
    assert changes is not None
    assert [item.key for item in changes.items] == ["lamp"]
    (bad,) = changes.invalid
    assert (bad.kind, bad.key) == (Kind.FLAG, "w")
    assert "$.version" in bad.reason


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/flags/lamp", (Kind.FLAG, "lamp")),
        ("/flags/a/b", (Kind.FLAG, "a/b")),
        ("/segments/lamp", (Kind.SEGMENT, "lamp")),
        ("/configurations/x", None),
        ("/", None),
        ("flags/x", None),
        ("", None),
    ],
)
def test_patch_and_delete_find_their_item_by_path(path, target):
    """Unknown paths are ignored, not errors."""
    patch = parse("patch", json.dumps({"path": path, "data": json.loads(LAMP)}).encode())
    delete = parse("delete", json.dumps({"path": path, "version": 9}).encode())
    if target is None:
        assert patch is None
        assert delete is None
    else:
        assert [(i.kind, i.key) for i in patch.items] == [target]
        assert delete == ChangeSet((Item(*target, 9, None),))


def test_a_patch_with_an_unusable_item_keeps_the_connection():
    """It is reported like an unusable item of a put."""
    changes = parse("patch", b'{"path":"/flags/w","data":{"on":5}}')
    assert changes is not None
    assert changes.items == ()
    assert changes.invalid[0].key == "w"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("put", b""),
        ("put", b"{nope"),
        ("put", b'{"path":"/"}'),
        ("put", b'{"path":"/","data":{}}'),
        ("put", b'{"path":"/","data":{"other":{}}}'),
        ("put", b'{"data":[]}'),
        ("put", b'{"data":{"flags":[]}}'),
        ("put", b'{"data":{"flags":{"x":'),
        ("patch", b'{"data":{}}'),
        ("patch", b'{"path":"/flags/x"}'),
        ("patch", b'{"path":"/flags/","data":{"version":1}}'),
        ("patch", b'{"path":5,"data":{}}'),
        ("delete", b'{"version":5}'),
        ("delete", b'{"path":"/flags/x"}'),
        ("delete", b'{"path":"/segments/","version":1}'),
    ],
)
def test_a_broken_message_is_refused_as_a_whole(name, data):
    """Nothing of it may be applied (streams 2.6)."""
    with pytest.raises(InvalidData):
        parse(name, data)


@pytest.mark.parametrize("name", ["goodbye", "", "message", "Put"])
def test_other_messages_change_nothing(name):
    """Unknown names are not errors."""
    assert parse(name, b"{}") is None


def test_bytes_that_are_no_utf8_are_replaced():
    """As the SSE standard demands; strict clients would fail otherwise."""
    changes = parse("put", put(b'{"a":{"version":1,"salt":"\xff"}}'))
    assert changes is not None
    assert "\ufffd" in changes.items[0].json.decode()


@given(st.sampled_from(["put", "patch", "delete"]), st.binary())
def test_any_bytes_are_parsed_or_refused(name, data):
    """No input causes another exception."""
    with contextlib.suppress(InvalidData):
        parse(name, data)


PAYLOAD = Payload.of(
    [
        Item(Kind.FLAG, 'la"mp', 3, LAMP),
        Item(Kind.FLAG, "gone", 9, None),
        Item(Kind.SEGMENT, "crew", 4, CREW),
    ]
)


def test_the_all_stream_opens_with_both_kinds_in_verbatim_bytes():
    """Exact frame: LF, one data line, flags before segments, no tombstones."""
    assert AllFormat().opening(PAYLOAD) == (
        b'event: put\ndata: {"path":"/","data":{"flags":{"la\\"mp":%b},"segments":{"crew":%b}}}\n\n'
        % (LAMP, CREW)
    )


def test_the_flags_stream_opens_with_a_bare_map():
    """Old SDKs expect this form."""
    assert FlagsFormat().opening(PAYLOAD) == b'event: put\ndata: {"la\\"mp":%b}\n\n' % LAMP


def test_an_empty_environment_has_both_maps():
    """Python's SDK fails without `segments` (sdk-behaviour 11.3)."""
    assert all_data(Payload.of([])) == b'{"flags":{},"segments":{}}'


def test_updates_are_patches_and_deletes():
    """One message per item; the flags stream leaves segments out."""
    shown = (
        Item(Kind.FLAG, "lamp", 3, LAMP),
        Item(Kind.FLAG, "old", 8, None),
        Item(Kind.SEGMENT, "crew", 4, CREW),
    )
    change = Change(shown, shown)
    assert AllFormat().update(change) == (
        b'event: patch\ndata: {"path":"/flags/lamp","data":%b}\n\n'
        b'event: delete\ndata: {"path":"/flags/old","version":8}\n\n'
        b'event: patch\ndata: {"path":"/segments/crew","data":%b}\n\n' % (LAMP, CREW)
    )
    assert FlagsFormat().update(change) == (
        b'event: patch\ndata: {"path":"/lamp","data":%b}\n\n'
        b'event: delete\ndata: {"path":"/old","version":8}\n\n' % LAMP
    )


keys = st.text(min_size=1).filter(lambda key: key.isprintable())


@given(st.dictionaries(keys, st.integers(0, 2**60)), st.dictionaries(keys, st.integers(0, 9)))
def test_encoded_payloads_can_be_parsed(flags, segments):
    """A relay can be the upstream of another relay, byte for byte."""
    items = [Item(Kind.FLAG, k, v, b'{"version":%d}' % v) for k, v in flags.items()]
    items += [Item(Kind.SEGMENT, k, v, b'{"version":%d}' % v) for k, v in segments.items()]
    payload = Payload.of(items)
    message = AllFormat().opening(payload)
    assert message.count(b"\n") == 3
    data = message.removeprefix(b"event: put\ndata: ").removesuffix(b"\n\n")
    parsed = parse("put", data)
    assert parsed is not None
    assert set(parsed.items) == set(items)
    assert set(parse_all(all_data(payload)).items) == set(items)
