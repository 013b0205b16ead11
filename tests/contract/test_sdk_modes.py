"""LaunchDarkly's SDKs, unmodified, on the relay as people run it: a process with its variables.

Streaming, polling, daemon mode, and configured for FDv2; only LaunchDarkly is scripted.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
)
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import pytest
import trustme

from tests.support import data
from tests.support.data import flag, segment
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.sdk import (
    ANNA,
    EVERYTHING,
    FDV2_SDKS,
    OLDER_FDV2_SDKS,
    SDK,
    SDKS,
    Setup,
    evaluates_everything,
    make,
    sees,
)
from tests.support.serving import SDK_KEY
from tests.support.upstream import ScriptedUpstream

pytestmark = [pytest.mark.sdk, pytest.mark.usefixtures("packages")]
POLL_INTERVAL = 0.1
SDK_INSTANCES = 50
ENVIRONMENTS = 100
ASKED = {"streaming": "/all ", "polling": "/sdk/latest-all", "fdv2": "/sdk/stream"}
ASKED |= {"fdv2-streaming": "/sdk/stream", "fdv2-polling": "/sdk/poll"}
"""Where SDKs get their data, in the log."""
FDV2 = {"fdv2": "default", "fdv2-streaming": "streaming", "fdv2-polling": "polling"}
MODES = ["streaming", "polling", "daemon", *FDV2]
GIVES_UP = {
    ("fdv2-polling", name) for name in (*FDV2_SDKS, *OLDER_FDV2_SDKS) if name.startswith("python")
}
"""SDKs that never poll again after one connection was refused, whoever is asked."""
SETTINGS = {"GRACEFUL_SHUTDOWN_TIMEOUT": "1s", "INIT_TIMEOUT": "60s", "LOG_LEVEL": "debug"}
"""Streams end within a second, stored data must not wait for LaunchDarkly, requests are seen."""


class LaunchDarkly:
    """One environment of a scripted LaunchDarkly, which remembers what was changed."""

    def __init__(self, upstream: ScriptedUpstream, key: str, *items: dict) -> None:
        self._upstream = upstream
        self._key = key
        self._items = {item["key"]: item for item in items}
        self._serve()

    async def change(self, *items: dict) -> None:
        """Change items, or add them, for those who are connected and those who come."""
        self._items |= {item["key"]: item for item in items}
        self._serve()
        for item in items:
            await self._upstream.patch(self._key, item)

    async def delete_flag(self, key: str, version: int) -> None:
        """Delete a flag."""
        del self._items[key]
        self._serve()
        await self._upstream.delete(self._key, f"/flags/{key}", version)

    def _serve(self) -> None:
        self._upstream.serve(self._key, data.all_data(*self._items.values()))


class Fleet:
    """SDKs of all languages, started side by side.

    Args:
        setups: of each, by a name that begins with the SDK's.
    """

    def __init__(self, setups: Mapping[str, Setup]) -> None:
        self.sdks = {name: make(name.split()[0], setup) for name, setup in setups.items()}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self.each(self._stack.enter_async_context)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def each(self, see: Callable[[SDK], Awaitable[object]]) -> None:
        """See something of each SDK; a failure names it."""
        async with asyncio.TaskGroup() as tasks:
            for name, sdk in self.sdks.items():
                tasks.create_task(_named(name, see(sdk)))

    async def ready(self) -> None:
        """Wait until all have initialised."""
        await self.each(lambda sdk: sdk.ready())

    async def see(self, key: str, value: str, context: dict = ANNA) -> None:
        """Wait until all evaluate a flag to `value`."""
        await self.each(lambda sdk: sees(sdk, key, value, context))

    async def evaluate_everything(self) -> None:
        """See that all have `EVERYTHING`."""
        for name, sdk in self.sdks.items():
            await _named(name, evaluates_everything(sdk, texts_only="OpenFeature" in name))


async def _named(name: str, see: Awaitable[object]) -> None:
    try:
        await see
    except Exception as e:
        e.add_note(f"The SDK is {name}")
        raise


@dataclass
class Deployment:
    """LaunchDarkly, a relay, and SDKs in one mode."""

    mode: str
    upstream: ScriptedUpstream
    relay: RelayProcess
    launchdarkly: LaunchDarkly
    redis: str
    older: bool = False
    """True for SDKs of older releases."""

    def fleet(self, but: Collection[tuple[str, str]] = (), *, openfeature: bool = False) -> Fleet:
        """The SDKs that know this mode; on demand, OpenFeature providers as well."""
        names = FDV2_SDKS if self.mode in FDV2 else SDKS
        if self.older:
            names = OLDER_FDV2_SDKS
        setups = {name: self._setup() for name in names if (self.mode, name) not in but}
        if openfeature and not self.older:
            for name in ("python", "node9"):
                setups[f"{name} with OpenFeature"] = self._setup(openfeature=True)
        return Fleet(setups)

    def _setup(self, *, openfeature: bool = False) -> Setup:
        return setup(self.mode, self.relay, self.redis, openfeature=openfeature)


def setup(mode: str, relay: RelayProcess, redis: str = "", *, openfeature: bool = False) -> Setup:
    """Setup that points an SDK at a relay, or at the database that the relay writes."""
    if mode == "daemon":
        return Setup(SDK_KEY, redis=redis, openfeature=openfeature)
    return Setup(
        SDK_KEY,
        relay.url,
        stream=mode != "polling",
        poll_interval=POLL_INTERVAL,
        fdv2=FDV2.get(mode, ""),
        openfeature=openfeature,
    )


def make_relay(folder: Path, upstream: ScriptedUpstream, **variables: str) -> RelayProcess:
    """A relay of this upstream, not yet started."""
    addresses = {"STREAM_URI": upstream.url, "BASE_URI": upstream.url}
    return RelayProcess(folder, **addresses, **SETTINGS, **variables)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RedisServer]:
    """A database."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def database(server: RedisServer) -> str:
    """The URL of an empty database."""
    server.do("FLUSHALL")
    return server.url


