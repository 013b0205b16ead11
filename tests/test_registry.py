"""The registry: which environments exist, and which credential opens which, whatever happens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from relay.model.credential import Credential, CredentialKind, EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.registry import Grant, Registry, RegistryChange
from tests.support.credentials import CredentialTable

SDK, MOBILE, ID = CredentialKind.SDK_KEY, CredentialKind.MOBILE_KEY, CredentialKind.ENVIRONMENT_ID
SPEC = EnvironmentSpec("a", SDKKey("sdk-a"), MobileKey("mob-a"), EnvironmentID("id-a"))
OTHER = EnvironmentSpec("b", SDKKey("sdk-b"))


class Clock:
    """Unix time that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(name="clock")
def make_clock() -> Clock:
    return Clock()


@pytest.fixture(name="registry")
def make_registry(clock: Clock) -> Registry[str]:
    """A registry with one environment, `A`."""
    registry: Registry[str] = Registry(clock)
    registry.put("A", SPEC)
    return registry


def credentials(grants: tuple[Grant[str], ...]) -> set[Credential]:
    return {grant.credential for grant in grants}


def test_each_kind_of_credential_opens_the_environment(registry: Registry[str]) -> None:
    """A key is never accepted as one of another kind."""
    assert registry.find(SDK, "sdk-a") == "A"
    assert registry.find(MOBILE, "mob-a") == "A"
    assert registry.find(ID, "id-a") == "A"
    assert registry.find(MOBILE, "sdk-a") is None
    assert registry.find(SDK, "mob-a") is None
    assert registry.find(SDK, "") is None
    assert registry.environments == {"a": "A"}


def test_a_change_returns_its_consequences(registry: Registry[str]) -> None:
    """Started, stopped, opened and closed, each where it happens and nothing else."""
    first = registry.put("B", OTHER)
    assert (first.started, first.stopped, first.closed) == (("B",), (), ())
    assert credentials(first.opened) == {SDKKey("sdk-b")}
    second = registry.put("B", replace(OTHER, sdk_key=SDKKey("sdk-c")))
    assert (second.started, second.stopped) == ((), ())
    assert credentials(second.opened) == {SDKKey("sdk-c")}
    assert credentials(second.closed) == {SDKKey("sdk-b")}
    third = registry.remove("B")
    assert (third.started, third.stopped, third.opened) == ((), ("B",), ())
    assert credentials(third.closed) == {SDKKey("sdk-c")}
    assert third.closed == second.opened


def test_nothing_changes_without_a_change(registry: Registry[str]) -> None:
    """The same spec again, or the removal of what is not there, leaves the generation."""
    before = registry.generation
    assert registry.put("A", replace(SPEC)) == RegistryChange()
    assert registry.remove("B") == RegistryChange()
    assert registry.expire() == RegistryChange()
    assert registry.generation == before


def test_the_generation_grows_with_each_change(registry: Registry[str]) -> None:
    """Also if only a setting changes: responses depend on these."""
    seen = [registry.generation]
    registry.put("A", replace(SPEC, ttl=5.0))
    seen.append(registry.generation)
    registry.put("B", OTHER)
    seen.append(registry.generation)
    registry.remove("B")
    seen.append(registry.generation)
    assert seen == sorted(set(seen))


def test_settings_change_without_closing_anything(registry: Registry[str]) -> None:
    """Grants stay the same objects, so that streams live on."""
    grant = registry.grant(SDK, "sdk-a")
    change = registry.put("A", replace(SPEC, name="new", secure_mode=True))
    assert not change.closed
    assert not change.opened
    assert registry.grant(SDK, "sdk-a") is grant
    assert registry.environments == {"new": "A"}


def test_a_revoked_grant_stays_revoked(registry: Registry[str]) -> None:
    """The credential may be granted anew, with a new grant."""
    grant = registry.grant(MOBILE, "mob-a")
    assert grant is not None
    registry.put("A", SPEC.without_credential(MobileKey("mob-a")))
    assert grant.revoked
    assert registry.find(MOBILE, "mob-a") is None
    registry.put("A", SPEC)
    assert registry.find(MOBILE, "mob-a") == "A"
    assert registry.grant(MOBILE, "mob-a") is not grant
    assert grant.revoked


def test_an_expired_credential_is_not_found_though_the_timer_is_late(
    registry: Registry[str], clock: Clock
) -> None:
    """To the moment; the generation has grown by then, and `expire` revokes the grant."""
    registry.put("A", SPEC.with_credential(SDKKey("sdk-old"), 1010.0))
    before, grant = registry.generation, registry.grant(SDK, "sdk-old")
    assert registry.next_expiry_in == 10.0
    clock.now = 1009.9
    assert registry.find(SDK, "sdk-old") == "A"
    assert registry.expire() == RegistryChange()
    assert registry.generation == before
    clock.now = 1010.0
    assert registry.generation == before + 1
    assert registry.generation == before + 1
    assert registry.find(SDK, "sdk-old") is None
    assert registry.find(SDK, "sdk-a") == "A"
    assert registry.next_expiry_in == 0.0
    assert registry.expire().closed == (grant,)
    assert grant is not None
    assert grant.revoked
    assert registry.next_expiry_in is None
    assert registry.expire() == RegistryChange()


