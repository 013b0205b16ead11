"""Messages of automatic configuration, and the list that they keep."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from relay.errors import InvalidData
from relay.protocol import autoconfig
from relay.protocol.autoconfig import (
    Delete,
    FilterDescription,
    Ignored,
    Put,
    Upsert,
    VersionedList,
)
from relay.protocol.environments import EnvironmentDescription, describe
from relay.steps import finish
from tests.support.environments import description


def read(event: str, message: object) -> Any:
    return finish(autoconfig.read(event, json.dumps(message).encode()))


def test_a_put_names_all_environments_and_filters():
    """Both are found by their IDs."""
    alpha, entry = description(), {"projKey": "proj", "key": "north", "version": 3}
    data = {"environments": {"id-alpha": alpha}, "filters": {"f": entry}}
    expected = Put({"id-alpha": describe(alpha)}, {"f": FilterDescription(3, "proj", "north")})
    assert read("put", {"path": "/", "data": data}) == expected
    odd = {"PATH": "/", "Data": {"Environments": {"id-alpha": alpha}, "FILTERS": {"f": entry}}}
    assert read("put", odd) == expected
    assert read("put", {"path": "/", "data": {"environments": {}}}) == Put({}, {})


def test_a_bad_entry_does_not_spoil_the_others():
    """The environment of a bad entry stays as it is known, as its ID is there."""
    entries = {
        "id-alpha": description(),
        "id-beta": description("beta", version="x"),
        "id-gamma": description("other"),
        "": description("", envID=""),
    }
    message = {"path": "/", "data": {"environments": entries, "filters": {"f": 1}}}
    put = read("put", message)
    assert list(put.environments) == ["id-alpha"]
    assert sorted(put.invalid_environments) == ["", "id-beta", "id-gamma"]
    assert list(put.invalid_filters) == ["f"]


def test_a_long_list_is_read_in_steps():
    """One for each environment, so that requests come in between."""
    entries = {f"id-e{number}": description(f"e{number}") for number in range(50)}
    message = {"path": "/", "data": {"environments": entries}}
    assert len(list(autoconfig.read("put", json.dumps(message).encode()))) == 50


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ("put", {"path": "/other", "data": {"environments": {}}}),
        ("put", {"data": {"environments": {}}}),
        ("patch", {"path": "/environments/id-beta", "data": description()}),
        ("patch", {"path": "/environments/id-alpha", "data": None}),
        ("patch", {"path": "/", "data": description()}),
        ("patch", {"path": "environments/id-alpha", "data": description()}),
        ("patch", {"path": "/environments/id-alpha/x", "data": description()}),
        ("patch", {"path": "/environments/", "data": description(envID="")}),
        ("patch", {"path": "/teams/1", "data": {}}),
        ("delete", {"path": "/teams/1", "version": 9}),
        ("delete", {"version": 9}),
    ],
)
def test_messages_that_do_not_fit_are_passed_over(event, message):
    """They end neither the stream nor an environment."""
    assert isinstance(read(event, message), Ignored)


@pytest.mark.parametrize(
    ("event", "content"),
    [
        ("put", b"{"),
        ("put", b""),
        ("put", b"[]"),
        ("put", b'{"path":"/"}'),
        ("put", b'{"path":"/","data":null}'),
        ("put", b'{"path":"/","data":{}}'),
        ("put", b'{"path":"/","data":{"environments":null}}'),
        ("put", b'{"path":"/","data":{"environments":{},"filters":[1]}}'),
        ("patch", b'{"path":"/environments/e"}'),
        ("patch", b'{"path":"/environments/e","data":5}'),
        ("patch", b'{"path":"/environments/e","data":{"envID":"e","version":"5"}}'),
        ("patch", b'{"path":"/filters/f","data":[]}'),
        ("delete", b'{"path":"/environments/e","version":"5"}'),
        ("delete", b'{"path":5}'),
        ("patch", b"[" * 100_000),
    ],
)
def test_malformed_messages(event, content):
    """A put without a list is one of them: it must not remove everything."""
    with pytest.raises(InvalidData):
        finish(autoconfig.read(event, content))


def test_patches_and_deletes():
    """A delete without a version has none."""
    alpha = {"path": "/environments/id-alpha", "data": description()}
    assert read("patch", alpha) == Upsert("id-alpha", describe(description()))
    north = {"path": "/filters/f", "data": {"projKey": "p", "key": "north", "version": 2}}
    assert read("patch", north) == Upsert("f", FilterDescription(2, "p", "north"))
    gone = {"path": "/environments/e", "version": 4}
    assert read("delete", gone) == Delete(EnvironmentDescription, "e", 4)
    assert read("delete", {"path": "/filters/f"}) == Delete(FilterDescription, "f", 0)


IDS = st.sampled_from("abc")
VERSIONS = st.integers(0, 4)


class VersionRules(RuleBasedStateMachine):
    """Compares a list with the table of offline-and-autoconfig 7.4, whatever the messages."""

    def __init__(self) -> None:
        super().__init__()
        self.list: VersionedList[EnvironmentDescription] = VersionedList()
        self.known: dict[str, tuple[str, int]] = {}
        """State (`live` or `gone`) and version of each ID that was seen."""
        self.live: dict[str, int] = {}
        """The versions that follow from the changes."""

    def carry_out(self, changes: Any) -> None:
        for change in changes:
            assert self.live.get(change.id) == (change.before and change.before.version)
            if change.after is None:
                del self.live[change.id]
            else:
                self.live[change.id] = change.after.version

    def expect_upsert(self, identifier: str, version: int) -> None:
        if identifier not in self.known or version > self.known[identifier][1]:
            self.known[identifier] = "live", version

    @rule(identifier=IDS, version=VERSIONS)
    def upsert(self, identifier: str, version: int) -> None:
        self.carry_out(self.list.upsert(identifier, EnvironmentDescription(identifier, version)))
        self.expect_upsert(identifier, version)

    @rule(identifier=IDS, version=VERSIONS)
    def delete(self, identifier: str, version: int) -> None:
        self.carry_out(self.list.delete(identifier, version))
        if identifier not in self.known or version > self.known[identifier][1]:
            self.known[identifier] = "gone", version

    @rule(versions=st.dictionaries(IDS, VERSIONS), unusable=st.sets(IDS))
    def put(self, versions: dict[str, int], unusable: set[str]) -> None:
        values = {k: EnvironmentDescription(k, v) for k, v in versions.items() if k not in unusable}
        self.carry_out(self.list.put(values, dict.fromkeys(unusable)))
        for identifier, value in values.items():
            self.expect_upsert(identifier, value.version)
        present = values.keys() | unusable
        self.known = {k: v for k, v in self.known.items() if k in present}

    @rule(versions=st.dictionaries(IDS, VERSIONS), unusable=st.sets(IDS))
    def put_that_outranks(self, versions: dict[str, int], unusable: set[str]) -> None:
        values = {k: EnvironmentDescription(k, v) for k, v in versions.items() if k not in unusable}
        self.carry_out(self.list.put(values, dict.fromkeys(unusable), outranks=True))
        kept = {k: v for k, v in self.known.items() if k in unusable}
        self.known = kept | {k: ("live", value.version) for k, value in values.items()}

    @invariant()
    def equal(self) -> None:
        expected = {k: v for k, (state, v) in self.known.items() if state == "live"}
        assert self.live == expected
        assert len(self.list) == len(expected)


VersionRules.TestCase.settings = settings(stateful_step_count=30)
TestVersionRules = VersionRules.TestCase


def test_tombstones_are_bounded(monkeypatch):
    """The oldest are forgotten first."""
    monkeypatch.setattr(autoconfig, "MAX_TOMBSTONES", 2)
    known: VersionedList[EnvironmentDescription] = VersionedList()
    for identifier in "abc":
        assert not list(known.delete(identifier, 5))
    assert list(known.upsert("a", EnvironmentDescription("a", 1)))
    assert not list(known.upsert("c", EnvironmentDescription("c", 1)))