@pytest.fixture(params=[*MODES, *(f"{mode} of older SDKs" for mode in FDV2)])
async def deployment(request, tmp_path, database) -> AsyncIterator[Deployment]:
    """One for each mode; LaunchDarkly has `EVERYTHING`, and the relay is not yet started."""
    mode, _, older = request.param.partition(" of older")
    if older:
        request.getfixturevalue("older_python")
    async with deployed(mode, tmp_path, database) as made:
        made.older = bool(older)
        yield made


@asynccontextmanager
async def deployed(mode: str, folder: Path, redis: str) -> AsyncGenerator[Deployment]:
    stores = {"USE_REDIS": "true", "REDIS_URL": redis} if mode == "daemon" else {}
    async with ScriptedUpstream() as upstream:
        launchdarkly = LaunchDarkly(upstream, SDK_KEY, *EVERYTHING)
        relay = make_relay(folder, upstream, LD_ENV_main=SDK_KEY, **stores)
        yield Deployment(mode, upstream, relay, launchdarkly, redis)


async def test_sdks_evaluate_and_follow_changes(deployment: Deployment):
    """Values arrive unharmed; a change, a delete and a new flag are seen."""
    launchdarkly = deployment.launchdarkly
    async with deployment.relay, deployment.fleet(openfeature=True) as fleet:
        await fleet.ready()
        await fleet.see("lamp", "on")
        await fleet.evaluate_everything()

        await launchdarkly.change(flag("lamp", 2, value="off"), segment("crowd", 2))
        await fleet.see("lamp", "off")
        await fleet.see("for-crowd", "others")
        await launchdarkly.change(segment("crowd", 3, included=["anna"]))
        await fleet.see("for-crowd", "crowd")
        await launchdarkly.delete_flag("lamp", 3)
        await fleet.see("lamp", "(none)")
        await launchdarkly.change(flag("lamp", 4, value="again"))
        await fleet.see("lamp", "again")
        await launchdarkly.change(flag("new", value="here"))
        await fleet.see("new", "here")


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_sdks_survive_a_restart_of_the_relay(deployment: Deployment, end: str):
    """Values stay while there is no relay; what was changed meanwhile is seen afterwards."""
    async with deployment.relay as relay, deployment.fleet(GIVES_UP) as fleet:
        await fleet.see("lamp", "on")
        if end == "stop":
            assert await relay.stop() == 0
        else:
            await relay.kill()
        await fleet.evaluate_everything()
        await deployment.launchdarkly.change(flag("lamp", 2, value="off"))
        await relay.start()
        await fleet.see("lamp", "off")


