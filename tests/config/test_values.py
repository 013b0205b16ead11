"""What stands around a value is taken off; what is left is checked by what the value is."""

import pytest

from relay.config import values
from relay.model.credential import Secret
from relay.model.text import header_value, one_line

AROUND = ["{}\n", "{}\r\n", " {}", "\t{} ", "\ufeff{}", "{}\u00a0", "\u200b{}\u2028", " \n{}\x85\n"]
"""What Secrets, YAML blocks and editors add."""


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (values.KEY, "sdk-1", "sdk-1"),
        (values.ENVIRONMENT_ID, "id-1", "id-1"),
        (values.STRING, "a prefix", "a prefix"),
        (values.SECRET, "pass word", "pass word"),
        (values.PATH, "/a b", "/a b"),
        (values.INTEGER, "8030", 8030),
        (values.BOOLEAN, "true", True),
        (values.DURATION, "5s", 5.0),
        (values.SIZE, "1KiB", 1024),
        (values.LOG_LEVEL, "Debug", "debug"),
        (values.URI, "redis://h", "redis://h"),
        (values.HTTP_URI, "http://h", "http://h"),
        (values.ORIGINS, "https://a,https://b", ("https://a", "https://b")),
    ],
)
def test_what_nobody_sees_is_taken_off(around, kind, text, value):
    """Blanks, line ends, byte order marks and the like, around values of all types."""
    found = kind.parse(around.format(text))
    assert (found.reveal() if isinstance(found, Secret) else found) == value


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    ("kind", "members"),
    [
        (values.ORIGINS, ("https://a", "https://b")),
        (values.HEADER_NAMES, ("X-A", "X-B")),
        (values.PATHS, ("/a", "/b")),
        (values.LIST, ("a", "b")),
    ],
)
def test_what_nobody_sees_is_taken_off_members_of_lists(around, kind, members):
    """The second origin of `a, b` is allowed like the first."""
    assert kind.parse(",".join(map(around.format, members))) == members


@pytest.mark.parametrize("text", ['"{}"', "'{}'", '" {}\n"', '"{}"\n'])
def test_quotation_marks_that_cannot_be_meant_are_taken_off(text):
    """As a file of variables brings them, which Docker does not interpret."""
    assert values.KEY.parse(text.format("sdk-1")).reveal() == "sdk-1"
    assert values.INTEGER.parse(text.format("1")) == 1
    assert values.HTTP_URI.parse(text.format("http://h")) == "http://h"
    assert values.ORIGINS.parse(text.format("http://a, http://b")) == ("http://a", "http://b")
    assert values.ORIGINS.parse('"http://a","http://b"') == ("http://a", "http://b")


def test_quotation_marks_that_may_be_meant_stay():
    """In passwords and other free text."""
    assert values.SECRET.parse('"x"').reveal() == '"x"'
    assert values.STRING.parse('"x"\n') == '"x"'


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (values.KEY, "sdk-1 // comment", "character 6 is a blank"),
        (values.KEY, "sdk\n-1", "character 4 is a line end"),
        (values.KEY, 'sdk-1"', "character 6 is a quotation mark"),
        (values.KEY, "sdk-ü", "character 5 is U+00FC"),
        (values.KEY, "sdk-1\x00", "character 6 is U+0000"),
        (values.KEY, "sdk\u200b-1", "character 4 is U+200B"),
        (values.KEY, "sdk-\udcff", "not UTF-8"),
        (values.ENVIRONMENT_ID, "id\r\nset-cookie: a=b", "character 3 is a carriage return"),
        (values.ENVIRONMENT_ID, "a/b", "character 2 is a slash"),
        (values.ENVIRONMENT_ID, "a?b", "character 2 is U+003F"),
        (values.STRING, "a\nb", "character 2 is a line end"),
        (values.STRING, "a\x85b", "character 2 is U+0085"),
        (values.STRING, "\udce9", "not UTF-8"),
        (values.SECRET, "\udce9", "not UTF-8"),
        (values.PATH, "/a\x00b", "character 3 is U+0000"),
        (values.HTTP_URI, "http://h\u00a0/", "not a valid URL/URI"),
        (values.HEADER_NAMES, "X-A, X B", '"X B" is not the name of a header'),
        (values.HEADER_NAMES, "X-A:1", "is not the name of a header"),
        (values.HEADER_NAMES, "X\r\nY", "is not the name of a header"),
        (values.ORIGINS, ",", "commas only"),
        (values.ORIGINS, "a.example", "no browser has the origin"),
        (values.ORIGINS, "https://*.x", 'no browser has the origin "https://*.x"'),
        (values.ORIGINS, "https://a/path", "no browser has the origin"),
        (values.ORIGINS, "https://u@a", "no browser has the origin"),
        (values.ORIGINS, "https://a https://b", "no browser has the origin"),
        (values.ORIGINS, "https://a:70000", "no browser has the origin"),
        (values.ORIGINS, "https://bücher.example", "no browser has the origin"),
        (values.ORIGINS, "https://a\r\nx: y", "no browser has the origin"),
    ],
)
def test_what_cannot_be_right_is_refused(kind, text, words):
    """The sentence says what is wrong, and repeats no credential."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        kind.parse(text)
    assert words in str(caught.value)
    assert "sdk-" not in str(caught.value)
    assert one_line(str(caught.value)) == str(caught.value)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://a.example", "https://a.example"),
        ("https://a.example/", "https://a.example"),
        ("HTTPS://A.Example", "https://a.example"),
        ("https://a.example:443", "https://a.example"),
        ("http://a.example:80/", "http://a.example"),
        ("http://a.example:443", "http://a.example:443"),
        ("http://localhost:03000", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
        ("*", "*"),
        ("NULL", "null"),
        ("file:///", "file://"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("app://Main/", "app://Main"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
    ],
)
def test_origins_are_written_as_browsers_write_them(text, origin):
    """Else they could never match. `*`, `null` and those of programs are as they were."""
    assert values.ORIGINS.parse(text) == (origin,)


def test_members_without_a_value_do_not_count():
    """As a comma at the end makes one; whoever judges filters wants to see them."""
    assert values.ORIGINS.parse("https://a,, ") == ("https://a",)
    assert values.LIST.parse("a, ,b") == ("a", "", "b")


def test_a_text_fits_in_a_line_and_in_a_header():
    """Line ends of all kinds are shown in a line, and are blanks in a header."""
    assert one_line("a\r\n\t\x1b\x85\u2028\u202e\udce9ü") == (
        "a\\r\\n\\t\\x1b\\x85\\u2028\\u202e\\xe9ü"
    )
    assert header_value(b" a\r\nb\x00\x1f\x7f\tc\xc3\xa4 ") == b"a  b   \tc\xc3\xa4"
