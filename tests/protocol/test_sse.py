"""Server-sent events: decoding is independent of splits, and the inverse of encoding."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InvalidData
from relay.protocol.sse import Decoder, Event, encode
from tests.support.strategies import events

FRAGMENTS = (
    *(b"data: ", b"data:", b"data", b"event: put", b":", b" ", b"\r", b"\n", b"\r\n", b"id: 7"),
    *(b"id: \0", b"retry: 10", b"x", "\u2028ü".encode(), b"\xff", b"\xef\xbb\xbf", b"\x85"),
)
fragments = st.lists(st.sampled_from(FRAGMENTS)).map(b"".join)


def decoded(content: bytes) -> list[Event]:
    return Decoder().feed(content)


@given(fragments, st.data())
def test_splits_do_not_matter(content, data):
    """The same bytes give the same events, wherever they are split."""
    splits = sorted(data.draw(st.lists(st.integers(0, len(content)))))
    decoder = Decoder()
    bounds = zip([0, *splits], [*splits, len(content)], strict=True)
    assert [e for a, b in bounds for e in decoder.feed(content[a:b])] == decoded(content)
    single = Decoder()
    assert [e for n in content for e in single.feed(bytes([n]))] == decoded(content)
    assert decoder.retry == single.retry


def written(event: Event) -> bytes:
    """A message as other servers may write it: with an ID, and data of several lines."""
    fields = [("event", event.name), *[("id", event.id)][: bool(event.id)]]
    fields += [("data", line) for line in event.data.decode().split("\n")]
    return "".join(f"{name}: {value}\n" for name, value in fields).encode() + b"\n"


@given(st.lists(events))
def test_all_messages_are_decoded(messages):
    """With names, IDs and data of any text; an ID holds for the messages that follow."""
    expected, last_id = [], ""
    for message in messages:
        last_id = message.id or last_id
        expected.append(message._replace(id=last_id))
    assert decoded(b"".join(map(written, messages))) == expected


@given(st.lists(st.tuples(events, st.integers(0, 30))))
def test_decoding_undoes_encoding(messages):
    """However the data are divided into parts."""
    single = [(e.name, e.data.replace(b"\n", b""), at) for e, at in messages]
    content = [encode(name.encode(), data[:at], data[at:]) for name, data, at in single]
    assert decoded(b"".join(content)) == [Event(name, data) for name, data, _ in single]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"data: a\n\n", [Event("message", b"a")]),
        (b"event:put\ndata:a\n\n", [Event("put", b"a")]),
        (b"event: put\rdata:  a\r\r", [Event("put", b" a")]),
        (b"event: put\r\ndata: a\r\ndata: b\r\n\r\n", [Event("put", b"a\nb")]),
        (b"\xef\xbb\xbfdata: a\n\n", [Event("message", b"a")]),
        (b": hello\n\n", []),
        (b":\n\n\n", []),
        (b"event: put\n\n", [Event("put", b"")]),
        (b"data\n\n", [Event("message", b"")]),
        (b"data: a\n", []),
        (b"id: 1\ndata\n\ndata\n\n", [Event("message", b"", "1"), Event("message", b"", "1")]),
        ("data: \u2028\u0085\n\n".encode(), [Event("message", "\u2028\u0085".encode())]),
    ],
)  # fmt: skip
def test_the_grammar(content, expected):
    """Line ends, blanks, comments, ids and blocks without data, as in streams 2.6."""
    assert decoded(content) == expected


def test_retry():
    """Only digits are accepted."""
    decoder = Decoder()
    decoder.feed(b"retry: 2500\n\nretry: soon\n\nretry: 99999999999999\n\n")
    assert decoder.retry == 2500


@pytest.mark.parametrize("garbage", [b"x" * 100, b"data: x\n" * 10, b"data\n" * 10])
def test_a_message_without_end_is_refused(garbage):
    """Memory is bounded for any input."""
    decoder = Decoder(max_message=1000)
    with pytest.raises(InvalidData, match="longer than 1000 bytes"):
        list(map(decoder.feed, [garbage] * 100))


def test_many_messages_are_not_one():
    """The limit applies to each message, not to the stream."""
    decoder = Decoder(max_message=200)
    for _ in range(100):
        assert len(decoder.feed(encode(b"put", b"x" * 90)) + decoder.feed(b":" + b" " * 90)) == 1
        decoder.feed(b"\n")
