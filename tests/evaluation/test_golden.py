"""The interpreter against the recorded results of ld-relay."""

import base64
import json
from pathlib import Path

import pytest

from relay.evaluation.data import Data
from relay.evaluation.evaluator import evaluate
from relay.evaluation.results import render
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import parse_context
from relay.model.item import Kind
from relay.model.payload import EMPTY
from relay.protocol.fdv1 import parse_all

GOLDEN = Path(__file__).parent.parent / "golden"
AUDIENCES = {"js": SDKKind.BROWSER, "mobile": SDKKind.MOBILE, "server": SDKKind.SERVER}
RECORDED = map(json.loads, (GOLDEN / "client-side.jsonl").read_text("utf-8").strip().split("\n"))
ROWS = [
    row
    for row in RECORDED
    if row["setup"] == "ready" and row["name"].startswith("evalx ")
    # How queries are read is no matter of evaluation; and see difference 2.
    if "query" not in row["name"] and "documented plural" not in row["name"]
]
PAYLOAD, _ = EMPTY.apply(parse_all((GOLDEN / "environment.json").read_bytes()))
DATA = Data.of(PAYLOAD)


def results(sdk_kind: SDKKind, context: bytes, *, with_reasons: bool) -> dict[str, dict]:
    """Evaluate the recorded environment with the interpreter."""
    asking = parse_context(context)
    flags = [flag for item in PAYLOAD.live(Kind.FLAG) if (flag := DATA.flag(item.key))]
    return {
        flag.key: json.loads(render(flag, evaluate(flag, asking, DATA), with_reasons=with_reasons))
        for flag in flags
        if sdk_kind.sees(flag)
    }


def sdk_kind_of(row: dict) -> SDKKind:
    """Return the kind of SDK, which is the second word of a recording's name."""
    return AUDIENCES[row["name"].split()[1].rstrip(":")]


def without_number(results: dict[str, dict]) -> dict[str, dict]:
    """The value of one flag is a number that ld-relay may corrupt (difference 3)."""
    return {
        key: {**entry, "value": None} if key == "numbers" else entry
        for key, entry in results.items()
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_results_equal_those_of_ld_relay(row):
    """Every recorded context gets the recorded value, variation, reason and tracking."""
    request = row["request"]
    path, _, query = request["path"].partition("?")
    text = path.rsplit("/", 1)[1]
    context = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if request["method"] == "REPORT":
        context = request["body"].encode()
    if row["response"]["status"] == 400:  # a legacy user without a key
        assert parse_context(context).has_empty_key
        return
    with_reasons = query == "withReasons=true"
    actual = without_number(results(sdk_kind_of(row), context, with_reasons=with_reasons))
    recorded = without_number(json.loads(row["response"]["body"]))
    assert actual == recorded
    for key, entry in recorded.items():
        assert list(actual[key]) == list(entry)
        assert list(actual[key].get("reason", {})) == list(entry.get("reason", {}))


def test_there_are_recordings_for_every_kind_of_sdk():
    """The rows above are many; a renamed file or setup would leave none."""
    assert len(ROWS) > 250
    assert set(map(sdk_kind_of, ROWS)) == set(SDKKind)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("num-0", b"9007199254740993"),
        ("num-1", b"1e21"),
        ("num-2", b"1.0"),
        ("num-4", b"-0"),
        ("num-7", b"123456789012345678901234567890"),
        ("num-9", b"-1.50"),
    ],
)
def test_numbers_come_out_in_the_words_of_upstream(key, text):
    """No number changes on its way, however large, small or strangely written (difference 3)."""
    flag = DATA.flag("numbers")
    context = parse_context(json.dumps({"kind": "user", "key": key}).encode())
    entry = render(flag, evaluate(flag, context, DATA), with_reasons=False)
    assert entry.startswith(b'{"value":' + text + b",")
