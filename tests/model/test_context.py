"""Contexts: valid and invalid JSON, properties, and references to attributes."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InvalidData
from relay.model.context import MAX_KINDS, Context, lookup, parse_context, parse_reference


def context_of(value: object) -> Context:
    """Return the context that a value describes."""
    return parse_context(json.dumps(value).encode())


USER = {"kind": "user", "key": "anna"}

VALID = [
    USER,
    {"kind": "a.B-c_9", "key": "x"},
    {**USER, "name": None},
    {**USER, "_meta": None},
    {**USER, "_meta": {"privateAttributes": None, "redactedAttributes": 3, "secondary": 1}},
    {**USER, "_meta": {"privateAttributes": ["/a"]}},
    {**USER, "x": {"y": [None]}},
    {"kind": "multi", "org": {"key": "a"}},
    {"kind": "multi", "org": {"kind": "org", "key": "a"}, "user": {"key": "b"}},
    {"key": ""},
    {"key": "a", "anonymous": None, "custom": None, "secondary": None, "ip": None},
    {"key": "a", "privateAttributeNames": ["x"]},
    {"key": "a", "unknown": [1]},
]
INVALID = [
    None,
    [1],
    "x",
    5,
    True,
    {},
    {"kind": None, "key": "a"},
    {"kind": "", "key": "a"},
    {"kind": 1, "key": "a"},
    {"kind": "kind", "key": "a"},
    {"kind": "a b", "key": "a"},
    {"kind": "ü", "key": "a"},
    {"kind": "user\n", "key": "a"},
    {"kind": "user"},
    {"kind": "user", "key": ""},
    {"kind": "user", "key": None},
    {"kind": "user", "key": 5},
    {**USER, "name": 5},
    {**USER, "anonymous": None},
    {**USER, "anonymous": "true"},
    {**USER, "_meta": 5},
    {**USER, "_meta": {"privateAttributes": "x"}},
    {**USER, "_meta": {"privateAttributes": [1]}},
    {"kind": "multi"},
    {"kind": "multi", "org": "x"},
    {"kind": "multi", "org": {"key": ""}},
    {"kind": "multi", "multi": {"key": "a"}},
    {"kind": "multi", "key": "a", "org": {"key": "b"}},
    {"key": None},
    {"key": 5},
    {"key": "a", "name": 5},
    {"key": "a", "ip": 5},
    {"key": "a", "secondary": 5},
    {"key": "a", "anonymous": "yes"},
    {"key": "a", "custom": "x"},
    {"key": "a", "privateAttributeNames": "x"},
]
NOT_JSON = [
    b"",
    b"{nope",
    b'{"kind":"user","key":"a"',
    b'{"kind":"user","key":"a"} x',
    b'\xef\xbb\xbf{"kind":"user","key":"a"}',
    b"{'key':'a'}",
    b'{"key":"a","custom":{"n":1e400}}',
    b'{"key":"a\\ud8"}',
    b'{"key":"a","custom":{"n":NaN}}',
]


@pytest.mark.parametrize("value", VALID, ids=json.dumps)
def test_valid_contexts_are_read(value):
    """Each form that the specification allows is a context."""
    assert context_of(value).kinds


@pytest.mark.parametrize("value", INVALID, ids=json.dumps)
def test_invalid_contexts_are_refused(value):
    """JSON that the specification does not allow is refused, with a reason."""
    with pytest.raises(InvalidData, match=r"^context: "):
        context_of(value)


@pytest.mark.parametrize("text", NOT_JSON, ids=repr)
def test_broken_json_is_refused(text):
    """Broken JSON is refused, with a reason."""
    with pytest.raises(InvalidData, match=r"^context: "):
        parse_context(text)


@pytest.mark.parametrize("value", INVALID, ids=json.dumps)
def test_reasons_do_not_quote_the_context(value):
    """A message may be logged; personal data must not."""
    secret = json.dumps(value).replace('"a"', '"secret"').replace('"x"', '"secret"')
    with pytest.raises(InvalidData) as refused:
        parse_context(secret.encode())
    assert "secret" not in str(refused.value)


def test_a_kind_must_not_occur_twice():
    """Two individuals of one kind are refused."""
    parse_context(b'{"kind":"multi","org":{"key":"a","x":{"org":1}},"user":{"key":"org"}}')
    with pytest.raises(InvalidData, match="twice"):
        parse_context(b'{"kind":"multi","org":{"key":"a"},"org":{"key":"b"}}')


def test_kinds_are_bounded():
    """A context with more kinds than any real one is refused."""
    kinds = {f"k{number}": {"key": "a"} for number in range(MAX_KINDS)}
    with pytest.raises(InvalidData, match="kinds"):
        context_of({"kind": "multi", **kinds})


@pytest.mark.parametrize("depth", [100_000, 1_000_000])
@pytest.mark.parametrize(
    "form", [b'{"key":"a","x":%s}', b'{"kind":"multi","org":{"key":"a","x":%s}}']
)
def test_deep_nesting_is_refused(form, depth):
    """However deep a context is nested, the answer is a refusal, not a crash."""
    with pytest.raises(InvalidData, match="too deeply"):
        parse_context(form % (b"[" * depth + b"]" * depth))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (b'"\xff"', "\ufffd"),
        (b'"a\\ud800b"', "a\ufffdb"),
        (b'"\\udc00\\ud83d\\ude00"', "\ufffd\U0001f600"),
        (b'"\\\\ud800 \\ud800"', "\\ud800 \ufffd"),
        (b'"a\\u0000b"', "a\0b"),
    ],
)
def test_invalid_unicode_is_replaced(text, key):
    """As in ld-relay, broken UTF-8 and half surrogate pairs do not make a context invalid."""
    individual = parse_context(b'{"kind":"user","key":%s}' % text).get("user")
    assert individual is not None
    assert individual.key == key


def test_attributes_of_a_single_kind():
    """Everything but `_meta` and nulls is an attribute; `anonymous` always has a value."""
    context = context_of({**USER, "name": None, "n": 9007199254740993, "x": {"y": 1}, "_meta": {}})
    individual = context.get("")
    assert individual is context.get("user")
    assert individual.attributes == {
        "kind": "user",
        "key": "anna",
        "anonymous": False,
        "n": 9007199254740993,
        "x": {"y": 1},
    }


def test_attributes_of_a_legacy_user():
    """Known properties and `custom` are attributes; `custom` cannot replace the identity."""
    user = {
        "key": "anna",
        "email": "a@b",
        "other": 1,
        "secondary": "two",
        "anonymous": True,
        "custom": {"plan": "pro", "key": "x", "kind": "x", "name": "x", "_meta": 1, "gone": None},
    }
    individual = context_of(user).get("user")
    assert individual.attributes == {
        "kind": "user",
        "key": "anna",
        "anonymous": True,
        "email": "a@b",
        "plan": "pro",
    }
    assert individual.secondary == "two"


def test_one_nested_context_is_a_single_kind():
    """A multi-kind context of one kind is that kind's context."""
    assert context_of({"kind": "multi", "org": {"key": "a"}}) == context_of(
        {"kind": "org", "key": "a"}
    )
    assert not context_of({"kind": "multi", "org": {"key": "a"}}).is_multi