def test_expiries_come_one_after_the_other(registry: Registry[str], clock: Clock) -> None:
    """The generation counts each one, in whatever order they were put."""
    spec = SPEC
    for at in (1030.0, 1010.0, 1020.0):
        spec = spec.with_credential(SDKKey(f"sdk-{at:.0f}"), at)
    registry.put("A", spec)
    for at in (1010.0, 1020.0, 1030.0):
        before = registry.generation
        clock.now = at
        assert registry.generation == before + 1
        assert registry.find(SDK, f"sdk-{at:.0f}") is None
    assert len(registry.expire().closed) == 3


def test_an_expiry_can_be_moved_and_lifted(registry: Registry[str], clock: Clock) -> None:
    """The grant stays the same: streams are not cut."""
    old = SDKKey("sdk-old")
    registry.put("A", SPEC.with_credential(old, 1010.0))
    grant = registry.grant(SDK, "sdk-old")
    registry.put("A", SPEC.with_credential(old, 1050.0))
    clock.now = 1020.0
    assert registry.grant(SDK, "sdk-old") is grant
    registry.put("A", SPEC.with_credential(old))
    clock.now = 1100.0
    assert registry.grant(SDK, "sdk-old") is grant
    assert registry.next_expiry_in is None


def test_what_has_expired_before_it_comes_opens_nothing(
    registry: Registry[str], clock: Clock
) -> None:
    """Also if it is put again and again."""
    spec = SPEC.with_credential(SDKKey("sdk-old"), clock.now)
    assert not registry.put("A", spec).opened
    assert not registry.put("A", replace(spec, ttl=1.0)).opened
    assert registry.find(SDK, "sdk-old") is None


def test_a_credential_moves_to_the_environment_that_names_it_last(
    registry: Registry[str],
) -> None:
    """Everything that was opened with it before is closed; its return needs another change."""
    grant = registry.grant(SDK, "sdk-a")
    change = registry.put("B", OTHER.with_credential(SDKKey("sdk-a")))
    assert change.closed == (grant,)
    assert registry.find(SDK, "sdk-a") == "B"
    assert not registry.remove("A").closed or registry.find(SDK, "sdk-a") == "B"
    assert registry.find(MOBILE, "mob-a") is None


def test_the_former_owner_of_a_credential_does_not_take_it_along(registry: Registry[str]) -> None:
    """An environment that no longer names what another one has taken closes nothing there."""
    registry.put("B", OTHER.with_credential(MobileKey("mob-a")))
    assert not registry.put("A", SPEC.without_credential(MobileKey("mob-a"))).closed
    assert registry.find(MOBILE, "mob-a") == "B"


def test_two_environments_cannot_have_one_name(registry: Registry[str]) -> None:
    """The refused change has changed nothing."""
    before = registry.generation
    with pytest.raises(ValueError, match='another environment "a"'):
        registry.put("B", replace(OTHER, name="a"))
    assert registry.generation == before
    assert registry.find(SDK, "sdk-b") is None
    assert registry.environments == {"a": "A"}


def test_payload_filters_have_environments_of_their_own(registry: Registry[str]) -> None:
    """With the same credentials; an unknown filter opens nothing."""
    registry.put("A/f", replace(SPEC, name="a/f", payload_filter="f"))
    assert registry.find(SDK, "sdk-a") == "A"
    assert registry.find(SDK, "sdk-a", "f") == "A/f"
    assert registry.find(SDK, "sdk-a", "g") is None
    registry.put("A/f", replace(SPEC, name="a/f", payload_filter="g"))
    assert registry.find(SDK, "sdk-a", "f") is None
    assert registry.find(SDK, "sdk-a", "g") == "A/f"
    registry.remove("A")
    assert registry.find(SDK, "sdk-a") is None
    assert registry.find(SDK, "sdk-a", "g") == "A/f"


def test_a_removed_environment_keeps_its_last_spec_until_it_is_forgotten(
    registry: Registry[str],
) -> None:
    """Its waiting events need a destination."""
    last = replace(SPEC, sdk_key=SDKKey("sdk-last"))
    registry.put("A", last)
    registry.remove("A")
    assert registry.spec_of("a") == last
    assert registry.former_names == ("a",)
    assert registry.names() == ("a",)
    registry.forget("a")
    assert registry.spec_of("a") is None
    assert registry.names() == ()


