"""The format of snapshot files: what was written is read, and anything else is refused."""

from hashlib import sha256
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InvalidData
from relay.model.item import Item, Kind
from relay.model.journal import SavedJournal
from relay.model.payload import Selector
from relay.protocol import snapshot
from relay.protocol.snapshot import EARLIEST, HEADER_SIZE, Header, UnknownFormat

ITEMS = st.lists(
    st.builds(
        Item,
        st.sampled_from(Kind),
        st.text(st.characters(codec="utf-8"), min_size=1),
        st.integers(1, 2**53),
        st.sampled_from([None, b'{"a":[1.0,"\xc3\xa4"]}', b"{}"]),
    ),
    unique_by=lambda item: (item.kind, item.key),
)


def header(body: bytes, items: int, confirmed: float = EARLIEST) -> Header:
    digest = sha256(body).hexdigest()
    return Header("env", "", confirmed, items, len(body), digest)


@given(ITEMS)
def test_items_are_read_as_they_were_written(items):
    """Tombstones and texts of any language among them, in as many chunks as it takes."""
    body = b"".join(snapshot.chunks(items))
    payload = snapshot.payload(header(body, len(items)), body)
    assert {(i.kind, i.key): i for i in payload} == {(i.kind, i.key): i for i in items}


def test_a_large_snapshot_comes_in_chunks():
    """None is much larger than a chunk, so that the event loop has its turn."""
    items = [Item(Kind.FLAG, f"f{n}", 1, b'{"x":"%s"}' % (b"x" * 100_000)) for n in range(30)]
    chunks = list(snapshot.chunks(items))
    assert len(chunks) == 3
    body = b"".join(chunks)
    assert len(snapshot.payload(header(body, 30), body)) == 30


def test_a_header_is_read_as_it_was_written():
    """It fills exactly one line."""
    written = header(b"", 0, confirmed=EARLIEST + 0.25)
    line = snapshot.first_line(written)
    assert len(line) == HEADER_SIZE
    assert line.endswith(b"\n")
    assert snapshot.header(line) == written


BODY = b"".join(snapshot.chunks([Item(Kind.FLAG, "a", 1, b"{}")]))
LINE = snapshot.first_line(header(b"", 0))


@pytest.mark.parametrize("position", range(0, HEADER_SIZE - 250, 7))
def test_a_damaged_header_is_refused(position):
    """Whichever byte is another."""
    damaged = LINE[:position] + bytes([LINE[position] ^ 1]) + LINE[position + 1 :]
    with pytest.raises((InvalidData, UnknownFormat)):
        snapshot.header(damaged)


@pytest.mark.parametrize("line", [b"", LINE[:-1], LINE + b" ", b"\n" * HEADER_SIZE])
def test_what_is_no_header_is_refused(line):
    """A line of another length, or of something else."""
    with pytest.raises(InvalidData, match="not that of a snapshot"):
        snapshot.header(line)


def test_a_header_with_other_members_is_damaged():
    """Even if its checksum is right."""
    text = b"relay snapshot 2 {}"
    line = (text + b" " + b"%08x" % crc32(text)).ljust(HEADER_SIZE - 1) + b"\n"
    with pytest.raises(InvalidData, match="environment"):
        snapshot.header(line)


def test_another_release_is_no_damage():
    """Its snapshot is not counted as damaged."""
    with pytest.raises(UnknownFormat):
        snapshot.header(LINE.replace(b"snapshot 2 ", b"snapshot 3 "))


def test_the_release_before_is_read():
    """Its files have no journal."""
    text = LINE.replace(b"snapshot 2 ", b"snapshot 1 ").replace(b',"journal":0', b"")
    text = text.rstrip().rpartition(b" ")[0]
    line = (text + b" " + b"%08x" % crc32(text)).ljust(HEADER_SIZE - 1) + b"\n"
    assert b"journal" not in line
    assert snapshot.header(line) == header(b"", 0)
    assert snapshot.journal(snapshot.header(line), b"") is None


JOURNAL = SavedJournal(
    step=7,
    floor=2,
    barrier=3,
    states=[("(p:a:1)", 2), ("(p:b:2)", 7)],
    touched={Kind.FLAG: [("a", 5), ("\u2028", 7)], Kind.SEGMENT: []},
    vanished=[(Kind.SEGMENT, "gone", 12)],
    forgotten=-1,
    digest=b"\0\xff" * 16,
    versions=9,
    upstream="(p:up:3)",
    selector=Selector("(p:up:3)", "up", 3),
    verbatim=True,
)


def with_journal(line: bytes) -> tuple[Header, bytes]:
    body = BODY + line
    digest = sha256(body).hexdigest()
    return Header("env", "", EARLIEST, 1, len(BODY), digest, len(line)), body


def test_a_journal_is_read_as_it_was_written():
    """Behind the items, which do not change by it."""
    given, body = with_journal(snapshot.journal_line(JOURNAL))
    assert len(snapshot.payload(given, body)) == 1
    assert snapshot.journal(given, body) == JOURNAL
    assert snapshot.header(snapshot.first_line(given)) == given


@pytest.mark.parametrize("line", [b"{}\n", b'{"step":"x"}\n', b"\xff\n", b"[\n"])
def test_a_journal_of_another_release_is_left_out(line):
    """The data are good without it."""
    given, body = with_journal(line)
    assert len(snapshot.payload(given, body)) == 1
    assert snapshot.journal(given, body) is None


def test_a_journal_that_is_damaged_damages_the_file():
    """It has to be that of these data."""
    given, body = with_journal(snapshot.journal_line(JOURNAL))
    with pytest.raises(InvalidData, match="checksum"):
        snapshot.payload(given, body.replace(b"(p:b:2)", b"(p:b:3)"))


@pytest.mark.parametrize(
    ("body", "given", "reason"),
    [
        (BODY + b" ", header(BODY, 1), "bytes instead"),
        (BODY[:-2] + b"x\n", header(BODY, 1), "checksum"),
        (BODY, header(BODY, 2), "1 items instead of 2"),
        (BODY[:-2], header(BODY[:-2], 1), "truncated"),
        (b'["pets","a",1,{}]\n', header(b'["pets","a",1,{}]\n', 1), "pets"),
    ],
)
def test_items_that_do_not_match_the_header_are_refused(body, given, reason):
    """The error names the difference."""
    with pytest.raises(InvalidData, match=reason):
        snapshot.payload(given, body)


@pytest.mark.parametrize(
    ("confirmed", "now", "age"),
    [
        (EARLIEST + 100, EARLIEST + 130, 30.0),
        (EARLIEST + 100, EARLIEST + 70, 0.0),
        (EARLIEST + 100, EARLIEST + 39, None),
        (EARLIEST - 1, EARLIEST + 100, None),
    ],
)
def test_the_age_is_unknown_if_a_clock_was_wrong(confirmed, now, age):
    """A minute into the future is tolerated; a time before the first release is not."""
    assert snapshot.age(header(b"", 0, confirmed), now) == age
