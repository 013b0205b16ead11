"""Items are checked at the edge and travel in their own bytes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InvalidData
from relay.model.item import LAST_VERSION_OF_TIME, Item, Kind, parse, version_of_time


def test_an_item_keeps_the_bytes_in_which_it_came():
    """Unknown members, number spellings and order survive."""
    raw = b'{"zz":[1e21,-0,1.0],"version":7,"key":"a","_links":{"x":null}}'
    assert parse(Kind.FLAG, "a", raw) == Item(Kind.FLAG, "a", 7, raw)


def test_a_deleted_item_is_a_tombstone():
    """A tombstone records only the version of the deletion."""
    assert parse(Kind.SEGMENT, "a", b'{"version":9,"deleted":true}') == Item(
        Kind.SEGMENT, "a", 9, None
    )


@pytest.mark.parametrize(
    ("availability", "added"),
    [
        (b'{"usingEnvironmentId":true,"usingMobileKey":false}', True),
        (b'{"usingMobileKey":true}', False),
    ],
)
def test_a_flag_gets_the_member_that_old_sdks_read(availability, added):
    """`clientSide` is added from `clientSideAvailability` when it is missing."""
    raw = b'{"key":"a","version":1,"clientSideAvailability":' + availability + b"}"
    item = parse(Kind.FLAG, "a", raw)
    assert item.json is not None
    assert json.loads(item.json)["clientSide"] is added
    assert item.json.startswith(raw[:-1])


@pytest.mark.parametrize(
    "raw",
    [
        b'{"key":"a","version":1,"clientSideAvailability":{},"clientSide":true}',
        b'{"key":"a","version":1,"clientSideAvailability":null}',
        b'{"key":"a","version":1}',
    ],
)
def test_nothing_else_is_added(raw):
    """A flag with `clientSide`, or without availability, stays as it is."""
    assert parse(Kind.FLAG, "a", raw).json == raw


def test_line_ends_between_tokens_become_blanks():
    """An item is one line, because it becomes one `data:` line."""
    item = parse(Kind.FLAG, "a", b' {\r\n"version" :\n 3 }\n')
    assert item.json == b'{  "version" :  3 }'


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        (Kind.FLAG, b'{"version":"x"}'),
        (Kind.FLAG, b'{"version":1,"on":5}'),
        (Kind.FLAG, b'{"version":1,"variations":{}}'),
        (Kind.FLAG, b'{"version":1,"rules":[{"clauses":[{"values":1}]}]}'),
        (Kind.FLAG, b'{"version":1,"fallthrough":{"rollout":{"variations":"x"}}}'),
        (Kind.FLAG, b"[]"),
        (Kind.FLAG, b"null"),
        (Kind.FLAG, b"{nope"),
        (Kind.FLAG, b'{"version":1e999}'),
        (Kind.FLAG, b'{"version":1,"variations":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        (Kind.SEGMENT, b'{"version":1,"included":["a",2]}'),
        (Kind.SEGMENT, b'{"version":1,"rules":[{"weight":"x"}]}'),
    ],
)
def test_a_known_property_of_a_wrong_type_makes_an_item_invalid(kind, raw):
    """Strict SDKs would reject the whole payload for it."""
    with pytest.raises(InvalidData, match='"bad"'):
        parse(kind, "bad", raw)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"version":3.0,"rules":null,"targets":null,"migration":null,"offVariation":null}',
        b'{"version":3.7,"fallthrough":{"rollout":null},"debugEventsUntilDate":1.5e12}',
    ],
)
def test_numbers_may_have_fractions_and_lists_may_be_null(raw):
    """Items that ld-relay accepts are accepted."""
    assert parse(Kind.FLAG, "a", raw).version == 3


@given(st.binary())
def test_any_bytes_give_an_item_or_invalid_data(raw):
    """No bytes of a peer raise anything but `InvalidData`."""
    try:
        item = parse(Kind.FLAG, "a", raw)
    except InvalidData:
        return
    assert item.json is None or isinstance(json.loads(item.json), dict)


def test_a_version_grows_with_time_and_fits_thirty_two_bits():
    """Also if the clock is wrong."""
    assert [version_of_time(t) for t in (-1.0, 0.0, 1_700_000_000.9, 1e12)] == [
        *(0, 0, 1_700_000_000, LAST_VERSION_OF_TIME)
    ]


def test_an_item_without_json_is_a_tombstone():
    """One with any JSON is live."""
    assert Item(Kind.FLAG, "a", 1, None).deleted
    assert not Item(Kind.FLAG, "a", 1, b"{}").deleted