async def test_sdks_survive_an_outage_of_launchdarkly(deployment: Deployment):
    """Values stay, new SDKs initialise, and changes arrive when it is over."""
    upstream, launchdarkly = deployment.upstream, deployment.launchdarkly
    async with deployment.relay, deployment.fleet() as fleet:
        await fleet.see("lamp", "on")
        await upstream.stop()
        async with deployment.fleet() as newcomers:
            await newcomers.ready()
            await newcomers.evaluate_everything()
            await fleet.evaluate_everything()
            await launchdarkly.change(flag("lamp", 2, value="off"))
            await upstream.start()
            await newcomers.see("lamp", "off")
            await fleet.see("lamp", "off")


async def test_sdks_that_come_before_there_are_data_get_them_later(deployment: Deployment):
    """An SDK is not refused while the relay waits for LaunchDarkly; it initialises when data come."""
    await deployment.upstream.stop()
    async with deployment.relay as relay, deployment.fleet() as fleet:
        await fleet.each(has_no_values)
        if deployment.mode in ASKED:
            await relay.said(f"url={ASKED[deployment.mode]}", times=len(fleet.sdks))
        await deployment.upstream.start()
        await fleet.ready()
        await fleet.see("lamp", "on")


async def has_no_values(sdk: SDK) -> None:
    assert await sdk.value("lamp", fallback="fallback") == "fallback"


@pytest.mark.parametrize("mode", ["streaming", "polling"])
@pytest.mark.parametrize("store", ["database", "snapshot"])
async def test_stored_data_are_served_while_launchdarkly_is_away(
    mode: str, store: str, tmp_path: Path, database: str
):
    """A relay that starts alone serves what it has stored, at once; later what LaunchDarkly has."""
    stores = {
        "database": {"USE_REDIS": "true", "REDIS_URL": database},
        "snapshot": {"SNAPSHOT_DIR": str(tmp_path / "snapshots")},
    }
    async with ScriptedUpstream() as upstream:
        launchdarkly = LaunchDarkly(upstream, SDK_KEY, *EVERYTHING)
        relay = make_relay(tmp_path, upstream, LD_ENV_main=SDK_KEY, **stores[store])
        async with relay:
            await relay.said("Initialized LaunchDarkly client")
            await relay.stop()
            await upstream.stop()
            await relay.start()
            async with Deployment(mode, upstream, relay, launchdarkly, "").fleet() as fleet:
                await fleet.ready()
                await fleet.evaluate_everything()
                await launchdarkly.change(flag("lamp", 2, value="off"))
                await upstream.start()
                await fleet.see("lamp", "off")


