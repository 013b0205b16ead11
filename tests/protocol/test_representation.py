"""Environments as LaunchDarkly describes them, and the keys that follow from a description."""

from __future__ import annotations

import math

import pytest

from relay.errors import InvalidData
from relay.model.credential import MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.protocol.representation import (
    ExpiringKey,
    Representation,
    SDKKeys,
    described,
    parse,
    rotated,
)

NOW = 1000.0
LATER, LATEST = 2000.0, 3000.0
ONE, TWO, THREE = SDKKey("sdk-one1"), SDKKey("sdk-two2"), SDKKey("sdk-three3")


def given(key: str = "", expiring: str = "", at: float = 0, mobile: str = "") -> Representation:
    keys = SDKKeys(key, ExpiringKey(expiring, int(at * 1000)))
    return Representation(environment_id="id", sdk_key=keys, mobile_key=mobile)


def test_names_match_in_any_letter_case():
    """Null stands for the default, and unknown members are ignored."""
    found = parse(
        {
            "ENVID": "id",
            "SdkKey": {"Value": "sdk-1", "Expiring": {"VALUE": "sdk-0", "timestamp": 5000}},
            "DefaultTTL": 5,
            "version": None,
            "secureMODE": True,
            "news": [1],
        },
        "x",
    )
    assert found.sdk_key.expiring.expires_at == 5
    spec = described(EnvironmentSpec("id", SDKKey(found.sdk_key.value)), found)
    assert (spec.ttl, spec.secure_mode, found.version) == (300, True, 0)


@pytest.mark.parametrize(
    "members",
    [
        {"version": "1"},
        {"version": 1.5},
        {"defaultTtl": "1"},
        {"sdkKey": "sdk-1"},
        {"sdkKey": {"value": 1}},
        {"secureMode": 1},
        {"envID": ""},
        {"envID": None},
    ],
)
def test_a_wrong_type_spoils_the_environment(members):
    with pytest.raises(InvalidData):
        parse({"envID": "id", **members}, "x")
    with pytest.raises(InvalidData):
        parse([members], "x")


SPEC = EnvironmentSpec("id", ONE, MobileKey("mob-1111"), expiries=((THREE, LATER),))


@pytest.mark.parametrize(
    ("spec", "update", "keys"),
    [
        # (environment so far, update, keys afterwards with their expiries: the primary one first)
        (SPEC, given("sdk-one1"), {ONE: math.inf, THREE: LATER}),
        (SPEC, given(), {ONE: math.inf, THREE: LATER}),
        (SPEC, given("sdk-two2"), {TWO: math.inf, THREE: LATER}),
        (SPEC, given("sdk-two2", "sdk-one1", LATEST), {TWO: math.inf, THREE: LATER, ONE: LATEST}),
        # Expired already: the previous key is revoked.
        (SPEC, given("sdk-two2", "sdk-one1", NOW), {TWO: math.inf, THREE: LATER}),
        # Named before: the first expiry counts, and the previous key is revoked.
        (SPEC, given("sdk-two2", "sdk-three3", LATEST), {TWO: math.inf, THREE: LATER}),
        # Another than the previous one.
        (
            EnvironmentSpec("id", ONE),
            given("sdk-two2", "sdk-three3", LATER),
            {TWO: math.inf, THREE: LATER},
        ),
        # Primary again: it does not expire any more.
        (SPEC, given("sdk-three3", "sdk-one1", LATER), {THREE: math.inf, ONE: LATER}),
        (SPEC, given("sdk-one1", "sdk-one1", LATER), {ONE: math.inf, THREE: LATER}),
        # What has expired is forgotten.
        (EnvironmentSpec("id", ONE, expiries=((THREE, NOW),)), given("sdk-one1"), {ONE: math.inf}),
    ],
)
def test_keys_after_an_update(spec, update, keys):
    after, _ = rotated(spec, update, NOW)
    assert {k: at for k, at in after.credentials.items() if isinstance(k, SDKKey)} == keys
    assert after.sdk_key == next(iter(keys))
    assert after.mobile_key == spec.mobile_key


def test_the_log_names_keys_by_their_ends():
    _, lines = rotated(SPEC, given("sdk-two2", "sdk-one1", LATER, "mob-2222"), NOW)
    marked = "SDK key ...one1 was marked for deprecation with an expiry at"
    assert lines == [
        "New primary SDK key is ...two2",
        f"{marked} Thu, 01 Jan 1970 00:33:20 GMT",
        "Mobile key ...1111 was rotated, new primary mobile key is ...2222",
    ]
    _, lines = rotated(SPEC, given("sdk-two2"), NOW)
    assert lines[-1] == "SDK key ...one1 has been immediately revoked"
    _, (line,) = rotated(SPEC, given("sdk-one1", "sdk-four4", 1), NOW)
    assert line.startswith("Deprecated SDK key ...our4 already expired at Thu, 01 Jan 1970")
    _, (line,) = rotated(SPEC, given("sdk-one1", "sdk-three3", LATEST), NOW)
    assert line.endswith("The previous expiry will be used.")


def test_a_time_that_no_calendar_has_is_shown_as_a_number():
    after, lines = rotated(SPEC, given("sdk-two2", "sdk-one1", 1e15), NOW)
    assert after.credentials[ONE] == 1e15
    assert lines[-1].endswith("1000000000000000")
