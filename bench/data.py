"""Made-up flag data of known size, in the form in which LaunchDarkly sends them."""

import base64
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from bench import targeting
from bench.targeting import clause


class Size(NamedTuple):
    """Number of flags, bytes of JSON of each, and the property that fills them up to that."""

    flags: int
    bytes_each: int
    known: bool = True
    """Fill with a variation, otherwise with a property that no SDK knows."""
    mixed: Mapping[str, int] | None = None
    """Number of flags of each kind in `MAKERS`, in data sets for client-side SDKs."""


SIZES = {
    "2k": Size(3, 665),
    "6k": Size(10, 555),
    "28k": Size(50, 555),
    "100k": Size(175, 555),
    "570k": Size(1000, 555),
    "5m": Size(10_000, 555),
    # A relay that parses flags and writes them anew serves only a quarter of this one's bytes.
    "2m": Size(1000, 2075, known=False),
    "2m-known": Size(1000, 2075),
    "20m": Size(10_000, 2075, known=False),
    "seed": Size(1, 555),
    "eval-1000": Size(1000, 740, mixed={"constant": 737, "ruled": 163, "rollout": 100}),
    "eval-3": Size(3, 740, mixed={"constant": 1, "ruled": 1, "rollout": 1}),
    "eval-big": Size(1000, 740, mixed={"constant": 687, "ruled": 163, "big": 50, "rollout": 100}),
    "eval-listed": Size(
        1000, 740, mixed={"constant": 687, "ruled": 163, "listed": 50, "rollout": 100}
    ),
    "million": Size(3, 665),
    "eval-rules": Size(
        1000, 740, mixed={"constant": 600, "rule-heavy": 250, "segment": 50, "rollout": 100}
    ),
}
PATCH_BYTES = 1000
SEGMENTS, MEMBERS = 10, 100
"""Segments that flags ask for by membership alone, and the members of each."""
MILLION_PATCHES, MILLION_PATCH = 1000, 1000
"""Patches that bring a million members, and the members of each."""
EVENTS = 43
"""Events of one post of the usual size."""
EVENT_KEY = "bench-event-"
"""Beginning of the keys of numbered events."""
EVENT_TIME = 1_700_000_000_000
FOR_CLIENTS = {
    "clientSideAvailability": {"usingMobileKey": True, "usingEnvironmentId": True},
    "clientSide": True,
}
"""Properties that let client-side SDKs see a flag."""


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
    if size.mixed:
        return mixed_flags(size.mixed, version)
    keys = map(flag_key, range(size.flags))
    return {key: flag(key, version, size.bytes_each, known=size.known) for key in keys}


def mixed_flags(counts: Mapping[str, int], version: int) -> dict[str, Any]:
    """Flags for client-side SDKs, as many of each kind as `counts` says, in no order."""
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    random.Random(1).shuffle(kinds)
    made = (MAKERS[kind](index, version) for index, kind in enumerate(kinds))
    return {each["key"]: each for each in made}


def constant_flag(index: int, version: int) -> dict[str, Any]:
    """A flag that has the same value for everybody; every fifth is off."""
    body = flag(flag_key(index), version, 0)
    values = [_value(body["key"], version, letter) for letter in "ab"]
    return body | FOR_CLIENTS | {"variations": values, "rules": [], "on": index % 5 != 0}


def ruled_flag(index: int, version: int) -> dict[str, Any]:
    """A flag with targets or rules, of one of four kinds."""
    kind = index % 4
    clauses = [
        [clause("plan", "in", ["pro", "team"]), clause("country", "in", ["de", "fr"])],
        [clause("email", "endsWith", ["@example.com", "@example.org"])],
        [clause("age", "greaterThanOrEqual", [20 + index % 50])],
        [clause("country", "startsWith", ["d", "n"]), clause("plan", "in", ["free"])],
    ]
    rules = [
        {"variation": number, "id": f"rule-{number}", "clauses": clauses[(kind + number) % 4]}
        for number in range(2)
    ]
    targets = [f"user-{number:09}" for number in range(index, index + 50)]
    more = {"targets": [{"variation": 1, "values": targets}]} if kind == 0 else {}
    return constant_flag(index, version) | {"on": True, "rules": rules} | more


