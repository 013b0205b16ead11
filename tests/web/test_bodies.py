"""Decompression: whatever comes in whatever pieces, all of it comes out, and no more at a time."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.protocol.gzip import CORRUPT
from relay.web.bodies import INFLATED_AT_ONCE, Gunzip

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
    """The contents of all streams come out; what follows does not matter."""
    data = b"".join(gzip.compress(content, level) for content, level in members) + trailer
    gunzip, parts = Gunzip(), []
    for at in range(0, len(data), size):
        parts += gunzip.parts(data[at : at + size])
    assert gunzip.complete
    assert b"".join(parts) == b"".join(content for content, _ in members)
    assert all(0 < len(part) <= INFLATED_AT_ONCE for part in parts)


@settings(max_examples=60, deadline=None)
@given(contents, st.data())
def test_half_a_stream_is_not_complete(content, data):
    """A stream that is cut anywhere is noticed, also when it is the second one."""
    whole = gzip.compress(content)
    cut = data.draw(st.integers(3, len(whole) - 1))
    for before in (b"", whole):
        gunzip = Gunzip()
        list(gunzip.parts(before + whole[:cut]))
        assert not gunzip.complete


def test_what_is_no_gzip():
    """It is an error, not silence."""
    with pytest.raises(CORRUPT):
        list(Gunzip().parts(b"\x1f\x8b\x08\0\0\0\0\0\0\3" + b"\xff" * 50))
