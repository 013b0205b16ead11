"""Environments as LaunchDarkly describes them, and the credentials that follow."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InvalidData
from relay.model.credential import Credential, EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.protocol.environments import (
    LATEST,
    LONGEST_TTL,
    EnvironmentDescription,
    SharedSettings,
    describe,
    ignored_expiry,
    rotations,
    spec_of,
)
from tests.support.environments import description

NOW = 1000.0
NONE = SharedSettings()


def spec(before: EnvironmentSpec | None = None, **members: object) -> EnvironmentSpec:
    return spec_of(describe(description(**members)), NONE, NOW, before)


def test_the_spec_of_a_new_environment():
    """Names, keys and settings come from LaunchDarkly, the rest from this relay."""
    settings = SharedSettings(
        "ld-$CID-$CID", ("https://o",), ("X-H",), eval_streams=True, table="t-$CID"
    )
    made = spec_of(describe(description(defaultTtl=5, secureMode=True)), settings, NOW)
    assert made == EnvironmentSpec(
        name="id-alpha",
        sdk_key=SDKKey("sdk-alpha-1"),
        mobile_key=MobileKey("mob-alpha-key"),
        environment_id=EnvironmentID("id-alpha"),
        project_key="proj",
        project_name="Project",
        environment_key="alpha",
        environment_name="Alpha",
        secure_mode=True,
        eval_streams=True,
        ttl=300.0,
        allowed_origins=("https://o",),
        allowed_headers=("X-H",),
        prefix="ld-id-alpha-id-alpha",
        table="t-id-alpha",
    )
    assert made.title == "Project Alpha"
    assert replace(made, payload_filter="north").title == "Project Alpha (north)"


def test_names_match_in_any_letter_case():
    """LaunchDarkly writes `envId` or `envID`; unknown members are passed over."""
    odd = {"ENVID": "e", "SdkKey": {"Value": "s", "EXPIRING": {"vALUE": "o", "Timestamp": 2000}}}
    assert describe({**odd, "DefaultTtl": 1, "other": []}) == EnvironmentDescription(
        "e", 0, sdk_key="s", expiring=("o", 2.0), ttl=60.0
    )


def test_null_is_as_good_as_nothing():
    """Missing and null members have the zero value of their type."""
    members = ("version", "sdkKey", "mobKey", "secureMode", "defaultTtl", "sdkKeys", "envName")
    assert describe({"envID": "e", **dict.fromkeys(members)}) == EnvironmentDescription("e", 0)


@pytest.mark.parametrize("number", [-1, -(10**30), 10**18, 10**30])
def test_numbers_beyond_sense_are_bounded(number):
    """No clock and no timer fails on them."""
    given = {"value": "s", "expiring": {"value": "o", "timestamp": number}}
    try:
        made = describe(description(sdkKey=given, defaultTtl=number))
    except InvalidData:
        return  # beyond 64 bits
    assert made.expiring is not None
    assert 0 <= made.expiring[1] <= LATEST
    assert 0 <= made.ttl <= 60 * LONGEST_TTL


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": "5"},
        {"version": 5.5},
        {"version": True},
        {"defaultTtl": 1.5},
        {"secureMode": 1},
        {"secureMode": "yes"},
        {"sdkKey": "sdk-secret"},
        {"sdkKey": {"value": 7}},
        {"sdkKey": {"value": "sdk-secret", "expiring": "sdk-secret"}},
        {"mobKey": ["mob-secret"]},
        {"envID": 3},
        {"sdkKeys": {"value": "sdk-secret"}},
        {"sdkKeys": ["sdk-secret"]},
        {"mobileKeys": [{"value": "mob-secret", "expiry": "soon"}]},
    ],
)
def test_a_wrong_type_makes_it_malformed(wrong):
    """The error names the member, and no key."""
    with pytest.raises(InvalidData) as caught:
        describe(description(**wrong))
    assert "secret" not in str(caught.value)


def test_a_new_environment_needs_an_sdk_key():
    """Later, an empty key leaves the one that it has."""
    with pytest.raises(InvalidData, match="no SDK key"):
        spec(sdkKey={"value": ""})
    before = spec()
    for empty in ({"value": ""}, None):
        after = spec(before, sdkKey=empty, mobKey="")
        assert after.credentials == before.credentials


def rotated(*steps: dict) -> dict[str, float]:
    """The SDK keys, by number, after some messages."""
    made = None
    for step in steps:
        made = spec(made, **step)
    assert made is not None
    keys = (each for each in made.credentials.items() if isinstance(each[0], SDKKey))
    return {key.value.removeprefix("sdk-alpha-"): expires_at for key, expires_at in keys}


def sdk_key(number: int, expiring: int | None = None, expires_at: float = math.inf) -> dict:
    """An SDK key, and an expiring one."""
    key: dict = {"value": f"sdk-alpha-{number}"}
    if expiring is not None:
        key["expiring"] = {"value": f"sdk-alpha-{expiring}", "timestamp": int(expires_at * 1000)}
    return {"sdkKey": key}


@pytest.mark.parametrize(
    ("steps", "keys"),
    [
        ([sdk_key(1), sdk_key(2, 1, 1005)], {"2": math.inf, "1": 1005}),
        ([sdk_key(1), sdk_key(2)], {"2": math.inf}),
        ([sdk_key(1), sdk_key(2, 1, 999)], {"2": math.inf}),
        ([sdk_key(2, 1, 1005)], {"2": math.inf, "1": 1005}),
        ([sdk_key(1), sdk_key(3, 2, 1005)], {"3": math.inf, "2": 1005}),
        ([sdk_key(1), sdk_key(2, 1, 1005), sdk_key(2, 1, 1060)], {"2": math.inf, "1": 1005}),
        ([sdk_key(1), sdk_key(2, 1, 1005), sdk_key(3, 1, 1005)], {"3": math.inf, "1": 1005}),
        ([sdk_key(1), sdk_key(2, 1, 1005), sdk_key(1)], {"1": math.inf}),
        ([sdk_key(1), sdk_key(2, 1, 1005), sdk_key(1, 2, 1005)], {"1": math.inf, "2": 1005}),
        ([sdk_key(1), sdk_key(1, 1, 1005)], {"1": math.inf}),
        ([sdk_key(1), sdk_key(2, 1, 1005), sdk_key(2)], {"2": math.inf, "1": 1005}),
    ],
)
def test_sdk_keys_rotate(steps, keys):
    """As the table of offline-and-autoconfig 7.2 says, without the reference's defects.

    A previous key never outlives a message that does not name it, and a key that becomes primary
    again expires no more.
    """
    assert rotated(*steps) == keys


def test_all_keys_may_be_listed():
    """A list says everything about the keys of its kind; the primary one goes upstream."""
    keys = [{"key": "a", "value": "sdk-alpha-1"}, {"value": "sdk-alpha-9"}, {"value": ""}]
    old = {"value": "sdk-alpha-8", "expiry": 1_005_000}
    assert rotated({"sdkKeys": [*keys, old]}) == {"1": math.inf, "9": math.inf, "8": 1005}
    assert rotated({"sdkKeys": [*keys, old]}, {"sdkKeys": keys}) == {"1": math.inf, "9": math.inf}
    several = spec(mobileKeys=[{"value": "mob-alpha-key"}, {"value": "mob-2", "expiry": 1_005_000}])
    assert several.mobile_key == MobileKey("mob-alpha-key")
    assert several.credentials[MobileKey("mob-2")] == 1005


def test_each_change_of_a_key_has_its_line():
    """Keys are masked; an environment's ID never changes."""
    before = spec(**sdk_key(1))
    after = spec(before, **sdk_key(2, 1, 1005), mobKey="mob-alpha-new")
    lines = [text % tuple(arguments) for text, *arguments in rotations(before, after, NOW)]
    assert lines == [
        "New primary SDK key is ...ha-2",
        "Mobile key ...-key was rotated, new primary mobile key is ...-new",
        "SDK key ...ha-1 was marked for deprecation with an expiry at 1005.0",
    ]
    last = spec(after, **sdk_key(3), mobKey="mob-alpha-new")
    lines = [text % tuple(arguments) for text, *arguments in rotations(after, last, NOW)]
    assert lines == [
        "New primary SDK key is ...ha-3",
        "SDK key ...ha-2 has been immediately revoked",
    ]
    assert not rotations(last, last, NOW)
    strange = spec(spec(), **sdk_key(1, 9, 1005))
    lines = [text % tuple(arguments) for text, *arguments in rotations(spec(), strange, NOW)]
    assert lines[0] == "SDK key ...ha-9 was not previously managed by Relay; it is accepted, too"


