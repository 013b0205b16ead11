"""The messages of client-side streams, as SDKs read them."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from relay.evaluation.data import parse_flag
from relay.evaluation.results import EvaluationDetail, Reason, ReasonKind, render
from relay.protocol.clientside import PING, changes, put


def messages(text: bytes) -> list[tuple[str, dict]]:
    """Name and data of each message."""
    found = []
    for message in text.decode().split("\n\n")[:-1]:
        name, data = message.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def entry(version: int, value: str = "true", **reason) -> bytes:
    """An entry of an evalx answer, as our own evaluation renders it."""
    flag = json.dumps({"key": "k", "version": version, "variations": ["_"]})
    flag = parse_flag(flag.replace('"_"', value).encode())
    evaluation = EvaluationDetail(0, Reason(ReasonKind.RULE_MATCH, **reason), ("a", "version"))
    return render(flag, evaluation, with_reasons=True)


def test_a_ping_has_data():
    """The bytes are the reference's; without the data SDKs would not notice the message."""
    assert PING == b"event: ping\ndata:  \n\n"


def test_a_put_is_the_body_of_an_answer():
    """What is polled and what opens a stream is the same."""
    assert put(b'{"a":{"value":1}}') == b'event: put\ndata: {"a":{"value":1}}\n\n'


def test_a_patch_has_the_version_of_the_data_and_that_of_the_flag():
    """SDKs order by the former and report the latter; everything else is as polled."""
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


def test_what_is_equal_is_not_sent():
    """Flags that a change touched without another result for this context cost nothing."""
    assert changes({"k": entry(3)}, {"k": entry(3)}, 9) == b""
    assert changes({}, {}, 9) == b""


def test_what_is_no_longer_visible_is_deleted():
    """A deleted flag, and one that this kind of SDK may no longer see."""
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
def test_no_value_is_taken_for_a_version(key, value, rule, version):
    """Whatever a flag's value and the names in its reason say, they arrive as they are."""
    text = entry(version, json.dumps(value, separators=(",", ":")), rule_id=rule)
    ((_, data),) = messages(changes({}, {key: text}, version + 1))
    assert (data["key"], data["value"]) == (key, value)
    assert (data["version"], data["flagVersion"]) == (version + 1, version)
    assert data["reason"].get("ruleId", "") == rule
    assert data["prerequisites"] == ["a", "version"]