def test_former_names_follow_the_environment(registry: Registry[str]) -> None:
    """Renamed twice and then rotated, events under each name go with the current key."""
    registry.put("A", replace(SPEC, name="b"))
    registry.put("A", replace(SPEC, name="c"))
    current = replace(SPEC, name="c", sdk_key=SDKKey("sdk-new"))
    registry.put("A", current)
    assert [registry.spec_of(name) for name in "abc"] == [current] * 3
    registry.remove("A")
    assert [registry.spec_of(name) for name in "abc"] == [current] * 3
    assert registry.find(SDK, "sdk-new") is None


def test_a_name_that_is_given_anew_is_no_former_name(registry: Registry[str]) -> None:
    """It means the environment that has it."""
    registry.remove("A")
    again = replace(OTHER, name="a")
    registry.put("B", again)
    assert registry.former_names == ()
    assert registry.spec_of("a") == again


def test_no_repr_shows_a_key(registry: Registry[str]) -> None:
    """Sizes, states and masked keys."""
    grant = registry.grant(SDK, "sdk-a")
    registry.put("A", replace(SPEC, sdk_key=SDKKey("sdk-secret-4711")))
    assert repr(registry) == "<Registry: 1 environments, 3 credentials, generation 2>"
    assert repr(registry.grant(SDK, "sdk-secret-4711")) == "<Grant SDKKey(...4711) until inf>"
    assert repr(grant) == "<Grant SDKKey(...dk-a) revoked>"


KEYS = [SDKKey("k1"), SDKKey("k2"), SDKKey("k3")]
FURTHER: list[Credential] = [*KEYS, MobileKey("k1"), MobileKey("k2"), EnvironmentID("k1")]
ENVIRONMENTS = ["A", "B", "C"]


class Sequences(RuleBasedStateMachine):
    """Any sequence of changes gives what a table of (credential, filter) would give."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.registry: Registry[str] = Registry(self.clock)
        self.table = CredentialTable()
        self.grants: list[Grant[str]] = []
        self.generation = 0

    def _take(self, change: RegistryChange[str]) -> None:
        for grant in change.opened:
            assert grant not in self.grants
            assert not grant.revoked
        self.grants += change.opened
        assert all(grant.revoked for grant in change.closed)
        assert len(set(map(id, change.closed))) == len(change.closed)

    @rule(
        environment=st.sampled_from(ENVIRONMENTS),
        key=st.sampled_from(KEYS),
        name=st.sampled_from("abcd"),
        payload_filter=st.sampled_from(["", "", "f"]),
        further=st.lists(
            st.tuples(st.sampled_from(FURTHER), st.sampled_from([-1.0, 1.0, 2.0, math.inf])),
            max_size=3,
            unique_by=lambda pair: pair[0],
        ),
    )
    def put(self, environment, key, name, payload_filter, further):
        expiries = tuple((each, self.clock.now + lasts) for each, lasts in further)
        spec = EnvironmentSpec(name, key, payload_filter=payload_filter, expiries=expiries)
        if any(s.name == name and e != environment for e, s in self.table.specs.items()):
            with pytest.raises(ValueError, match="another environment"):
                self.registry.put(environment, spec)
            return
        change = self.registry.put(environment, spec)
        assert change.started == (() if environment in self.table.specs else (environment,))
        self._take(change)
        self.table.put(environment, spec, self.clock.now)

    @rule(environment=st.sampled_from(ENVIRONMENTS))
    def remove(self, environment):
        change = self.registry.remove(environment)
        assert change.stopped == ((environment,) if environment in self.table.specs else ())
        self._take(change)
        self.table.remove(environment)

    @rule(seconds=st.sampled_from([0.5, 1.0]))
    def let_time_pass(self, seconds):
        self.clock.now += seconds

    @rule()
    def expire(self):
        self._take(self.registry.expire())

    @invariant()
    def every_look_up_is_right(self):
        for credential in FURTHER:
            for payload_filter in ("", "f"):
                expected = self.table.find(credential, self.clock.now, payload_filter)
                kind, value = credential.kind, credential.value
                assert self.registry.find(kind, value, payload_filter) == expected
                grant = self.registry.grant(kind, value, payload_filter)
                assert grant is None or (grant in self.grants and not grant.revoked)

    @invariant()
    def grants_that_open_nothing_are_revoked_once_their_time_has_come(self):
        found = {id(self.registry.grant(c.kind, c.value, f)) for c in FURTHER for f in ("", "f")}
        for grant in self.grants:
            expired = grant.expires_at <= self.clock.now
            assert (id(grant) in found) != (grant.revoked or expired)

    @invariant()
    def the_generation_never_falls(self):
        generation = self.registry.generation
        assert generation >= self.generation
        self.generation = generation

    @invariant()
    def names_lead_to_specs(self):
        assert self.registry.environments == {s.name: e for e, s in self.table.specs.items()}
        for spec in self.table.specs.values():
            assert self.registry.spec_of(spec.name) == spec
        assert not set(self.registry.former_names) & set(self.registry.environments)


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
