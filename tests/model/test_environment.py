"""The description of an environment, and the credentials in it."""

import math
from dataclasses import replace

import pytest

from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec

SPEC = EnvironmentSpec("e", SDKKey("sdk-1"), MobileKey("mob-1"), EnvironmentID("id-1"))


def test_its_own_credentials_do_not_expire():
    """Those that are not set are not there."""
    assert SPEC.credentials == dict.fromkeys(
        (SDKKey("sdk-1"), MobileKey("mob-1"), EnvironmentID("id-1")), math.inf
    )
    assert EnvironmentSpec("e", SDKKey("sdk-1")).credentials == {SDKKey("sdk-1"): math.inf}


def test_further_credentials_of_any_kind_can_be_added():
    """Each with an expiry; adding one again changes that."""
    spec = SPEC.with_credential(SDKKey("sdk-2"), 5.0).with_credential(MobileKey("mob-2"))
    assert spec.credentials[SDKKey("sdk-2")] == 5.0
    assert spec.credentials[MobileKey("mob-2")] == math.inf
    spec = spec.with_credential(SDKKey("sdk-2"), 7.0)
    assert spec.credentials[SDKKey("sdk-2")] == 7.0
    assert len(spec.credentials) == 5
    assert SPEC.with_credential(SDKKey("sdk-1"), 9.0).credentials[SDKKey("sdk-1")] == 9.0


def test_credentials_can_be_removed():
    """Its own as well as further ones; an unknown one changes nothing."""
    spec = SPEC.with_credential(SDKKey("sdk-2")).without_credential(SDKKey("sdk-2"))
    assert spec == SPEC
    assert SPEC.without_credential(SDKKey("mob-1")) == SPEC
    bare = SPEC.without_credential(MobileKey("mob-1")).without_credential(EnvironmentID("id-1"))
    assert bare == EnvironmentSpec("e", SDKKey("sdk-1"))


def test_the_sdk_key_can_only_be_replaced():
    """Without it there would be no data. The refusal does not show the key."""
    with pytest.raises(ValueError, match="needs an SDK key") as refusal:
        EnvironmentSpec("e", SDKKey("sdk-secret-abcd")).without_credential(
            SDKKey("sdk-secret-abcd")
        )
    assert "secret" not in str(refusal.value)


def test_the_primary_key_comes_first_and_expired_ones_not_at_all():
    """A primary key counts even if it is listed as expiring."""
    one, two, three = map(SDKKey, ("sdk-1", "sdk-2", "sdk-3"))
    expiries = ((three, 100.0), (two, 50.0), (MobileKey("mob-1"), 100.0), (one, 10.0))
    spec = EnvironmentSpec("e", one, expiries=expiries)
    assert spec.sdk_keys(49) == (one, three, two)
    assert spec.sdk_keys(50) == (one, three)
    assert spec.sdk_keys(100) == (one,)


def test_the_title_is_what_launchdarkly_shows():
    spec = EnvironmentSpec("id", SDKKey("sdk-1"))
    assert spec.title == "id"
    assert replace(spec, project_name="Shop", environment_name="Live").title == "Shop Live"
    assert replace(spec, environment_name="Live").title == "Live"
