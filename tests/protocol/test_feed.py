"""Term, head and entries, as the relays of a fleet write them for each other."""

from __future__ import annotations

import msgspec
import pytest

from relay.errors import InvalidData
from relay.model.item import Item, Kind
from relay.model.payload import Selector
from relay.protocol.feed import (
    LARGE,
    LARGEST,
    Entry,
    Head,
    Term,
    entry_of,
    fields_of,
    name_of,
    note_of,
)

ITEMS = (
    Item(Kind.FLAG, "lämp", 3, b'{"key": "l\xc3\xa4mp", "version":3 }'),
    Item(Kind.SEGMENT, "crowd", 2, None),
)


def entry(**members: object) -> Entry:
    return Entry("p:x", Term(7, "me"), 12, "aa", "bb", **members)  # type: ignore[arg-type]


def again(entry: Entry) -> Entry:
    words = [word.encode() if isinstance(word, str) else word for word in fields_of(entry)]
    return entry_of(dict(zip(words[::2], words[1::2], strict=True)))


@pytest.mark.parametrize(
    "members",
    [
        {"items": ITEMS, "evaluated": 5},
        {"confirmed": False},
        {"items": None},
        {"resigned": True},
        {"items": ITEMS, "name": Selector("(p:P:7)", "P", 7)},
        {"name": Selector("(p:P:8)", "P", 8, verbatim=False)},
    ],
)
def test_an_entry_is_read_as_it_was_written(members: dict) -> None:
    """Followers get the very bytes that upstream has sent to the leader."""
    assert again(entry(**members)) == entry(**members)


class _Former(msgspec.Struct, array_like=True):
    """An entry as releases know it that tell no names."""

    term: int
    owner: str
    number: int
    before: str
    after: str
    confirmed: bool
    evaluated: int
    items: list[tuple[str, str, int, bytes | None]] | None
    resigned: bool


def test_releases_without_names_understand_those_with_names() -> None:
    """And the other way round: relays of a fleet are not replaced all at once."""
    fields = fields_of(entry(items=ITEMS, name=Selector("(p:P:7)", "P", 7)))
    content = fields[fields.index(b"d") + 1]
    assert isinstance(content, bytes)
    former = msgspec.msgpack.decode(content, type=_Former)
    assert (former.number, former.after, former.resigned) == (12, "bb", False)
    again = entry_of({b"p": b"p:x", b"d": msgspec.msgpack.encode(former)})
    assert again == entry(items=ITEMS)


def test_the_name_beside_the_head_is_that_of_its_data() -> None:
    """A former release writes data and head, but leaves the name of other data there."""
    name = Selector("(p:P:7)", "P", 7)
    note = note_of(entry(name=name))
    assert name_of(note, Head(12, "bb", "id")) == name
    for head in (None, Head(13, "bb", "id"), Head(12, "cc", "id")):
        assert name_of(note, head) is None
    for nothing in (note_of(entry()), b"", b"\x93\1", b"{}"):
        assert name_of(nothing, Head(12, "bb", "id")) is None


def test_large_entries_are_compressed() -> None:
    """A change of many kilobytes takes few of them in Redis."""
    items = (Item(Kind.FLAG, "large", 1, b"{%s}" % (b" " * 2 * LARGE)),)
    fields = fields_of(entry(items=items))
    assert sum(map(len, fields)) < LARGE
    assert again(entry(items=items)).items == items


def test_too_large_entries_refer_to_the_data() -> None:
    """The feed's memory is bounded: what does not fit is read from where it is anyway."""
    items = (Item(Kind.FLAG, "large", 1, b"{%s}" % (b" " * LARGEST)),)
    assert again(entry(items=items)) == entry(items=None)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {b"p": b"x"},
        {b"p": b"x", b"d": b""},
        {b"p": b"x", b"d": b"\x93\1\2\3"},
        {b"p": b"x", b"z": b"not compressed"},
        {b"p": b"\xff", b"d": dict(zip(*[iter(fields_of(entry()))] * 2, strict=True))[b"d"]},
    ],
)
def test_what_is_no_entry_is_refused(fields: dict) -> None:
    """Other programs may write into the feed."""
    with pytest.raises(InvalidData, match="entry of the feed"):
        entry_of(fields)


def test_heads_and_terms_are_text_for_ever() -> None:
    """Relays of all releases understand each other's."""
    assert (str(Head(3, "ab", "id")), str(Term(7, "me"))) == ("3:ab:id", "7:me")
    assert Head.parse(b"3:ab:id") == Head(3, "ab", "id")
    assert Term.parse(b"7:me") == Term(7, "me")


@pytest.mark.parametrize("text", [None, b"", b"x:y:z", b"-1:a:b", b"\xff"])
def test_unreadable_ones_count_as_none(text: bytes | None) -> None:
    """Whatever another program has written there, it is nobody's."""
    assert Head.parse(text) is None
    assert Term.parse(text) == Term(0, "")