@pytest.mark.parametrize(
    ("before", "now", "part"),
    [
        ([sdk_key(1)], sdk_key(2, 1, 999), "already expired at 999"),
        ([], sdk_key(2, 1, 999), "already expired at 999"),
        ([sdk_key(1), sdk_key(2, 1, 1005)], sdk_key(2, 1, 1060), "previous expiry will be used"),
        ([sdk_key(1), sdk_key(2, 1, 1005)], sdk_key(2, 1, 1005), None),
        ([sdk_key(1)], sdk_key(2, 1, 1005), None),
        ([sdk_key(1)], sdk_key(2), None),
        ([], sdk_key(2, 1, 1005), None),
    ],
)
def test_an_expiry_without_effect_is_told(before, now, part):
    """Operators see why a key lives longer or shorter than they said."""
    made = None
    for step in before:
        made = spec(made, **step)
    line = ignored_expiry(describe(description(**now)), made, NOW)
    assert (line is None) if part is None else (part in line[0] % line[1:])


NUMBERS = st.integers(1, 4)
MESSAGES = st.lists(
    st.tuples(NUMBERS, st.none() | st.tuples(NUMBERS, st.integers(990, 1020))), max_size=8
)


@given(MESSAGES)
def test_rotations_follow_the_plain_rules(messages):
    """A model with one dict of expiring keys gives the same credentials, whatever the messages."""
    made, deprecated = None, {}
    for primary, old in messages:
        made = spec(made, **sdk_key(primary, *(old or ())))
        if old is not None:
            deprecated.setdefault(*old)
        deprecated = {k: t for k, t in deprecated.items() if t > NOW and k != primary}
        expected: dict[Credential, float] = {SDKKey(f"sdk-alpha-{primary}"): math.inf}
        expected |= {SDKKey(f"sdk-alpha-{k}"): float(t) for k, t in deprecated.items()}
        keys = {k: t for k, t in made.credentials.items() if isinstance(k, SDKKey)}
        assert keys == expected
        assert made.sdk_key == SDKKey(f"sdk-alpha-{primary}")