def test_only_a_legacy_user_can_have_an_empty_key():
    """Such a context is read, but nothing can be evaluated for it."""
    assert context_of({"key": ""}).has_empty_key
    assert not context_of({"key": "a"}).has_empty_key


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (USER, "anna"),
        ({"kind": "user", "key": "a:b%"}, "a:b%"),
        ({"kind": "org", "key": "a:b%"}, "org:a%3Ab%25"),
        ({"kind": "multi", "user": {"key": "a"}, "org": {"key": "b:"}}, "org:b%3A:user:a"),
        ({"key": ""}, ""),
    ],
)
def test_fully_qualified_keys(value, key):
    """Secure mode signs the key, with kinds where they are not just `user`."""
    assert context_of(value).fully_qualified_key == key


@pytest.mark.parametrize(
    ("text", "literal", "path"),
    [
        ("name", False, ("name",)),
        ("a/b", False, ("a/b",)),
        ("/a/b", False, ("a", "b")),
        ("/a/b", True, ("/a/b",)),
        ("/a~1b/~0", False, ("a/b", "~")),
        ("/~01", False, ("~1",)),
        ("a~2", False, ("a~2",)),
        ("/a~2", False, None),
        ("/a~", False, None),
        ("/", False, None),
        ("//a", False, None),
        ("/a/", False, None),
        ("", False, None),
        ("", True, None),
        ("/", True, ("/",)),
    ],
)
def test_references(text, literal, path):
    """References are split and unescaped, unless no kind is named: then they are names."""
    assert parse_reference(text, literal=literal) == path


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kind",), "user"),
        (("anonymous",), False),
        (("x", "y"), [1]),
        (("x", "y", "0"), None),
        (("x", "null"), None),
        (("key", "0"), None),
        (("missing", "x"), None),
        (("_meta",), None),
    ],
)
def test_lookup_descends_into_objects_only(path, value):
    """Arrays and texts have nothing within; null is nothing."""
    context = context_of({**USER, "x": {"y": [1], "null": None}, "_meta": {}})
    assert lookup(context.get("user"), path) == value


@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: json.dumps({"key": text}).encode())
)
def test_any_bytes_are_read_or_refused(text):
    """Any bytes either make a context or are refused."""
    with suppress(InvalidData):
        assert parse_context(text).kinds
