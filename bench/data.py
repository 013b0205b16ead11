"""Made-up flag data of known size, in the form in which LaunchDarkly sends them."""

import json
import random
from typing import Any, NamedTuple


class Size(NamedTuple):
    """How many flags, how many bytes of JSON each has, and what fills them up to that."""

    flags: int
    bytes_each: int
    known: bool = True
    """Fill with a variation, otherwise with a property that no SDK knows."""


SIZES = {
    "2k": Size(3, 665),
    "6k": Size(10, 555),
    "100k": Size(175, 555),
    "570k": Size(1000, 555),
    # A relay that parses flags and writes them anew serves only a quarter of this one's bytes.
    "2m": Size(1000, 2075, known=False),
    "2m-known": Size(1000, 2075),
    "seed": Size(1, 555),
}
PATCH_BYTES = 1000
EVENTS = 43
"""Events of one post of the usual size."""
EVENT_KEY = "bench-event-"
"""What the keys of numbered events begin with."""
EVENT_TIME = 1_700_000_000_000


def flag_key(index: int) -> str:
    """The key of a data set's flag number `index`."""
    return f"flag-{index:06}"


def flag(
    key: str, version: int, size: int, *, salt: str = "salt", known: bool = True
) -> dict[str, Any]:
    """A flag of about `size` bytes with every property that LaunchDarkly's SDKs write."""
    clause = {"attribute": "plan", "op": "in", "values": ["pro", "team"], "negate": False}
    body: dict[str, Any] = {
        "key": key,
        "on": True,
        "prerequisites": [],
        "targets": [],
        "contextTargets": [],
        "rules": [{"variation": 0, "id": "rule", "clauses": [clause], "trackEvents": False}],
        "fallthrough": {"variation": 0},
        "offVariation": 1,
        "variations": ["", "off"],
        "clientSideAvailability": {"usingMobileKey": False, "usingEnvironmentId": False},
        "clientSide": False,
        "salt": salt,
        "trackEvents": False,
        "trackEventsFallthrough": False,
        "debugEventsUntilDate": None,
        "version": version,
        "deleted": False,
    }
    missing = max(0, size - len(compact(body)))
    filling = random.Random(key).randbytes(missing // 2 + 1).hex()[:missing]
    if known:
        body["variations"][0] = filling
    else:
        body["description"] = filling
    return body


def flags(name: str, version: int = 1) -> dict[str, Any]:
    """The flags of the data set `name` by key, all at `version`."""
    size = SIZES[name]
    keys = map(flag_key, range(size.flags))
    return {key: flag(key, version, size.bytes_each, known=size.known) for key in keys}


def everything(name: str, version: int = 1) -> dict[str, Any]:
    """The data set `name` as polling SDKs get it."""
    return {"flags": flags(name, version), "segments": {}}


def put(name: str, version: int = 1) -> bytes:
    """The data of a `put` event holding the data set `name`."""
    return compact({"path": "/", "data": everything(name, version)})


def patch(index: int, version: int, marker: str) -> bytes:
    """The data of a `patch` event of flag number `index`; its salt is `marker`."""
    key = flag_key(index)
    body = flag(key, version, PATCH_BYTES, salt=marker)
    return compact({"path": f"/flags/{key}", "data": body})


def events() -> bytes:
    """A post as SDKs make them, of about 7 KB: evaluations in full."""
    return compact([_evaluation(index) for index in range(EVENTS)])


def _evaluation(index: int) -> dict[str, Any]:
    return {
        "kind": "feature",
        "creationDate": EVENT_TIME + index,
        "key": flag_key(index),
        "context": {"kind": "user", "key": f"user-key-{index:012}"},
        "value": True,
        "variation": 0,
        "version": 1,
    }


def numbered_event(number: int, size: int) -> bytes:
    """A post of about `size` bytes with one event, which can be told from all others."""
    event = {
        "kind": "custom",
        "creationDate": EVENT_TIME + number,
        "key": f"{EVENT_KEY}{number:08}",
        "context": {"kind": "user", "key": "anna"},
        "data": "",
    }
    missing = max(0, size - len(compact([event])))
    event["data"] = random.Random(number).randbytes(missing // 2 + 1).hex()[:missing]
    return compact([event])


def compact(value: Any) -> bytes:
    """`value` as JSON without spaces."""
    return json.dumps(value, separators=(",", ":")).encode()
