"""Request bodies and their decompression, in pieces of any size."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from relay.protocol.gzip import CORRUPT
from relay.web.bodies import INFLATED_AT_ONCE, Gunzip, MemoryBudget, RequestBody

contents = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda part, n: part * n, st.binary(min_size=1, max_size=3), st.integers(0, 300_000)),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(contents, st.sampled_from([0, 1, 9])), min_size=1, max_size=3),
    st.sampled_from([b"", b"\x1f", b"\x1f\x8b", b"\0\0", b"x" * 20]),
    st.integers(1, 4000),
)
def test_any_streams_in_any_pieces(members, trailer, size):
    """The contents of all gzip streams come out in bounded parts; a trailer is ignored."""
    data = b"".join(gzip.compress(content, level) for content, level in members) + trailer
    gunzip, parts = Gunzip(), []
    for at in range(0, len(data), size):
        parts += gunzip.parts(data[at : at + size])
    assert gunzip.complete
    assert b"".join(parts) == b"".join(content for content, _ in members)
    assert all(0 < len(part) <= INFLATED_AT_ONCE for part in parts)


@settings(max_examples=60, deadline=None)
@given(contents, st.data())
def test_a_cut_stream_is_incomplete(content, data):
    """A stream that is cut anywhere is noticed, even if it is the second one."""
    whole = gzip.compress(content)
    cut = data.draw(st.integers(3, len(whole) - 1))
    for before in (b"", whole):
        gunzip = Gunzip()
        list(gunzip.parts(before + whole[:cut]))
        assert not gunzip.complete


def test_corrupt_gzip_raises():
    """Bytes that are not gzip are an error, not an empty body."""
    with pytest.raises(CORRUPT):
        list(Gunzip().parts(b"\x1f\x8b\x08\0\0\0\0\0\0\3" + b"\xff" * 50))


async def test_a_debugger_shows_progress_and_memory():
    """A body states what has arrived, a budget what is left."""
    messages = [{"type": "http.request", "body": b"x" * 10, "more_body": more} for more in (1, 0)]

    async def receive():
        return messages.pop(0)

    budget = MemoryBudget(capacity=100)
    body = RequestBody(Request({"type": "http", "headers": []}, receive), budget)
    assert repr(body) == "<RequestBody [0 bytes received, incomplete]>"
    await body.read()
    assert repr(body) == "<RequestBody [20 bytes received, complete]>"
    assert repr(budget) == "<MemoryBudget [80 bytes left]>"
