"""The list of environments as it is stored, entry by entry."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from relay.protocol.autoconfig import FilterDescription
from relay.protocol.environmentlist import EnvironmentList, entries_of, list_of
from relay.protocol.environments import (
    LONGEST_TTL,
    EnvironmentDescription,
    SharedSettings,
    describe,
    represent,
    settled,
    spec_of,
)
from tests.support.environments import description, payload_filter

NOW = 1000.0
NONE = SharedSettings()

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
names = texts.filter(bool)
times = st.integers(1, 10**14).map(lambda milliseconds: milliseconds / 1000)
lists = st.lists(st.tuples(names, times | st.just(math.inf)), max_size=3).map(tuple)
descriptions = st.builds(
    EnvironmentDescription,
    id=names,
    version=st.integers(-(2**53), 2**53),
    key=texts,
    name=texts,
    project_key=texts,
    project_name=texts,
    sdk_key=texts,
    expiring=st.none() | st.tuples(names, times),
    sdk_keys=lists,
    mobile_key=texts,
    mobile_keys=lists,
    ttl=st.integers(0, LONGEST_TTL).map(lambda minutes: 60.0 * minutes),
    secure_mode=st.booleans(),
)
filters = st.builds(FilterDescription, st.integers(-(2**53), 2**53), texts, names)


@given(
    st.lists(descriptions, max_size=4, unique_by=lambda each: each.id),
    st.dictionaries(texts, filters, max_size=3),
    st.none() | times,
)
def test_what_is_stored_is_read(environments, payload_filters, confirmed):
    """With every key and its expiry, to the millisecond."""
    by_id = {each.id: each for each in environments}
    entries = entries_of(EnvironmentList(by_id, payload_filters, confirmed), "me")
    expected = confirmed if entries else None
    assert list_of(entries, "me") == EnvironmentList(by_id, payload_filters, expected)


@given(st.lists(descriptions, min_size=1, max_size=4))
def test_a_spec_follows_from_what_is_stored_alone(history):
    """Whatever the environment has been before: the same keys, for the same time."""
    made = None
    for each in history:
        latest = replace(each, id="e", sdk_key=each.sdk_key or ("" if made else "sdk-1"))
        made = spec_of(latest, NONE, NOW, made)
    assert made is not None
    stored = settled(latest, made)
    assert spec_of(stored, NONE, NOW) == made
    assert list_of(entries_of(EnvironmentList({"e": stored}, {}))).environments == {"e": stored}


def entry(kind: str = "environment", version: int = 2, **members: object) -> dict:
    """An entry as ld-relay writes it."""
    data = description(defaultTtl=5) if kind == "environment" else payload_filter("north")
    return {"kind": kind, "modelVersion": version, "data": data, **members}


def test_entries_are_those_of_ld_relay():
    """With two members more, which it passes over."""
    alpha, north = describe(description(defaultTtl=5)), FilterDescription(1, "proj", "north")
    stored = EnvironmentList({"id-alpha": alpha}, {"f": north}, 12.5)
    ours = {"confirmed": 12500, "owner": "me"}
    made = {name: json.loads(each) for name, each in entries_of(stored, "me").items()}
    assert made == {"env:id-alpha": entry(**ours), "filter:f": entry("filter", **ours)}
    theirs = {"env:id-alpha": entry(version=1), "filter:f": entry("filter")}
    read = list_of({name: json.dumps(each).encode() for name, each in theirs.items()}, "me")
    assert read == EnvironmentList({"id-alpha": alpha}, {"f": north})


def test_keys_are_stored_as_launchdarkly_writes_them():
    """Those without a limit have no expiry, which JSON could not express."""
    keys = (("sdk-1", math.inf), ("sdk-2", 7.125))
    made = represent(EnvironmentDescription("e", 1, sdk_key="sdk-1", sdk_keys=keys))
    assert made["sdkKeys"] == [{"value": "sdk-1"}, {"value": "sdk-2", "expiry": 7125}]
    made = represent(EnvironmentDescription("e", 1, sdk_key="s", expiring=("o", 7.125)))
    assert made["sdkKey"] == {"value": "s", "expiring": {"value": "o", "timestamp": 7125}}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("env:id-alpha", b"", "truncated"),
        ("env:id-alpha", b"[]", "array"),
        ("env:id-alpha", entry(version=3), "it has form 3"),
        ("env:id-alpha", entry(version=0), "it has form 0"),
        ("env:id-alpha", entry("filter"), "its kind is 'filter'"),
        ("env:id-alpha", entry() | {"kind": "segment"}, "its kind is 'segment'"),
        ("filter:f", entry(), "its kind is 'environment'"),
        ("other", entry(), "its kind is 'environment'"),
        ("env:id-beta", entry(), "in the place of another environment"),
        ("env:id-alpha", entry() | {"data": {"envID": 3}}, "envid is not a string"),
        ("env:id-alpha", entry() | {"data": None}, "not a JSON object"),
        ("env:id-alpha", entry(confirmed="now"), "int"),
        ("env:id-alpha", entry(owner="you"), "another automatic configuration key"),
        ("filter:f", entry("filter") | {"data": {"version": 1}}, "there is no key"),
    ],
)
def test_an_entry_that_cannot_be_used_does_not_spoil_the_others(name, content, reason):
    """The reason is told."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    beta = description("beta")
    good = {"env:id-beta": json.dumps(entry() | {"data": beta}).encode()}
    read = list_of({**good, name: raw}, "me")
    assert read.environments == ({} if name in good else {"id-beta": describe(beta)})
    assert not read.filters
    assert reason in read.unusable[name]


def test_a_list_is_as_old_as_its_oldest_entry():
    """If another program has written a part of it, nothing newer is known of the rest."""
    times = {"env:id-alpha": entry(confirmed=5000), "filter:f": entry("filter", confirmed=4000)}
    read = list_of({name: json.dumps(each).encode() for name, each in times.items()})
    assert read.confirmed == 4.0


def test_no_key_is_shown():
    """Where a list is printed, in an error of a test perhaps."""
    stored = EnvironmentList({"id-alpha": describe(description())}, {})
    assert "sdk-alpha" not in repr(stored)
