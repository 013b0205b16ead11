"""Automatic configuration: what a relay makes of the messages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, cast

import pytest

from relay import clock
from relay.autoconfig import AutoConfiguration
from relay.environment import ConnectionState, Environment
from relay.errors import ErrorKind
from relay.model.credential import CredentialKind, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.payload import ChangeSet
from relay.protocol import autoconfig
from relay.protocol.autoconfig import describe_filter
from relay.protocol.environmentlist import EnvironmentList
from relay.protocol.environments import SharedSettings, describe
from relay.relay import DirectoryChange, Relay
from relay.sources import Interrupted, UpToDate
from relay.sources.autoconfig import AutoConfigStream
from relay.steps import finish
from relay.stores.listmirror import ListMirror, ListTimings
from relay.streams.hub import Hub
from relay.telemetry.log import Log
from tests.support import environments
from tests.support.contracts import ScriptedSource
from tests.support.environments import description, payload_filter
from tests.support.serving import until

SDK, MOBILE, ID = CredentialKind.SDK_KEY, CredentialKind.MOBILE_KEY, CredentialKind.ENVIRONMENT_ID
FILTER = payload_filter("north")
BETA = ("id-beta/north", "id-beta/south")
AT_ONCE = ListTimings(gather=0.0)
FAR = 10**17
"""Milliseconds of a time that no test sees."""


class ScriptedStream(ScriptedSource):
    """An automatic-configuration stream that yields what the test gives it."""

    shown_url = "https://stream.example"

    async def send(self, message: bytes) -> None:
        """Deliver a message as LaunchDarkly writes it."""
        event, data = (line.split(b": ", 1)[1] for line in message.strip().split(b"\n"))
        await self.give(cast("Any", finish(autoconfig.read(event.decode(), data))))


class ScriptedStore:
    """A place for the list, which waits until the test lets it be read."""

    label = "file /x"

    def __init__(self, content: EnvironmentList | None = None) -> None:
        self.content = content
        self.broken = False
        self.written: list[EnvironmentList] = []
        self.readable = asyncio.Event()
        self.readable.set()

    async def load(self) -> EnvironmentList | None:
        await self.readable.wait()
        if self.broken:
            raise RuntimeError("a bug")
        return self.content

    async def save(self, environments: EnvironmentList) -> None:
        if self.broken:
            raise RuntimeError("a bug")
        self.written.append(environments)

    async def aclose(self) -> None:
        pass


def stored(
    *descriptions: dict, confirmed: float | None = 1000.0, **filters: dict
) -> EnvironmentList:
    """A list as it may be stored."""
    by_id = {each["envID"]: describe(each) for each in descriptions}
    named = {name: describe_filter(each) for name, each in filters.items()}
    return EnvironmentList(by_id, named, confirmed)


class Configured:
    """A relay whose environments come from a scripted stream."""

    def __init__(self, *stores: ScriptedStore) -> None:
        self.stream = ScriptedStream()
        self.sources: list[tuple[SDKKey, ScriptedSource]] = []
        self.broken: set[str] = set()
        """Names of environments that cannot be made."""
        self.directory = AutoConfiguration(
            cast("AutoConfigStream", self.stream),
            SharedSettings("ld-$CID"),
            self.make_environment,
            self.make_source,
            [ListMirror(store, logging.getLogger("relay"), AT_ONCE) for store in stores],
        )
        self.relay = Relay([], 5, directory=self.directory)

    def make_environment(self, spec: EnvironmentSpec) -> Environment:
        if spec.name in self.broken:
            raise OSError("no such database")
        log = logging.getLogger("relay.env.test")
        return Environment(spec, self.make_source(spec, log), Hub({}), log)

    def make_source(self, spec: EnvironmentSpec, _log: Log) -> ScriptedSource:
        source = ScriptedSource()
        self.sources.append((spec.sdk_key, source))
        return source

    def opened(self, kind: CredentialKind, key: str, part: str = "") -> str:
        """The name of the environment that a credential opens; empty for none."""
        environment = self.relay.registry.find(kind, key, part)
        return environment.spec.name if environment else ""


@asynccontextmanager
async def configured(*stores: ScriptedStore) -> AsyncIterator[Configured]:
    made = Configured(*stores)
    running = asyncio.create_task(made.relay.run())
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_long_list_leaves_room_for_requests():
    """The event loop turns after each environment that comes or goes, and each variant."""
    counts: list[int] = []

    async def watch(relay: Relay) -> None:
        while True:
            counts.append(len(relay.environments))
            await asyncio.sleep(0)

    entries = [description(f"e{number}") for number in range(50)]
    async with configured() as made:
        watching = asyncio.create_task(watch(made.relay))
        await made.stream.send(environments.put(*entries))
        await made.stream.send(environments.put(*entries, filters={"f": FILTER}))
        await made.stream.send(environments.put(*entries))
        await made.stream.send(environments.put())
        watching.cancel()
    assert max(counts) == 100
    assert counts[-1] <= 1
    steps = [abs(after - before) for before, after in pairwise(counts)]
    assert max(steps) == 1


async def test_environments_come_change_and_go():
    """Each message has its effect, and all credentials open at once."""
    async with configured() as made:
        relay = made.relay
        assert not relay.knows_environments
        await made.stream.send(environments.put(description(), description("beta")))
        assert relay.knows_environments
        assert made.directory.changes == {DirectoryChange.ADDED: 2}
        alpha = relay.environments["id-alpha"]
        for kind, key in ((SDK, "sdk-alpha-1"), (MOBILE, "mob-alpha-key"), (ID, "id-alpha")):
            assert made.opened(kind, key) == "id-alpha"
        await made.stream.send(environments.patch(description("alpha", 2, envName="New")))
        assert relay.environments["id-alpha"] is alpha
        assert alpha.spec.title == "Project New"
        await made.stream.send(environments.delete("alpha", 3))
        assert list(relay.environments) == ["id-beta"]
        assert made.opened(SDK, "sdk-alpha-1") == ""
        await made.stream.send(environments.put())
        assert not relay.environments


async def test_a_rotation_has_a_source_of_its_own():
    """The former key opens the environment until it expires; other changes need no source."""
    async with configured() as made:
        await made.stream.send(environments.put(description()))
        old = {"value": "sdk-alpha-1", "timestamp": FAR}
        key = {"value": "sdk-alpha-2", "expiring": old}
        await made.stream.send(environments.patch(description("alpha", 2, sdkKey=key)))
        await made.stream.send(environments.patch(description("alpha", 3, sdkKey=key, projKey="q")))
        assert [key.value for key, _ in made.sources] == ["sdk-alpha-1", "sdk-alpha-2"]
        assert made.opened(SDK, "sdk-alpha-1") == made.opened(SDK, "sdk-alpha-2") == "id-alpha"
        assert made.relay.environments["id-alpha"].spec.project_key == "q"
        await made.stream.send(environments.patch(description("alpha", 4, key=3)))
        assert made.opened(SDK, "sdk-alpha-2") == ""
        expected = {DirectoryChange.ADDED: 1, DirectoryChange.CHANGED: 3}
        assert made.directory.changes == expected | {DirectoryChange.ROTATED: 2}
        assert made.opened(SDK, "sdk-alpha-1") == "id-alpha", "its grace period goes on"


async def test_a_relay_starts_with_the_environments_of_the_list():
    """It has started when the list has come, and data for each."""
    async with configured() as made:
        waiting = asyncio.create_task(made.relay.wait_until_started())
        await made.stream.send(environments.put(description(), description("beta")))
        (_, first), (_, second) = made.sources
        await first.give(ChangeSet((), full=True))
        await asyncio.sleep(0)
        assert not waiting.done()
        await second.give(ChangeSet((), full=True))
        await asyncio.wait_for(waiting, 5)


async def test_a_patch_before_the_list_is_not_the_list():
    """It has its effect, but no credential can be called unknown yet."""
    async with configured() as made:
        await made.stream.send(environments.patch(description()))
        assert not made.relay.knows_environments
        assert made.directory.connection.state is ConnectionState.INITIALIZING
        await made.stream.send(environments.patch(description("alpha", 2, defaultTtl=5)))
        await made.stream.send(environments.put(description("alpha", 2)))
        assert made.relay.environments["id-alpha"].spec.ttl == 300


async def test_what_cannot_be_used_harms_only_itself(caplog):
    """An environment that is malformed, has no key or cannot be made is tried with the next put."""
    async with configured() as made:
        await made.stream.send(environments.put(description("beta")))
        made.broken = {"id-gamma"}
        bad = (description("beta", version="x"), description("delta", sdkKey=None))
        await made.stream.send(environments.put(description(), description("gamma"), *bad))
        assert sorted(made.relay.environments) == ["id-alpha", "id-beta"]
        assert made.relay.knows_environments
        for text in ("version is not an integer", "no SDK key", "Unable to initialize"):
            assert text in caplog.text
        assert sorted(made.relay.unusable) == ["id-delta", "id-gamma"]
        assert list(made.directory.invalid_entries) == [("environment", "id-beta")]
        made.broken.clear()
        await made.stream.send(environments.put(description(), description("gamma")))
        assert not made.relay.unusable
        assert sorted(made.relay.environments) == ["id-alpha", "id-gamma"]


async def test_invalid_entries_are_named_until_they_are_mended():
    """By a patch, the end of what they stand for, or the next list."""
    async with configured() as made:
        directory, send = made.directory, made.stream.send
        bad = [description(name, version="x") for name in ("alpha", "beta", "gamma")]
        filters = {"id-alpha": payload_filter("north", version="x"), "f2": 1}
        await send(environments.put(*bad, filters=filters))
        assert len(directory.invalid_entries) == 5
        reason = directory.invalid_entries["environment", "id-alpha"]
        assert "version is not an integer" in reason
        await send(environments.patch(description()))
        await send(environments.delete("beta", 1))
        await send(environments.patch_filter("f2", payload_filter("south")))
        assert list(directory.invalid_entries) == [
            ("environment", "id-gamma"),
            ("filter", "id-alpha"),
        ]
        await send(environments.put(description()))
        assert not directory.invalid_entries


async def test_an_invalid_filter_says_nothing_of_an_environment_with_its_id():
    """Each is known by its own entry."""
    async with configured() as made:
        await made.stream.send(environments.put(description()))
        bad = {"id-alpha": payload_filter("north", version="x")}
        await made.stream.send(environments.put(filters=bad))
        assert not made.relay.environments


async def test_interruptions_change_nothing_but_the_state(caplog):
    """A refused key is an error line each time; the environments go on."""
    async with configured() as made:
        refused = Interrupted(ErrorKind.ERROR_RESPONSE, "Invalid key", 401, refused=True)
        connection = made.directory.connection
        await made.stream.give(refused, refused)
        assert connection.state is ConnectionState.OFF
        assert connection.last_status == 401
        assert caplog.text.count("ERROR") == 2
        await made.stream.send(environments.put(description()))
        assert connection.state is ConnectionState.VALID
        await made.stream.give(Interrupted(ErrorKind.NETWORK_ERROR, "lost"))
        assert connection.state is ConnectionState.INTERRUPTED
        assert connection.last_status is None
        assert made.relay.knows_environments
        assert list(made.relay.environments) == ["id-alpha"]


async def test_an_unexpected_error_ends_neither_relay_nor_environments(monkeypatch, caplog):
    """The stream is followed again."""
    monkeypatch.setattr("relay.relay.RESTART_DELAY", 0.01)
    async with configured() as made:
        await made.stream.send(environments.put(description()))
        await made.stream.give(RuntimeError("unexpected"))
        await made.stream.send(environments.put(description(), description("beta")))
        assert sorted(made.relay.environments) == ["id-alpha", "id-beta"]
    assert "cannot be followed" in caplog.text


async def test_each_filter_of_a_project_makes_a_variant_of_its_environments():
    """Environments and filters come and go in any order; all keys of one open its variants."""
    async with configured() as made:
        north, other = payload_filter("north"), payload_filter("east", project="other")
        listed = {"f1": north, "f2": payload_filter("north"), "f3": other}
        await made.stream.send(environments.put(description(), filters=listed))
        assert list(made.relay.environments) == ["id-alpha", "id-alpha/north"]
        assert made.opened(SDK, "sdk-alpha-1", "north") == "id-alpha/north"
        variant = made.relay.environments["id-alpha/north"]
        assert (variant.spec.prefix, variant.spec.payload_filter) == ("ld-id-alpha.north", "north")
        await made.stream.send(environments.patch_filter("f4", payload_filter("south")))
        await made.stream.send(environments.patch(description("beta")))
        assert [*made.relay.environments][2:] == ["id-alpha/south", "id-beta", *BETA]
        await made.stream.send(environments.delete_filter("f1", 2))
        assert "id-beta/north" in made.relay.environments, "another filter has the key"
        await made.stream.send(environments.delete_filter("f2", 2))
        assert made.opened(SDK, "sdk-alpha-1", "north") == ""
        await made.stream.send(environments.patch(description("alpha", 2, 2)))
        assert made.opened(MOBILE, "mob-alpha-key", "south") == "id-alpha/south"
        assert made.opened(SDK, "sdk-alpha-1", "south") == ""
        assert made.opened(SDK, "sdk-alpha-2", "south") == "id-alpha/south"
        assert made.directory.changes[DirectoryChange.ROTATED] == 1
        await made.stream.send(environments.patch(description("alpha", 3, 2, projKey="other")))
        assert "id-alpha/south" not in made.relay.environments
        assert made.opened(SDK, "sdk-alpha-2", "east") == "id-alpha/east"
        await made.stream.send(environments.delete("alpha", 4))
        assert list(made.relay.environments) == ["id-beta", "id-beta/south"]
        await made.stream.send(environments.put(description("beta")))
        assert list(made.relay.environments) == ["id-beta"]


async def test_a_variant_that_cannot_be_made_harms_only_itself(caplog):
    """The next put is another chance; a filter without a key is none."""
    async with configured() as made:
        made.broken = {"id-alpha/north"}
        listed = {"f1": payload_filter("north"), "f2": payload_filter("")}
        await made.stream.send(environments.put(description(), filters=listed))
        assert list(made.relay.environments) == ["id-alpha"]
        assert "there is no key" in caplog.text
        made.broken.clear()
        await made.stream.send(environments.put(description(), filters=listed))
        assert list(made.relay.environments) == ["id-alpha", "id-alpha/north"]


async def test_no_key_is_logged(caplog):
    """Lines show the last four characters."""
    caplog.set_level("DEBUG")
    async with configured() as made:
        await made.stream.send(environments.put(description()))
        await made.stream.send(environments.patch(description("alpha", 2, 2, mobKey="mob-new-key")))
        await made.stream.send(environments.delete("alpha", 3))
    for key in ("sdk-alpha-1", "sdk-alpha-2", "mob-alpha-key", "mob-new-key"):
        assert key not in caplog.text
    for line in ("Added environment id-alpha (Project Alpha)", "Removed environment id-alpha"):
        assert f"AutoConfiguration {line}" in caplog.text
    assert "New primary SDK key is ...ha-2" in caplog.text


async def test_a_variant_has_the_keys_that_its_environment_kept():
    """A description without a key leaves the former one, for variants that come later as well."""
    async with configured() as made:
        await made.stream.send(environments.put(description()))
        await made.stream.send(environments.patch(description("alpha", 2, sdkKey={})))
        await made.stream.send(environments.patch_filter("f1", FILTER))
        assert made.opened(SDK, "sdk-alpha-1", "north") == "id-alpha/north"


@pytest.mark.parametrize("message", [environments.put(), environments.put(description())])
async def test_one_shot_mode_waits_for_the_list(message):
    """Without a list in time it has failed."""
    async with configured() as made:
        waiting = asyncio.create_task(made.relay.wait_until_synced())
        await made.stream.send(message)
        assert await waiting is (message == environments.put())
    assert not await Configured().relay.wait_until_synced()


async def test_a_stored_list_is_served_until_launchdarkly_delivers():
    """It opens its environments at once, but is not the list: of others nothing is known."""
    store = ScriptedStore(stored(description(), description("beta"), f=payload_filter("north")))
    async with configured(store) as made:
        await until(lambda: len(made.relay.environments) == 4)
        assert made.opened(SDK, "sdk-alpha-1") == "id-alpha"
        assert made.opened(MOBILE, "mob-beta-key", "north") == "id-beta/north"
        assert not made.relay.knows_environments
        assert not made.directory.connection.has_data
        assert made.directory.connection.data_age == pytest.approx(clock.unix() - 1000, abs=5)
        assert not store.written, "nobody has confirmed it"
        before = dict(made.relay.environments)
        await made.stream.send(
            environments.put(description(), description("beta"), filters={"f": FILTER})
        )
        assert made.relay.knows_environments
        assert made.relay.environments == before
        assert all(made.relay.environments[name] is before[name] for name in before)
        assert made.directory.changes == {DirectoryChange.ADDED: 4}
        assert made.directory.connection.data_age == pytest.approx(0, abs=5)
        await until(lambda: store.written)
        assert store.written[-1].environments == store.content.environments
        assert store.written[-1].filters == store.content.filters
        assert store.written[-1].confirmed == pytest.approx(clock.unix(), abs=5)


async def test_the_first_list_outranks_the_stored_one():
    """Whatever versions it has: what differs is changed, and what is not in it is removed."""
    store = ScriptedStore(
        stored(
            description("alpha", 9, envName="Old"),
            description("beta", 9),
            description("gamma", 9),
            f=payload_filter("north", 9),
            g=payload_filter("south", 9),
        )
    )
    async with configured(store) as made:
        await until(lambda: len(made.relay.environments) == 9)
        alpha = made.relay.environments["id-alpha"]
        message = environments.put(
            description("alpha", 2, 2),
            description("gamma", 2),
            filters={"f": payload_filter("west", 2)},
        )
        await made.stream.send(message)
        names = ["id-alpha", "id-alpha/west", "id-gamma", "id-gamma/west"]
        assert sorted(made.relay.environments) == names
        assert made.relay.environments["id-alpha"] is alpha
        assert alpha.spec.title == "Project Alpha"
        assert made.opened(SDK, "sdk-alpha-1") == made.opened(SDK, "sdk-beta-1") == ""
        assert made.opened(SDK, "sdk-alpha-2") == "id-alpha"
        await made.stream.send(environments.patch(description("alpha", 2, 3)))
        assert made.opened(SDK, "sdk-alpha-2") == "id-alpha", "from now on versions count"
        await made.stream.send(environments.patch(description("alpha", 3, 3)))
        assert made.opened(SDK, "sdk-alpha-3") == "id-alpha"


async def test_a_patch_before_the_list_changes_what_is_stored():
    """By the versions of that; the rest is served on, and nothing can be called unknown yet."""
    store = ScriptedStore(stored(description("alpha", 2), description("beta", 2)))
    async with configured(store) as made:
        await until(lambda: len(made.relay.environments) == 2)
        await made.stream.send(environments.patch(description("alpha", 2, 2)))
        assert made.opened(SDK, "sdk-alpha-1") == "id-alpha"
        await made.stream.send(environments.patch(description("alpha", 3, 2)))
        await made.stream.send(environments.patch(description("gamma")))
        await made.stream.send(environments.delete("beta", 3))
        assert made.opened(SDK, "sdk-alpha-2") == "id-alpha"
        assert sorted(made.relay.environments) == ["id-alpha", "id-gamma"]
        assert not made.relay.knows_environments
        assert not store.written, "it is not the list"


async def test_the_newer_of_two_stored_lists_is_served():
    """Whichever is read first; one of unknown age counts as old."""
    old, new = (ScriptedStore(stored(description(n), confirmed=t)) for n, t in (("a", 5), ("b", 6)))
    unknown = ScriptedStore(stored(description("c"), confirmed=None))
    for store in (old, new, unknown):
        store.readable.clear()
    async with configured(unknown, old, new) as made:
        for store, name in ((unknown, "id-c"), (new, "id-b")):
            store.readable.set()
            await until(lambda name=name: list(made.relay.environments) == [name])
        old.readable.set()
        await asyncio.sleep(0.02)
        assert list(made.relay.environments) == ["id-b"]


async def test_a_stored_list_that_comes_late_is_not_served():
    """LaunchDarkly has said what there is."""
    store = ScriptedStore(stored(description("beta")))
    store.readable.clear()
    async with configured(store) as made:
        await made.stream.send(environments.put(description()))
        store.readable.set()
        await until(lambda: store.written)
        assert list(made.relay.environments) == ["id-alpha"]


async def test_each_change_is_stored():
    """With the keys as they are: also those of which the latest message says nothing."""
    store = ScriptedStore()
    async with configured(store) as made:
        await made.stream.send(environments.patch(description()))
        await made.stream.send(environments.put(description(), description("beta")))
        await until(lambda: store.written)
        expiring = {"value": "sdk-alpha-1", "timestamp": FAR}
        key = {"value": "sdk-alpha-2", "expiring": expiring}
        await made.stream.send(environments.patch(description("alpha", 2, sdkKey=key)))
        await made.stream.send(environments.patch(description("alpha", 3, 2, mobKey="")))
        await made.stream.send(environments.delete("beta", 2))
        await made.stream.send(environments.patch_filter("f", FILTER))
        await until(lambda: bool(store.written[-1].filters))
        written = store.written[-1]
    assert list(written.environments) == ["id-alpha"]
    async with configured(ScriptedStore(written)) as again:
        await until(lambda: len(again.relay.environments) == 2)
        for opens in ("sdk-alpha-1", "sdk-alpha-2"):
            assert again.opened(SDK, opens) == again.opened(SDK, opens, "north")[:8] == "id-alpha"
        assert again.opened(MOBILE, "mob-alpha-key") == "id-alpha"


async def test_expired_keys_of_a_stored_list_open_nothing():
    """Their time has run on while the relay did not."""
    old = {"value": "sdk-alpha-1", "timestamp": int((clock.now() - 1) * 1000)}
    key = {"value": "sdk-alpha-2", "expiring": old}
    async with configured(ScriptedStore(stored(description(sdkKey=key)))) as made:
        await until(lambda: bool(made.relay.environments))
        assert made.opened(SDK, "sdk-alpha-1") == ""
        assert made.opened(SDK, "sdk-alpha-2") == "id-alpha"


async def test_a_quiet_list_is_stored_from_time_to_time(monkeypatch):
    """So that its age is known after a restart."""
    store = ScriptedStore()
    async with configured(store) as made:
        await made.stream.send(environments.put(description()))
        await until(lambda: len(store.written) == 1)
        await made.stream.give(UpToDate())
        await asyncio.sleep(0.02)
        assert len(store.written) == 1
        monkeypatch.setattr("relay.autoconfig.CONFIRM_EVERY", 0.0)
        await made.stream.give(UpToDate())
        await until(lambda: len(store.written) == 2)
        assert store.written[1].environments == store.written[0].environments


async def test_an_unexpected_error_of_a_store_affects_nothing_else(monkeypatch, caplog):
    """LaunchDarkly's list is followed, and stored as soon as that works."""
    monkeypatch.setattr("relay.autoconfig.RESTART_DELAY", 0.01)
    store = ScriptedStore()
    store.broken = True
    async with configured(store) as made:
        await made.stream.send(environments.put(description()))
        assert list(made.relay.environments) == ["id-alpha"]
        await until(lambda: "failed to be stored" in caplog.text)
        assert "failed to be read" in caplog.text
        store.broken = False
        await until(lambda: bool(store.written))
        await made.stream.send(environments.put(description("beta")))
        assert list(made.relay.environments) == ["id-beta"]


async def test_one_shot_mode_does_not_take_a_stored_list_for_the_list():
    """It waits for LaunchDarkly's, and fails without it."""
    async with configured(ScriptedStore(stored(description()))) as made:
        await until(lambda: bool(made.relay.environments))
        assert not await made.relay.wait_until_synced()
