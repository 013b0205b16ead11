import pytest

from relay.model.text import header_value, is_utf8, one_line


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
