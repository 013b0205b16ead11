"""Values are stripped, then validated by their type."""

import pytest

from relay.config import types
from relay.model.credential import Secret
from relay.model.text import header_value, one_line

AROUND = ["{}\n", "{}\r\n", " {}", "\t{} ", "\ufeff{}", "{}\u00a0", "\u200b{}\u2028", " \n{}\x85\n"]
"""Characters that Kubernetes secrets, YAML blocks and editors add."""


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (types.KEY, "sdk-1", "sdk-1"),
        (types.ENVIRONMENT_ID, "id-1", "id-1"),
        (types.STRING, "a prefix", "a prefix"),
        (types.SECRET, "pass word", "pass word"),
        (types.PATH, "/a b", "/a b"),
        (types.INTEGER, "8030", 8030),
        (types.BOOLEAN, "true", True),
        (types.DURATION, "5s", 5.0),
        (types.SIZE, "1KiB", 1024),
        (types.LOG_LEVEL, "Debug", "debug"),
        (types.URI, "redis://h", "redis://h"),
        (types.HTTP_URI, "http://h", "http://h"),
        (types.ORIGINS, "https://a,https://b", ("https://a", "https://b")),
    ],
)
def test_invisible_characters_around_a_value_are_stripped(around, kind, text, value):
    """Blanks, line ends, byte order marks and the like, for all types."""
    parsed = kind.parse(around.format(text))
    assert (parsed.reveal() if isinstance(parsed, Secret) else parsed) == value


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    ("kind", "members"),
    [
        (types.ORIGINS, ("https://a", "https://b")),
        (types.HEADER_NAMES, ("X-A", "X-B")),
        (types.PATHS, ("/a", "/b")),
        (types.LIST, ("a", "b")),
    ],
)
def test_invisible_characters_around_list_members_are_stripped(around, kind, members):
    """The second origin of `a, b` is as good as the first."""
    assert kind.parse(",".join(map(around.format, members))) == members


@pytest.mark.parametrize("text", ['"{}"', "'{}'", '" {}\n"', '"{}"\n'])
def test_quotation_marks_around_a_value_are_stripped(text):
    """Docker does not interpret them in env files."""
    assert types.KEY.parse(text.format("sdk-1")).reveal() == "sdk-1"
    assert types.INTEGER.parse(text.format("1")) == 1
    assert types.HTTP_URI.parse(text.format("http://h")) == "http://h"
    assert types.ORIGINS.parse(text.format("http://a, http://b")) == ("http://a", "http://b")
    assert types.ORIGINS.parse('"http://a","http://b"') == ("http://a", "http://b")


def test_quotation_marks_in_free_text_are_kept():
    """They may belong to passwords and other free text."""
    assert types.SECRET.parse('"x"').reveal() == '"x"'
    assert types.STRING.parse('"x"\n') == '"x"'


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (types.KEY, "sdk-1 // comment", "character 6 is a blank"),
        (types.KEY, "sdk\n-1", "character 4 is a line end"),
        (types.KEY, 'sdk-1"', "character 6 is a quotation mark"),
        (types.KEY, "sdk-ü", "character 5 is U+00FC"),
        (types.KEY, "sdk-1\x00", "character 6 is U+0000"),
        (types.KEY, "sdk\u200b-1", "character 4 is U+200B"),
        (types.KEY, "sdk-\udcff", "not UTF-8"),
        (types.ENVIRONMENT_ID, "id\r\nset-cookie: a=b", "character 3 is a carriage return"),
        (types.ENVIRONMENT_ID, "a/b", "character 2 is a slash"),
        (types.ENVIRONMENT_ID, "a?b", "character 2 is U+003F"),
        (types.STRING, "a\nb", "character 2 is a line end"),
        (types.STRING, "a\x85b", "character 2 is U+0085"),
        (types.STRING, "\udce9", "not UTF-8"),
        (types.SECRET, "\udce9", "not UTF-8"),
        (types.PATH, "/a\x00b", "character 3 is U+0000"),
        (types.HTTP_URI, "http://h\u00a0/", "not a valid URL/URI"),
        (types.HEADER_NAMES, "X-A, X B", '"X B" is not the name of a header'),
        (types.HEADER_NAMES, "X-A:1", "is not the name of a header"),
        (types.HEADER_NAMES, "X\r\nY", "is not the name of a header"),
        (types.ORIGINS, ",", "commas only"),
        (types.ORIGINS, "a.example", "no browser has the origin"),
        (types.ORIGINS, "https://*.x", 'no browser has the origin "https://*.x"'),
        (types.ORIGINS, "https://a/path", "no browser has the origin"),
        (types.ORIGINS, "https://u@a", "no browser has the origin"),
        (types.ORIGINS, "https://a https://b", "no browser has the origin"),
        (types.ORIGINS, "https://a:70000", "no browser has the origin"),
        (types.ORIGINS, "https://bücher.example", "no browser has the origin"),
        (types.ORIGINS, "https://a\r\nx: y", "no browser has the origin"),
    ],
)
def test_invalid_values_are_rejected(kind, text, words):
    """The message states the reason, and repeats no credential."""
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
def test_origins_are_normalised_to_the_form_of_browsers(text, origin):
    """Otherwise they would never match. `*`, `null` and origins of apps stay as they are."""
    assert types.ORIGINS.parse(text) == (origin,)


def test_empty_list_members_are_dropped():
    """A trailing comma makes one; only lists validated elsewhere keep them."""
    assert types.ORIGINS.parse("https://a,, ") == ("https://a",)
    assert types.LIST.parse("a, ,b") == ("a", "", "b")


def test_a_text_fits_in_a_line_and_in_a_header():
    """Line ends are escaped in a log line, and become blanks in a header."""
    assert one_line("a\r\n\t\x1b\x85\u2028\u202e\udce9ü") == (
        "a\\r\\n\\t\\x1b\\x85\\u2028\\u202e\\xe9ü"
    )
    assert header_value(b" a\r\nb\x00\x1f\x7f\tc\xc3\xa4 ") == b"a  b   \tc\xc3\xa4"