def rollout_flag(index: int, version: int, text: str = "") -> dict[str, Any]:
    """A flag whose value depends on the context's key; all its values begin with `text`."""
    body = constant_flag(index, version)
    weights = [{"variation": number, "weight": 50_000} for number in range(2)]
    values = [text + value for value in body["variations"]]
    salt = f"salt-{index}"
    rollout = {"fallthrough": {"rollout": {"variations": weights}}}
    return body | rollout | {"on": True, "salt": salt, "variations": values}


def rule_heavy_flag(index: int, version: int) -> dict[str, Any]:
    """A flag with rules that hardly another one has."""
    return constant_flag(index, version) | {"on": True, "rules": targeting.rules(index)}


def segment_flag(index: int, version: int) -> dict[str, Any]:
    """A flag that asks for a segment."""
    return constant_flag(index, version) | {"on": True, "rules": targeting.segment_rules(index)}


def segment_member_flag(index: int, version: int, segments: str) -> dict[str, Any]:
    """A flag for the members of one of a few segments."""
    named = clause("", "segmentMatch", [f"{segments}-{index % SEGMENTS}"])
    rules = [{"variation": 1, "id": "rule-0", "clauses": [named]}]
    return constant_flag(index, version) | {"on": True, "rules": rules}


MEMBER_SEGMENTS = {
    "eval-big": ("big", SEGMENTS),
    "eval-listed": ("listed", SEGMENTS),
    "million": ("big", 1),
}
"""The kind of segments of a data set, and their number."""


def member_segments(name: str, version: int) -> dict[str, Any]:
    """The segments of a data set that are big, or list the same members themselves."""
    kinds = {
        "eval-big": ("big", SEGMENTS),
        "eval-listed": ("listed", SEGMENTS),
        "million": ("big", 1),
    }
    kind, count = kinds.get(name, ("", 0))
    usual = {"excluded": [], "salt": "salt", "rules": [], "deleted": False, "version": version}
    return {
        key: {"key": key, **usual, **_members(kind, number)}
        for number, key in ((number, f"{kind}-{number}") for number in range(count))
    }


def _members(kind: str, number: int) -> dict[str, Any]:
    if kind == "big":
        return {"included": [], "unbounded": True, "generation": 1}
    return {"included": member_keys(number)}


def member_keys(number: int) -> list[str]:
    """The keys of the members of a segment of which there are `SEGMENTS`: few of those who ask."""
    return [f"user-{key:09}" for key in range(number, MEMBERS * SEGMENTS, SEGMENTS)]


def member_patches(name: str) -> Iterator[bytes]:
    """The patches that fill the big segments of a data set, each leading to the next version."""
    if name == "eval-big":
        for number in range(SEGMENTS):
            yield _member_patch(f"big-{number}", number, member_keys(number))
    elif name == "million":
        for number in range(MILLION_PATCHES):
            first = number * MILLION_PATCH
            keys = [f"user-{key:09}" for key in range(first, first + MILLION_PATCH)]
            yield _member_patch("big-0", number, keys)


def member_version(number: int) -> str:
    """The version of big segments before the patch of a number."""
    return f"v{number}" if number else ""


def _member_patch(segment: str, number: int, keys: Iterable[str]) -> bytes:
    hashes = [base64.b64encode(hashlib.sha256(key.encode()).digest()).decode() for key in keys]
    none: dict[str, list[str]] = {"add": [], "remove": []}
    return compact(
        {
            "environmentId": "bench",
            "segmentId": f"{segment}.g1",
            "version": member_version(number + 1),
            "previousVersion": member_version(number),
            "changes": {"included": {"add": hashes, "remove": []}, "excluded": none},
        }
    )