@pytest.mark.parametrize("mode", ["streaming", "polling"])
async def test_sdks_trust_the_certificate_of_the_relay(mode: str, tmp_path: Path):
    """Over TLS everything is the same, for SDKs that trust the authority."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(files["ca"])
    issued.cert_chain_pems[0].write_to_path(files["cert"])
    issued.private_key_pem.write_to_path(files["key"])
    tls = {"TLS_ENABLED": "true", "TLS_CERT": str(files["cert"]), "TLS_KEY": str(files["key"])}
    async with ScriptedUpstream() as upstream:
        launchdarkly = LaunchDarkly(upstream, SDK_KEY, *EVERYTHING)
        async with make_relay(tmp_path, upstream, LD_ENV_main=SDK_KEY, **tls) as relay:
            secure = replace(setup(mode, relay), ca=str(files["ca"]))
            async with Fleet(dict.fromkeys(SDKS, secure)) as fleet:
                await fleet.ready()
                await fleet.evaluate_everything()
                await launchdarkly.change(flag("lamp", 2, value="off"))
                await fleet.see("lamp", "off")


async def test_polls_cost_nothing_while_nothing_changes(tmp_path: Path):
    """Each SDK sends the ETag that it got, is answered 304, and keeps its values."""
    async with deployed("polling", tmp_path, "") as deployment, deployment.relay as relay:
        await relay.said("Initialized LaunchDarkly client")
        for name in SDKS:
            async with make(name, setup("polling", relay)) as sdk:
                await sdk.ready()
                await relay.said("status=304", times=relay.log.count("status=304") + 2)
                await evaluates_everything(sdk)
        assert relay.log.count("url=/sdk/latest-all auth=*0a001 status=200") == len(SDKS)


async def test_environments_share_a_database_by_prefix(tmp_path: Path, database: str):
    """SDKs in daemon mode see the environment whose prefix they are given."""
    prefixes = {"one": "prefix-one", "two": "prefix-two"}
    variables = {"USE_REDIS": "true", "REDIS_URL": database}
    async with ScriptedUpstream() as upstream, AsyncExitStack() as stack:
        for name, prefix in prefixes.items():
            LaunchDarkly(upstream, f"sdk-{name}", flag("lamp", value=name))
            variables |= {f"LD_ENV_{name}": f"sdk-{name}", f"LD_PREFIX_{name}": prefix}
        await stack.enter_async_context(make_relay(tmp_path, upstream, **variables))
        for name, prefix in prefixes.items():
            daemon = Setup(f"sdk-{name}", redis=database, prefix=prefix)
            fleet = await stack.enter_async_context(Fleet(dict.fromkeys(SDKS, daemon)))
            await fleet.see("lamp", name)


async def test_a_hundred_environments_in_one_relay(tmp_path: Path):
    """Each SDK key opens its own data, by a connection of its own, and sees its own changes."""
    keys = {f"python {n}": f"sdk-{n:04}" for n in range(ENVIRONMENTS)}
    async with ScriptedUpstream() as upstream:
        each = {
            name: LaunchDarkly(upstream, key, flag("whose", value=name))
            for name, key in keys.items()
        }
        variables = {f"LD_ENV_{n}": key for n, key in enumerate(keys.values())}
        relay = make_relay(tmp_path, upstream, **variables)
        setups = {name: Setup(key, relay.url) for name, key in keys.items()}
        async with relay, Fleet(setups) as fleet:
            await fleet.ready()
            for name, sdk in fleet.sdks.items():
                assert await sdk.value("whose") == name
            for name, launchdarkly in each.items():
                await launchdarkly.change(flag("whose", 2, value=f"{name}, changed"))
            for name, sdk in fleet.sdks.items():
                await sees(sdk, "whose", f"{name}, changed")
        asked = sorted(request.headers["Authorization"] for request in upstream.requests)
        assert asked == sorted(keys.values())


async def test_one_stream_from_launchdarkly_serves_a_fleet(tmp_path: Path):
    """However many SDKs there are, LaunchDarkly sees one connection, and all see the change."""
    async with ScriptedUpstream() as upstream:
        launchdarkly = LaunchDarkly(upstream, SDK_KEY, *EVERYTHING)
        async with make_relay(tmp_path, upstream, LD_ENV_main=SDK_KEY) as relay:
            setups = {f"python {n}": Setup(SDK_KEY, relay.url) for n in range(SDK_INSTANCES)}
            async with Fleet(setups | {"node9": Setup(SDK_KEY, relay.url)}) as fleet:
                await fleet.ready()
                await launchdarkly.change(flag("lamp", 2, value="off"))
                await fleet.see("lamp", "off")
    assert [request.path for request in upstream.requests] == ["/all"]
