"""Request heads are alike when they say the same but for what each instance and each post has anew."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.web.fastpath.heads import normalise_head, variable_names

HEAD = (
    b"POST /bulk HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\nAuthorization: sdk-1\r\n"
    b"X-LaunchDarkly-Instance-Id: 5f252577-99d3\r\nX-LaunchDarkly-Payload-ID: a3c7fb12\r\n\r\n"
)


def test_what_is_left_out():
    """Length and ids, in the order of the head, however their names are written."""
    outline, values = normalise_head(HEAD)
    assert values == [b"12", b"5f252577-99d3", b"a3c7fb12"]
    assert variable_names(outline) == [
        *(b"content-length", b"x-launchdarkly-instance-id", b"x-launchdarkly-payload-id")
    ]
    assert variable_names(normalise_head(HEAD.lower())[0]) == variable_names(outline)


@pytest.mark.parametrize(
    "odd",
    [
        HEAD.replace(b": 12", b":12"),
        HEAD.replace(b": 12", b": 12 "),
        HEAD.replace(b"a3c7fb12", b"a3c7fb12\nX: y"),
        HEAD.replace(b"a3c7fb12", b"a" * 101),
        HEAD.replace(b"5f252577-99d3", b""),
        HEAD.replace(b"5f252577-99d3", b"\x00"),
        HEAD.replace(b"sdk-1", b"sdk-2"),
        HEAD.replace(b"Host: x\r\n", b""),
        HEAD.replace(b"Content-Length: 12\r\n", b"Content-Length: 12\r\nContent-Length: 12\r\n"),
    ],
)
def test_who_says_something_else_is_not_alike(odd):
    """Values that a parser might read otherwise are part of the outline."""
    assert normalise_head(odd)[0] != normalise_head(HEAD)[0]


@given(st.data())
def test_a_head_is_known_by_every_byte(data):
    """Whoever changes, adds or takes away something has another outline, or other values only."""
    at = data.draw(st.integers(0, len(HEAD) - 1))
    until = data.draw(st.integers(at, min(at + 3, len(HEAD))))
    changed = HEAD[:at] + data.draw(st.binary(max_size=3)) + HEAD[until:]
    (outline, values), (first, _) = normalise_head(changed), normalise_head(HEAD)
    if outline == first:
        assert all(re.fullmatch(rb"[0-9A-Za-z-]{1,100}", value) for value in values)
        rebuilt = first[0]
        for name, value, text in zip(first[1::2], values, first[2::2], strict=True):
            rebuilt += b"\r\n%b: %b%b" % (name, value, text)
        assert changed == rebuilt
