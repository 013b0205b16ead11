"""Encodings of untrusted text."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.model.text import from_base64


@given(st.binary(), st.booleans(), st.booleans())
def test_both_alphabets_are_decoded(content, url_safe, padded):
    """Padded or not."""
    encode = base64.urlsafe_b64encode if url_safe else base64.b64encode
    text = encode(content)
    assert from_base64(text if padded else text.rstrip(b"=")) == content


@pytest.mark.parametrize("text", [b"a", b"!!!!", b"aGk\n", b"a=Gk", b"\xc3\xa4", b"aG k"])
def test_other_characters_are_refused(text):
    """Line ends, too, unless they are to be ignored."""
    with pytest.raises(ValueError):
        from_base64(text)


def test_some_characters_can_be_ignored():
    """As line ends within a context."""
    assert from_base64(b"aGVs\r\nbG8", ignored=b"\r\n") == b"hello"
