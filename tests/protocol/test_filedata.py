"""The file-data format: meaning, default values and versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ldclient.impl.model import FeatureFlag, Segment

from relay.errors import InvalidData
from relay.model.item import Kind
from relay.protocol.filedata import numbered, read

DEMO = Path(__file__).parent.parent.parent / "config/flags.yaml"
SPARSE = b"""
flagValues: {greeting: hello}
flags:
  lamp: {"on": true, variations: [1], targets: [{variation: 0}], rules: [{clauses: [{}]}, {}]}
segments:
  crowd: {rules: [{clauses: [{op: in}]}]}
"""


def items(text, before=(), floor=100, name="flags.yaml"):
    known = {(item.kind, item.key): item for item in before}
    return numbered(read(text, name), known, floor, name)


@pytest.mark.parametrize("text", [DEMO.read_bytes(), SPARSE])
def test_a_strict_sdk_accepts_the_items(text):
    """The Python SDK rejects items without certain members."""
    parsed = items(text)
    assert len(parsed) >= 3
    for item in parsed:
        (FeatureFlag if item.kind is Kind.FLAG else Segment)(json.loads(item.json))


def test_a_simple_value_becomes_a_whole_flag():
    """The flag is on, has one variation for all contexts, and is visible to all SDKs."""
    flag = json.loads(items(b'{"flagValues":{"a":{"x":1}}}')[0].json)
    assert flag["on"] is True
    assert flag["variations"] == [{"x": 1}]
    assert flag["fallthrough"] == {"variation": 0}
    assert flag["clientSideAvailability"] == {"usingMobileKey": True, "usingEnvironmentId": True}


def test_versions_grow_only_for_what_changed():
    """Other items keep their versions, so that clients get no update."""
    first = items(b'{"flagValues":{"a":1,"b":1}}')
    assert [item.version for item in first] == [100, 100]
    second = items(b'{"flagValues":{"a":1,"b":2}}', first)
    assert [item.version for item in second] == [100, 101]
    third = items(b'{"flagValues":{"a":3,"b":2}}', second, floor=500)
    assert [item.version for item in third] == [500, 101]


def test_a_version_in_the_file_counts_if_it_is_greater():
    """Even if nothing else has changed."""
    first = items(b'{"flags":{"a":{"version":7}}}')
    assert first[0].version == 100
    assert items(b'{"flags":{"a":{"version":700}}}', first)[0].version == 700


@pytest.mark.parametrize("name", ["f.json", "f.yaml"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_file(name, encoding):
    """Some editors and shells write one."""
    text = '{"flagValues": {"greeting": "grüß Gott"}}'
    (item,) = items(text.encode(encoding), name=name)
    assert json.loads(item.json)["variations"] == ["grüß Gott"]


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (b"flagValues:\n  a: 1\n  b: [1, .inf]\n", "f.yaml", ["f.yaml: line 3, column 10: .inf"]),
        (b"flagValues: {a: -.Inf}", "f.yaml", ["f.yaml: line 1, column 17: -.Inf"]),
        (b"flagValues:\n  a: .nan\n", "f.yaml", ["f.yaml: line 2, column 6: .nan"]),
        (b"flagValues:\n  a: 1.0e+400\n", "f.yaml", ["line 2, column 6: 1.0e+400"]),
        (b'{"flagValues":\n {"a": NaN}}', "f.json", ["f.json: line 2, column 8: "]),
        (b'{"flagValues":\n {"a": 1e400}}', "f.json", ["f.json: line 2, column 8: "]),
        (b"flags:\n  a: \xff\n", "f.yaml", ["f.yaml: line 2, column 6: not UTF-8"]),
        (b'{"flags":\n"\xff"}', "f.json", ["f.json: line 2, column 2: not UTF-8"]),
        (b"flags:\n a: \x00", "f.yaml", ["f.yaml: line 2, column 5: U+0000"]),
        (b"flags:\n\ta: 1", "f.yaml", ["f.yaml: line 2, column 1: "]),
        (b'{"flags": {', "f.json", ["f.json", "line 1"]),
        (b"flags:\n  a: [1\n", "f.yaml", ["f.yaml", "line 3"]),
        (b"", "f.yaml", ["f.yaml", "must be an object"]),
        (b"flagz: {}", "f.yaml", ['"flagz"', "flagValues"]),
        (b"flags: []\n", "f.yaml", []),
        (b"flags: [1]", "f.yaml", ["flags must be an object"]),
        (b"flags: {a: 1}", "f.yaml", ["f.yaml", 'flag "a"', "object"]),
        (b"flags: {a: {on: true}}", "f.yaml", ["f.yaml", 'flag "a"', "quotes"]),
        (b"flags: {a: {variations: 3}}", "f.yaml", ["f.yaml", 'flag "a"', "variations"]),
        (b"flags: {a: {targets: 3, rules: 4}}", "f.yaml", ['flag "a"']),
        (b"segments: {s: {included: x}}", "f.yaml", ['segment "s"', "included"]),
        (b"flags: {a: {}}\nflagValues: {a: 1}", "f.yaml", ['"a" is both']),
        (b"flagValues: {1: 1}", "f.yaml", ["key 1", "quotes"]),
        (b"\xff\xfe\xff", "f.yaml", ["f.yaml"]),
    ],
)
def test_errors_name_their_place(text, name, words):
    """File and key, and the line of a syntax error."""
    if not words:
        assert items(text, name=name) == ()
        return
    with pytest.raises(InvalidData) as caught:
        items(text, name=name)
    assert all(word in str(caught.value) for word in words), str(caught.value)
