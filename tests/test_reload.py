"""A configuration is read again: when, how often, and what becomes of faults."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import fields, replace

import pytest
from msgspec import structs

from relay.build.relay import build_with_parts
from relay.config.load import load
from relay.config.schema import Config
from relay.errors import ConfigError
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.relay import Relay
from relay.reload import OPTIONS, Reload
from relay.telemetry.reloads import ReloadResult
from tests.support.serving import until

WATCHED = {"RELOAD": "watch", "STREAM_URI": "http://127.0.0.1:9"}
SUCCESS, FAILURE = ReloadResult.SUCCESS, ReloadResult.FAILURE


def config(*names: str, **variables: str) -> Config:
    keys = {f"LD_ENV_{name}": f"sdk-{name}" for name in names}
    prefixes = {f"LD_PREFIX_{name}": name for name in names}
    return load("", True, False, {**WATCHED, **keys, **prefixes, **variables})


class Readings:
    """Successive readings of a configuration; the last one again and again."""

    def __init__(self, *readings: Config | Exception) -> None:
        self.given = 0
        self._readings = list(readings)

    def __call__(self) -> Config:
        reading = self._readings[min(self.given, len(self._readings) - 1)]
        self.given += 1
        if isinstance(reading, Exception):
            raise reading
        return reading


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """A reload sets levels of the log: restore them."""
    loggers = [logging.getLogger(name) for name in (None, "relay")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@asynccontextmanager
async def reloading(
    read: Callable[[], Config], start: Config | None = None
) -> AsyncIterator[tuple[Relay, asyncio.Event]]:
    """A relay with one environment, whose configuration is read so."""
    start = start or config("a")
    relay, parts = build_with_parts(start)
    requested = asyncio.Event()
    reload = Reload(relay, start, read, requested, parts=parts, interval=0.005)
    async with relay.upstream:
        tasks = [asyncio.create_task(each.run()) for each in (relay, reload)]
        yield relay, requested
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_two_readings_must_agree():
    """A state that is read only once, such as a half-written file, is never used."""
    half, whole = config("a", "half"), config("a", "b")
    fault = ConfigError(["half a line"])
    read = Readings(config("a"), half, fault, config("a", "c"), whole)
    async with reloading(read) as (relay, _):
        await until(lambda: set(relay.environments) == {"a", "b"})
        await until(lambda: read.given > 10)
    assert relay.reloads.results == {SUCCESS: 1}


async def test_files_are_read_again_only_when_their_state_has_changed(tmp_path):
    """Until two readings agree; a request reads them in any case."""
    file, link = tmp_path / "one", tmp_path / "link"
    file.write_text("1")
    link.symlink_to(file)

    class FileReadings(Readings):
        def __call__(self) -> Config:
            return structs.replace(super().__call__(), files=(str(link), str(tmp_path / "none")))

    start = structs.replace(config("a"), files=(str(link),))
    read = FileReadings(config("a"))
    async with reloading(read, start) as (_, requested):
        await until(lambda: read.given == 2)  # as the first reading names another file
        await asyncio.sleep(0.1)
        assert read.given == 2
        file.write_text("22")
        await until(lambda: read.given == 3)
        other = tmp_path / "two"
        other.write_text("33")
        link.unlink()
        await until(lambda: read.given == 4)
        link.symlink_to(other)
        await until(lambda: read.given == 5)
        (tmp_path / "none").write_text("now there is one")
        await until(lambda: read.given == 6)
        await asyncio.sleep(0.1)
        assert read.given == 6
        requested.set()
        await until(lambda: read.given == 7)


async def test_a_fault_that_stays_is_told_once(caplog):
    """Until it is another one, or is mended; the former configuration is then nothing new."""
    one, two = ConfigError(["one", "and more"]), ConfigError(["two"])
    read = Readings(one, one, one, one, two, two, two, config("a"))
    with caplog.at_level("ERROR"):
        async with reloading(read) as (relay, _):
            await until(lambda: relay.reloads.results[SUCCESS] == 1)
            await until(lambda: read.given > 15)
    assert relay.reloads.results == {FAILURE: 2, SUCCESS: 1}
    assert [record.getMessage() for record in caplog.records] == [
        "Configuration not reloaded, nothing has changed; problems: 2",
        "Configuration error: one",
        "Configuration error: and more",
        "Configuration not reloaded, nothing has changed; problems: 1",
        "Configuration error: two",
    ]
    assert set(relay.environments) == {"a"}


async def test_a_request_needs_one_reading_only():
    """The user who asks has finished writing."""
    read = Readings(config("a", "b"))
    async with reloading(read, config("a", RELOAD="signal")) as (relay, requested):
        await asyncio.sleep(0.05)
        assert read.given == 0
        requested.set()
        await until(lambda: set(relay.environments) == {"a", "b"})
        assert read.given == 1
        await until(lambda: read.given > 3)  # watched from now on


async def test_an_unexpected_error_is_a_fault(caplog):
    """It ends nothing, and the next reading counts."""
    read = Readings(RuntimeError("bug"), config("a", "b"))
    async with reloading(read, config("a", RELOAD="signal")) as (relay, requested):
        requested.set()
        await until(lambda: relay.reloads.results[FAILURE] == 1)
        assert "it could not be read: RuntimeError" in caplog.text
        requested.set()
        await until(lambda: set(relay.environments) == {"a", "b"})


async def test_an_option_that_needs_a_restart_is_named_once(caplog):
    """A watched configuration is carried out once, although it is not in force as a whole."""
    read = Readings(config("a", PORT="1234"))
    async with reloading(read) as (relay, _):
        await until(lambda: relay.reloads.results[SUCCESS] == 1)
        await until(lambda: read.given > 10)
    assert caplog.text.count("[Main] port (PORT)") == 1
    assert relay.reloads.results == {SUCCESS: 1}


async def test_names_can_be_swapped():
    """Each name has the key that belongs to it, at once."""
    keys = {"LD_ENV_a": "sdk-b", "LD_ENV_b": "sdk-a"}
    read = Readings(config("a", "b", RELOAD="signal", **keys))
    async with reloading(read, config("a", "b", RELOAD="signal")) as (relay, requested):
        requested.set()
        await until(lambda: relay.reloads.results[SUCCESS] == 1)
        found = {name: each.spec.sdk_key.value for name, each in relay.environments.items()}
        assert found == {"a": "sdk-b", "b": "sdk-a"}
        assert relay.registry.keys == {"sdk-a", "sdk-b"}


async def test_the_time_of_success_moves_on():
    """It begins with the start, and no fault changes it."""
    read = Readings(ConfigError(["x"]), config("a"))
    async with reloading(read, config("a", RELOAD="signal")) as (relay, requested):
        start = relay.reloads.last_success
        requested.set()
        await until(lambda: relay.reloads.results[FAILURE] == 1)
        assert relay.reloads.last_success == start
        requested.set()
        await until(lambda: relay.reloads.results[SUCCESS] == 1)
        assert relay.reloads.last_success > start


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"ttl": 1.0, "mobile_key": MobileKey("mob-1")}, ""),
        ({"sdk_key": SDKKey("sdk-new")}, "snapshot"),
        ({"prefix": "other"}, "redis"),
        ({"environment_id": EnvironmentID("other")}, "snapshot document"),
        ({"sdk_key": SDKKey("sdk-new"), "prefix": "other"}, "snapshot redis"),
    ],
)
async def test_mirrors_stay_unless_they_belong_to_what_changes(tmp_path, changes, new):
    """A snapshot belongs to a key, a document to a client-side ID, a database's data to a prefix."""
    start = config(
        "a",
        LD_CLIENT_SIDE_ID_a="id",
        SNAPSHOT_DIR=str(tmp_path / "snapshots"),
        PUBLISH_TO=f"file://{tmp_path}",
        USE_REDIS="true",
    )
    relay, parts = build_with_parts(start)
    environment = relay.environments["a"]
    kinds = dict(zip(("snapshot", "redis", "document"), environment.mirrors, strict=True))
    spec = replace(environment.spec, **changes)
    assert parts is not None
    mirrors = (
        parts.mirrors(environment, spec, databases=False, documents=False) or environment.mirrors
    )
    assert [kind for kind, each in kinds.items() if each not in mirrors] == new.split()
    assert len(mirrors) == len(kinds)
    assert parts.keeps(environment, spec, databases=False)
    again = parts.of(start, databases=True, documents=False).mirrors(
        environment, environment.spec, databases=True, documents=False
    )
    assert again is not None
    assert [kind for kind, each in kinds.items() if each not in again] == ["redis"]


