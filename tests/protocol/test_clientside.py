"""Messages of client-side streams, parsed as by SDKs."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from relay.evaluation.data import parse_flag
from relay.evaluation.results import EvaluationDetail, Reason, ReasonKind, render
from relay.protocol.clientside import PING, changes, put


def messages(text: bytes) -> list[tuple[str, dict]]:
    """Return name and data of each message."""
    parsed = []
    for message in text.decode().split("\n\n")[:-1]:
        name, data = message.split("\n")
        parsed.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return parsed


def entry(version: int, value: str = "true", **reason) -> bytes:
    """Return an evalx entry as rendered by the evaluation."""
    flag = json.dumps({"key": "k", "version": version, "variations": ["_"]})
    flag = parse_flag(flag.replace('"_"', value).encode())
    evaluation = EvaluationDetail(0, Reason(ReasonKind.RULE_MATCH, **reason), ("a", "version"))
    return render(flag, evaluation, with_reasons=True)


def test_a_ping_has_data():
    """The bytes equal ld-relay's; SDKs would ignore a message without data."""
    assert PING == b"event: ping\ndata:  \n\n"


def test_a_put_is_the_body_of_an_answer():
    """Polls and puts have the same content."""
    assert put(b'{"a":{"value":1}}') == b'event: put\ndata: {"a":{"value":1}}\n\n'


def test_a_patch_has_the_version_of_the_data_and_that_of_the_flag():
    """SDKs order by the first and report the second; everything else equals a poll."""
    ((name, data),) = messages(changes({"k": entry(3)}, {"k": entry(4)}, 1_700_000_001))
    assert name == "patch"
    assert (data.pop("key"), data.pop("version"), data.pop("flagVersion")) == (
        "k",
        1_700_000_001,
        4,
    )
    polled = json.loads(entry(4))
    polled.pop("version")
    assert data == polled


def test_equal_entries_are_not_sent():
    """Changed flags with an unchanged result for this context are not sent."""
    assert changes({"k": entry(3)}, {"k": entry(3)}, 9) == b""
    assert changes({}, {}, 9) == b""


def test_flags_that_are_no_longer_visible_are_deleted():
    """This applies to deleted flags and to flags hidden from this kind of SDK."""
    assert messages(changes({"k": entry(3), "l": entry(1)}, {"l": entry(1)}, 9)) == [
        ("delete", {"key": "k", "version": 9})
    ]


values = st.recursive(
    st.none()
    | st.integers(-(2**70), 2**70)
    | st.text()
    | st.sampled_from(["version", ',"version":7']),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["a", "version"]), inner),
)


@given(key=st.text(min_size=1), value=values, rule=st.text(), version=st.integers(0, 2**40))
def test_no_value_is_mistaken_for_a_version(key, value, rule, version):
    """Values and reasons that look like a version are preserved."""
    text = entry(version, json.dumps(value, separators=(",", ":")), rule_id=rule)
    ((_, data),) = messages(changes({}, {key: text}, version + 1))
    assert (data["key"], data["value"]) == (key, value)
    assert (data["version"], data["flagVersion"]) == (version + 1, version)
    assert data["reason"].get("ruleId", "") == rule
    assert data["prerequisites"] == ["a", "version"]
