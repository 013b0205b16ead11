"""LaunchDarkly's client-side SDKs, unmodified and configured for FDv2, in each of their modes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import data
from tests.support.clients import Client, client
from tests.support.data import flag, segment
from tests.support.process import RelayProcess
from tests.support.sdk import ANNA, SDKFailed, sees
from tests.support.serving import SDK_KEY
from tests.support.upstream import ScriptedUpstream

pytestmark = [pytest.mark.sdk, pytest.mark.usefixtures("packages"), pytest.mark.timeout(120)]
MOBILE_KEY, ENVIRONMENT_ID = "mob-1", "id-main"
BEN = {"kind": "user", "key": "ben"}
OPEN = {"clientSideAvailability": {"usingMobileKey": True, "usingEnvironmentId": True}}
IN_CROWD = [{"attribute": "", "op": "segmentMatch", "values": ["crowd"]}]
LAMP = flag("lamp", value="on", **OPEN)
EVERYTHING = [
    LAMP,
    flag("for-crowd", **OPEN)
    | {"variations": ["crowd", "others"], "fallthrough": {"variation": 1}}
    | {"rules": [{"variation": 0, "clauses": IN_CROWD}]},
    flag("needs-lamp", prerequisites=[{"key": "lamp", "variation": 0}], **OPEN)
    | {"variations": ["lit", "dark"]},
    *(flag(f"filler-{n}", value="x" * 100, **OPEN) for n in range(20)),
    segment(included=["ben"]),
]
FOLLOWING = [(name, mode) for name in ("v4", "react-native") for mode in ("streaming", "polling")]
"""SDKs, and modes in which these follow changes."""
SETTINGS = {"GRACEFUL_SHUTDOWN_TIMEOUT": "1s", "LOG_LEVEL": "debug"}


def data_system(mode: str) -> dict[str, Any]:
    """The option of the SDKs that chooses FDv2, and a mode."""
    polling = {"initializers": [{"type": "polling"}]}
    polling["synchronizers"] = [{"type": "polling", "pollInterval": 30}]
    return {
        "automaticModeSwitching": {"type": "manual", "initialConnectionMode": mode},
        "connectionModes": {"polling": polling},
    }


@dataclass
class Site:
    """A relay in production, and the upstream that feeds it."""

    upstream: ScriptedUpstream
    relay: RelayProcess
    folder: Path

    async def send(self, message: bytes) -> None:
        await self.upstream.raw(SDK_KEY, message)

    def client(self, name: str, mode: str, proof: str = "") -> AbstractAsyncContextManager[Client]:
        key = MOBILE_KEY if name == "react-native" else ENVIRONMENT_ID
        more = {"dataSystem": data_system(mode)} if mode else {"dataSystem": {}}
        return client(name, key, self.relay.url, ANNA, self.folder, proof=proof, **more)

    @property
    def asked(self) -> list[str]:
        """Requests to the relay, by its log."""
        return [line for line in self.relay.log.splitlines() if "url=/" in line]


@asynccontextmanager
async def running(folder: Path, **variables: str) -> AsyncGenerator[Site, None]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, data.all_data(*EVERYTHING))
        variables |= {"LD_ENV_main": SDK_KEY, "LD_MOBILE_KEY_main": MOBILE_KEY}
        variables |= {"LD_CLIENT_SIDE_ID_main": ENVIRONMENT_ID, "STREAM_URI": upstream.url}
        async with RelayProcess(folder, **SETTINGS, **variables) as relay:
            await upstream.connected(SDK_KEY)
            yield Site(upstream, relay, folder)


@pytest.fixture(name="site")
async def a_site(tmp_path: Path) -> AsyncGenerator[Site, None]:
    async with running(tmp_path) as site:
        yield site


async def shows(sdk: Client, **values: object) -> None:
    """Wait until an SDK has these values."""
    for key, value in values.items():
        await sees(sdk, key.replace("_", "-"), value)


@pytest.mark.parametrize(("name", "mode"), FOLLOWING)
@pytest.mark.parametrize("evaluated", ["true", "false"], ids=["evaluated", "pings"])
async def test_a_client_follows_everything_that_changes(
    name: str, mode: str, evaluated: str, tmp_path: Path
):
    """Flag, delete, re-creation, segment alone, prerequisite; then another context's changes."""
    if (mode, evaluated) == ("polling", "false"):
        return  # polls are the same with either kind of streams
    async with (
        running(tmp_path, EVAL_STREAMS=evaluated) as site,
        site.client(name, mode) as sdk,
    ):
        await sdk.ready()
        await shows(sdk, lamp="on", for_crowd="others", needs_lamp="lit")
        await site.send(data.patch(flag("lamp", 2, value="off", **OPEN)))
        await shows(sdk, lamp="off")
        await site.send(data.patch(segment(version=2, included=["anna"])))
        await shows(sdk, for_crowd="crowd")
        await site.send(data.patch(flag("lamp", 3, value="off", on=False, **OPEN)))
        await shows(sdk, needs_lamp="dark", lamp="(none)")
        await site.send(data.delete("/flags/lamp", 4))
        await shows(sdk, lamp="(none)")
        await site.send(data.patch(flag("lamp", 5, value="again", **OPEN)))
        await shows(sdk, lamp="again", needs_lamp="lit")
        # A flag that was deleted and created anew has a low version, as upstream sends everything.
        await site.send(data.delete("/flags/lamp", 6))
        await shows(sdk, lamp="(none)")
        await site.send(
            data.put(data.all_data(flag("lamp", 1, value="anew", **OPEN), *EVERYTHING[1:]))
        )
        await shows(sdk, lamp="anew", for_crowd="others")

        await sdk.identify(BEN)
        await shows(sdk, for_crowd="crowd", lamp="anew")
        await site.send(data.patch(segment(version=4)))
        await shows(sdk, for_crowd="others")
        assert not any("evalx" in line for line in site.asked)