def test_big_segments_move_with_their_database():
    """Only when it is carried out; where they come or go, the environment is made anew."""
    relay, parts = build_with_parts(config("a", USE_REDIS="true"))
    environment = relay.environments["a"]
    spec, big_segments = environment.spec, environment.big_segments
    assert parts is not None
    assert big_segments is not None
    former = big_segments.store
    big_segments.start(synchronise=False)
    assert parts.keeps(environment, spec, databases=True)
    assert parts.keeps(environment, replace(spec, prefix="other"), databases=False)
    for moved in (
        parts.memberships(environment, spec, databases=True),
        parts.memberships(environment, replace(spec, prefix="other"), databases=False),
    ):
        assert moved is not None
        assert moved[0] is not former
    assert parts.memberships(environment, replace(spec, ttl=1.0), databases=False) is None
    assert big_segments.store is former
    without = parts.of(config("a"), databases=True, documents=False)
    assert not without.keeps(environment, spec, databases=True)


def test_each_setting_of_an_environment_has_a_name_for_the_log():
    """Those of the configuration; the rest comes from LaunchDarkly."""
    from_launchdarkly = {"project_name", "environment_name", "expiries"}
    assert {each.name for each in fields(EnvironmentSpec)} - from_launchdarkly == set(OPTIONS)
