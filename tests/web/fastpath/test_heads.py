"""Request heads have the same template if only values of variable headers differ."""

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


def test_variable_values_are_taken_out():
    """Length and ids, in the order of the head, in upper or lower case."""
    template, values = normalise_head(HEAD)
    assert values == [b"12", b"5f252577-99d3", b"a3c7fb12"]
    assert variable_names(template) == [
        *(b"content-length", b"x-launchdarkly-instance-id", b"x-launchdarkly-payload-id")
    ]
    assert variable_names(normalise_head(HEAD.lower())[0]) == variable_names(template)


@pytest.mark.parametrize(
    "changed_head",
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
def test_other_heads_have_another_template(changed_head):
    """Values that a parser might read otherwise are part of the template."""
    assert normalise_head(changed_head)[0] != normalise_head(HEAD)[0]


@given(st.data())
def test_every_other_byte_is_in_the_template(data):
    """Any change of a head makes another template, or other values only."""
    at = data.draw(st.integers(0, len(HEAD) - 1))
    until = data.draw(st.integers(at, min(at + 3, len(HEAD))))
    changed = HEAD[:at] + data.draw(st.binary(max_size=3)) + HEAD[until:]
    (template, values), (original, _) = normalise_head(changed), normalise_head(HEAD)
    if template == original:
        assert all(re.fullmatch(rb"[0-9A-Za-z-]{1,100}", value) for value in values)
        rebuilt = original[0]
        for name, value, text in zip(original[1::2], values, original[2::2], strict=True):
            rebuilt += b"\r\n%b: %b%b" % (name, value, text)
        assert changed == rebuilt
