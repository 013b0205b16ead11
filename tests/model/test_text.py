"""Texts from outside: encodings, and what must not end a line or a header."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.model.text import from_base64, header_value, is_utf8, one_line


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ä, 日本", "plain, ä, 日本"),
        ("a\r\n\tb", "a\\r\\n\\tb"),
        ("\x00\x1b[31m\x7f", "\\x00\\x1b[31m\\x7f"),
        ("one\u2028two", "one\\u2028two"),
        ("\u202eevil", "\\u202eevil"),
        (b"\xff\x80".decode(errors="surrogateescape"), "\\xff\\x80"),
        ("\ud83d", "\\ud83d"),
        ("", ""),
    ],
)
def test_no_text_ends_a_line(text, shown):
    """Control characters, line ends, changes of direction and foreign bytes are escaped."""
    assert one_line(text) == shown


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (b"a b", b"a b"),
        (b" a\r\nX: b\t", b"a  X: b"),
        (b"\x00\x7f", b""),
        (b"a\tb\xe9", b"a\tb\xe9"),
    ],
)
def test_no_value_ends_a_header(value, sent):
    """Control characters but tabs become spaces; those at the ends are dropped."""
    assert header_value(value) == sent


@pytest.mark.parametrize(("text", "valid"), [("ä", True), ("\udcff", False), ("", True)])
def test_bytes_that_are_not_utf8_are_noticed(text, valid):
    """They are surrogates after decoding."""
    assert is_utf8(text) is valid