MAKERS = {
    "constant": constant_flag,
    "ruled": ruled_flag,
    "rollout": rollout_flag,
    "rule-heavy": rule_heavy_flag,
    "segment": segment_flag,
    "big": partial(segment_member_flag, segments="big"),
    "listed": partial(segment_member_flag, segments="listed"),
}


def _value(key: str, version: int, letter: str) -> str:
    """A text of 48 characters."""
    return f"{key}-{version}-{letter}-".ljust(48, letter)


class Contexts(NamedTuple):
    """Contexts that a number tells apart.

    Args:
        parts: of their JSON; a context has one of each, which come in turn, and nine digits between
            them. All but the last are as long as base64 needs it to end with them, so that a
            context's base64 is made of that of its parts.
    """

    parts: tuple[tuple[str, ...], ...]

    def in_base64(self, number: int) -> str:
        """The context with this number, as client-side SDKs put it into a path."""
        return base64url(f"{number:09}".join(each[number % len(each)] for each in self.parts))


CONTEXT_START = ('{"kind":"user","key":"user-',)
USUAL_CONTEXTS = Contexts(
    (
        CONTEXT_START,
        tuple(
            f'","plan":"{plan}","country":"{country}","email":"anna@{domain}","age":{age}}}'
            for plan, age in (("free", 19), ("pro", 42), ("team", 64))
            for country, domain in (("de", "example.com"), ("no", "example.net"))
        ),
    )
)
CONTEXTS = {
    "eval-1000": USUAL_CONTEXTS,
    "eval-3": USUAL_CONTEXTS,
    "eval-big": USUAL_CONTEXTS,
    "eval-listed": USUAL_CONTEXTS,
    "eval-rules": Contexts((CONTEXT_START, targeting.CONTEXT_MIDDLES, targeting.CONTEXT_ENDS)),
}
"""Contexts that ask, by data set."""


def base64url(text: str) -> str:
    """`text` in URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def everything(name: str, version: int = 1) -> dict[str, Any]:
    """The data set `name` as polling SDKs get it."""
    asked_for = "segment" in (SIZES[name].mixed or {})
    return {
        "flags": flags(name, version),
        "segments": targeting.segments(version) if asked_for else member_segments(name, version),
    }


def put(name: str, version: int = 1) -> bytes:
    """The data of a `put` event holding the data set `name`."""
    return compact({"path": "/", "data": everything(name, version)})


def patch(index: int, version: int, marker: str) -> bytes:
    """The data of a `patch` event of flag number `index`; its salt is `marker`."""
    key = flag_key(index)
    body = flag(key, version, PATCH_BYTES, salt=marker)
    return compact({"path": f"/flags/{key}", "data": body})


def environment(
    name: str, sdk_key: str, version: int = 1, expiring: tuple[str, int] | None = None
) -> dict[str, Any]:
    """An environment as LaunchDarkly describes it to relays that it configures.

    Args:
        name: tells it from the others.
        sdk_key: its primary key.
        version: of the description.
        expiring: the key before that, and the Unix time in milliseconds until which it is valid.
    """
    old = {"expiring": dict(zip(("value", "timestamp"), expiring, strict=True))} if expiring else {}
    return {
        "envID": f"id-{name}",
        "envKey": name,
        "envName": name,
        "mobKey": f"mob-{name}",
        "projKey": "bench",
        "projName": "Bench",
        "sdkKey": {"value": sdk_key, **old},
        "defaultTtl": 0,
        "secureMode": False,
        "version": version,
    }


def environments_put(environments: Iterable[Mapping[str, Any]]) -> bytes:
    """The data of a `put` event that lists all environments."""
    listed = {each["envID"]: each for each in environments}
    return compact({"path": "/", "data": {"environments": listed}})


def environment_patch(environment: Mapping[str, Any]) -> bytes:
    """The data of a `patch` event of one environment."""
    return compact({"path": f"/environments/{environment['envID']}", "data": environment})


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
