"""Changes that a second reading of a configuration makes, and those that need a restart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from relay.config.difference import continued, difference, same
from relay.config.load import load
from relay.config.schema import Config
from relay.model.credential import EnvironmentID, SDKKey
from relay.model.environment import EnvironmentSpec

LISTED = {"LD_ENV_main": "sdk-main", "LD_PROJ_KEY_main": "shop", "LD_PREFIX_main": "main"}
SECOND = {"LD_ENV_other": "sdk-other", "LD_PROJ_KEY_other": "shop", "LD_PREFIX_other": "other"}
REDIS = {"USE_REDIS": "true"}


def config(*groups: dict[str, str], **variables: str) -> Config:
    """Return the configuration of some variables."""
    merged: dict[str, str] = {}
    for group in (*groups, variables):
        merged |= group
    return load("", True, False, merged)


def names(found: Config) -> list[str]:
    return [each.name for each in found.all_environments]


@pytest.mark.parametrize(
    ("before", "after", "restart"),
    [
        ({}, {}, ()),
        ({}, {"PORT": "8031"}, ("[Main] port (PORT)",)),
        ({"PORT": "8031"}, {}, ("[Main] port",)),
        ({}, {"PORT": "8030"}, ()),
        ({}, {"LOG_LEVEL": "debug"}, ()),
        ({}, {"RELOAD": "watch"}, ()),
        ({}, {"EVAL_STREAMS": "false"}, ()),
        ({}, {"LD_TTL_main": "1m", "LD_LOG_LEVEL_main": "debug"}, ()),
        ({}, {"LD_ENV_main": "sdk-new"}, ()),
        ({}, {"LD_FILTER_KEYS_shop": "a,b"}, ()),
        ({}, {"WEBHOOK_SECRET": "s"}, ("[Webhook] secret (WEBHOOK_SECRET)",)),
        ({"WEBHOOK_SECRET": "s"}, {}, ("[Webhook] secret",)),
        ({"WEBHOOK_SECRET": "s"}, {"WEBHOOK_SECRET": "t"}, ()),
        ({}, REDIS, ()),
        (REDIS, REDIS | {"REDIS_PASSWORD": "p"}, ()),
        ({}, {"BASE_URI": "http://other"}, ("[Main] baseUri (BASE_URI)",)),
        ({}, {"CACHE_TTL": "1m"}, ()),
        ({}, {"USE_EVENTS": "true", "TLS_MIN_VERSION": "1.3"}, ("[Main] tlsMinVersion (TLS_MIN_VERSION)", "[Events] sendEvents (USE_EVENTS)")),
    ],
)  # fmt: skip
def test_what_needs_a_restart_is_named(before, after, restart):
    """By the name of the option as a file has it, and the place where it was set."""
    found = difference(config(LISTED, before), config(LISTED, after))
    assert found.restart == restart


def test_a_file_and_its_line_are_the_source(tmp_path):
    """An option of a file is named with its line."""
    path = tmp_path / "relay.conf"
    read = []
    for port in (8030, 8031):
        path.write_text(f'[Main]\nport = {port}\n[Environment "main"]\nsdkKey = sdk-main\n')
        read.append(load(str(path), False, False, {}))
    assert difference(*read).restart == (f"[Main] port ({path}:2)",)


def test_in_force_are_the_new_environments_and_the_old_rest():
    """Options that need a restart keep their values, those that follow from them included."""
    before = config(LISTED, REDIS, LOG_LEVEL="warn")
    after = config(
        LISTED, SECOND, REDIS, LOG_LEVEL="debug", EVAL_STREAMS="false", BASE_URI="http://other",
        REDIS_HOST="other", LD_FILTER_KEYS_shop="part",
    )  # fmt: skip
    found = difference(before, after).config
    assert names(found) == ["main", "main/part", "other", "other/part"]
    assert (found.main.log_level, found.main.eval_streams) == ("debug", False)
    assert found.main.base_uri == before.main.base_uri
    assert found.main.client_side_base_uri == before.main.client_side_base_uri
    assert found.redis == after.redis


@pytest.mark.parametrize(
    ("before", "after", "restart"),
    [
        (LISTED, {"AUTO_CONFIG_KEY": "rel-1"}, {"[AutoConfig] key (AUTO_CONFIG_KEY)", '[Environment "main"]'}),
        ({"AUTO_CONFIG_KEY": "rel-1"}, LISTED, {"[AutoConfig] key", '[Environment "main"] (LD_ENV_main)'}),
        ({"AUTO_CONFIG_KEY": "rel-1"}, {"AUTO_CONFIG_KEY": "rel-2"}, {"[AutoConfig] key (AUTO_CONFIG_KEY)"}),
        ({"AUTO_CONFIG_KEY": "rel-1"}, {"AUTO_CONFIG_KEY": "rel-1", "ENV_ALLOWED_ORIGIN": "https://a.example"}, {"[AutoConfig] envAllowedOrigin (ENV_ALLOWED_ORIGIN)"}),
        ({"AUTO_CONFIG_KEY": "rel-1"}, {"AUTO_CONFIG_KEY": "rel-1", "EVAL_STREAMS": "0"}, {"[Main] evalStreams (EVAL_STREAMS)"}),
        ({"FILE_DATA_SOURCE": "a"}, {"FILE_DATA_SOURCE": "b"}, {"[OfflineMode] fileDataSource (FILE_DATA_SOURCE)"}),
        ({"FILE_DATA_SOURCE": "a"}, {"FILE_DATA_SOURCE": "a", "ENV_DATASTORE_PREFIX": "$CID"} | REDIS, {"[OfflineMode] envDatastorePrefix (ENV_DATASTORE_PREFIX)", "[Redis] host (USE_REDIS)"}),
        ({"FLAGS_FILE": "a"}, {"FLAGS_FILE": "b"}, {"[Main] flagsFile (FLAGS_FILE)"}),
        ({"FLAGS_FILE": "a"}, {"FLAGS_FILE": "a"} | LISTED, {'[Environment "main"] (LD_ENV_main)'}),
        ({"FLAGS_FILE": "a"} | LISTED, {"FLAGS_FILE": "a"}, {'[Environment "main"]'}),
    ],
)  # fmt: skip
def test_where_environments_come_from_needs_a_restart(before, after, restart):
    """The environments stay as they are; log levels change all the same."""
    found = difference(config(before), config(after, LOG_LEVEL="debug"))
    assert set(found.restart) == restart
    assert found.config.environments == config(before).environments
    assert found.config.main.log_level == "debug"


VARIABLES: dict[str, st.SearchStrategy[str]] = {
    "PORT": st.sampled_from(["8030", "8031"]),
    "LOG_LEVEL": st.sampled_from(["info", "debug"]),
    "BASE_URI": st.sampled_from(["http://a", "http://b"]),
    "EVAL_STREAMS": st.sampled_from(["true", "false"]),
    "WEBHOOK_SECRET": st.sampled_from(["s", "t"]),
    "USE_REDIS": st.just("true"),
    "REDIS_HOST": st.sampled_from(["r", "s"]),
    "LD_TTL_main": st.sampled_from(["1m", "2m"]),
    "LD_FILTER_KEYS_shop": st.sampled_from(["a", "a,b"]),
}
SOURCES: list[dict[str, str]] = [
    LISTED, LISTED | SECOND, {"AUTO_CONFIG_KEY": "rel-1"}, {"FLAGS_FILE": "a"}
]  # fmt: skip


@st.composite
def configurations(draw: Any) -> Config:
    variables = draw(st.fixed_dictionaries({}, optional=VARIABLES))
    source = draw(st.sampled_from(SOURCES))
    if source not in SOURCES[:2]:
        variables.pop("LD_FILTER_KEYS_shop", None)
        variables.pop("USE_REDIS", None)
    return config(source, variables)


@given(configurations())
def test_the_same_again_changes_nothing(read):
    """Neither a value, nor is anything named."""
    found = difference(read, read)
    assert found.config == read
    assert found.restart == ()


@given(configurations(), configurations())
def test_a_second_time_changes_nothing_more(before, after):
    """Changes that need a restart go on needing it."""
    first = difference(before, after)
    second = difference(first.config, after)
    assert same(second.config, first.config)
    assert second.restart == first.restart


@given(configurations(), configurations())
def test_a_restart_is_needed_if_anything_else_differs(before, after):
    """Nothing that differs is forgotten: it is in force, or an option is named."""
    found = difference(before, after)
    assert found.restart or same(found.config, after)


def test_comments_and_lines_make_no_difference():
    """Sources and warnings are not what a relay does."""
    read = config(LISTED)
    moved = structs.replace(read, sources={"Main.port": "elsewhere"}, warnings=("w",))
    assert same(read, moved)
    assert not same(read, config(LISTED, PORT="1"))


# Which environments go on


def spec(name: str, key: str, identifier: str = "", **more: Any) -> EnvironmentSpec:
    environment_id = EnvironmentID(identifier) if identifier else None
    return EnvironmentSpec(name, SDKKey(key), environment_id=environment_id, **more)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([spec("a", "k")], [spec("a", "k", "id", ttl=1.0)], {"a": "a"}),
        ([spec("a", "k")], [spec("a", "l")], {"a": "a"}),
        ([spec("a", "k")], [spec("b", "k")], {"b": "a"}),
        ([spec("a", "k")], [spec("b", "l")], {}),
        ([spec("a", "k", "1")], [spec("a", "k", "2")], {"a": "a"}),
        ([spec("a", "k", "1")], [spec("a", "l", "2")], {}),
        ([spec("a", "k", "1")], [spec("a", "l", "1")], {"a": "a"}),
        ([spec("a", "k", environment_key="x")], [spec("a", "l", environment_key="y")], {}),
        ([spec("a", "k")], [spec("a", "k", payload_filter="f")], {}),
        ([spec("a", "k"), spec("a/f", "k", payload_filter="f")],
         [spec("b", "k"), spec("b/f", "k", payload_filter="f")], {"b": "a", "b/f": "a/f"}),
        # Two with one key keep their names.
        ([spec("a", "k"), spec("b", "k")], [spec("b", "k"), spec("a", "k")], {"a": "a", "b": "b"}),
        # A key that another environment had brings the data of that.
        ([spec("a", "k"), spec("b", "l")], [spec("b", "k")], {"b": "a"}),
        ([spec("a", "k"), spec("b", "l")], [spec("b", "k"), spec("c", "l")], {"c": "b"}),
        ([spec("a", "k"), spec("b", "l")], [spec("a", "l"), spec("b", "k")], {}),
    ],
)  # fmt: skip
def test_an_environment_goes_on_with_its_key_or_its_name(before, after, expected):
    """The key comes first, because it decides about the data; names can be taken if free."""
    assert continued(before, after) == expected


SPECS = st.lists(
    st.builds(
        lambda name, key, part: replace(spec(name, key), payload_filter=part),
        st.sampled_from("abcd"),
        st.sampled_from("klm"),
        st.sampled_from(["", "f"]),
    ),
    unique_by=lambda each: each.name,
)


@given(SPECS, SPECS)
def test_a_plan_can_be_carried_out(before, after):
    """After the removals, each change finds its name free, and every addition too."""
    goes_on = continued(before, after)
    assert len(set(goes_on.values())) == len(goes_on)
    now = {each.name for each in before if each.name in goes_on.values()}
    for each in after:
        if each.name in goes_on:
            now.remove(goes_on[each.name])
            assert each.name not in now
            now.add(each.name)
    assert now.isdisjoint(each.name for each in after if each.name not in goes_on)


@given(SPECS)
def test_the_same_environments_go_on(specs):
    """Under their names."""
    assert continued(specs, specs) == {each.name: each.name for each in specs}