@pytest.mark.parametrize(("name", "mode"), FOLLOWING)
async def test_a_client_comes_back_to_a_relay_that_was_restarted(name: str, mode: str, site: Site):
    """With the state of its data; it gets what changed meanwhile, and every change from then on."""
    async with site.client(name, mode) as sdk:
        await sdk.ready()
        await shows(sdk, lamp="on")
        await site.send(data.patch(segment(version=2, included=["anna"])))
        await shows(sdk, for_crowd="crowd")
        await site.relay.kill()
        await asyncio.sleep(0.5)  # it notices
        changed = [flag("lamp", 2, value="off", **OPEN), *EVERYTHING[1:]]
        site.upstream.serve(SDK_KEY, data.all_data(*changed))
        await site.relay.start()
        await shows(sdk, lamp="off", for_crowd="others")
        await site.send(data.patch(flag("lamp", 3, value="on", **OPEN)))
        await shows(sdk, lamp="on")


@pytest.mark.parametrize(("name", "mode"), FOLLOWING)
async def test_a_client_outlasts_an_outage_of_launchdarkly(name: str, mode: str, site: Site):
    """It keeps its values, and follows again when upstream is back."""
    async with site.client(name, mode) as sdk:
        await sdk.ready()
        await site.upstream.stop()
        await shows(sdk, lamp="on")
        site.upstream.serve(
            SDK_KEY, data.all_data(flag("lamp", 2, value="off", **OPEN), *EVERYTHING[1:])
        )
        await site.upstream.start()
        await shows(sdk, lamp="off")


async def test_a_page_that_asks_once_has_its_flags(site: Site):
    """The browser SDK's default: a poll, and a stream that ends with its first transfer."""
    async with site.client("v4", "") as sdk:
        await sdk.ready()
        await shows(sdk, lamp="on", for_crowd="others")
        await site.send(data.patch(segment(version=2)))
        await sdk.identify(BEN)
        await shows(sdk, for_crowd="others", lamp="on")
        assert any("/sdk/poll/eval" in line for line in site.asked)
        assert not any("evalx" in line for line in site.asked)


@pytest.mark.parametrize("mode", ["streaming", "polling", ""])
async def test_secure_mode(mode: str, tmp_path: Path):
    """The right hash opens everything; without it nothing is told."""
    async with running(tmp_path, LD_SECURE_MODE_main="true") as site:
        proof = hmac.new(SDK_KEY.encode(), b"anna", hashlib.sha256).hexdigest()
        async with site.client("v4", mode, proof) as sdk:
            await sdk.ready()
            await shows(sdk, lamp="on")
        async with site.client("v4", mode, "0" * 64) as sdk:
            with pytest.raises(SDKFailed):  # after five seconds, by the SDK's own clock
                await sdk.ready()
            assert await sdk.value("lamp", fallback="(none)") == "(none)"


@pytest.mark.parametrize(("name", "mode"), [*FOLLOWING, ("v4", "")])
async def test_clients_can_be_led_to_fdv1(name: str, mode: str, tmp_path: Path):
    """And return when FDv2 is on again and they start anew."""
    async with running(tmp_path, FDV1_FALLBACK="true") as site:
        async with site.client(name, mode) as sdk:
            await sdk.ready()
            await shows(sdk, lamp="on", for_crowd="others")
            assert any("evalx" in line for line in site.asked)
        await site.relay.stop()
    again = tmp_path / "again"
    again.mkdir()
    async with running(again) as site, site.client(name, mode) as sdk:
        await sdk.ready()
        await shows(sdk, lamp="on")
        assert not any("evalx" in line for line in site.asked)
