"""LaunchDarkly's client-side SDKs, unmodified, on the relay's streams: pings, and evaluated flags."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import data
from tests.support.clients import CLIENTS, Client, client
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
EVERYTHING = [
    flag("lamp", value="on", **OPEN),
    flag("for-crowd", **OPEN)
    | {"variations": ["crowd", "others"], "fallthrough": {"variation": 1}}
    | {"rules": [{"variation": 0, "clauses": IN_CROWD}]},
    flag("needs-lamp", prerequisites=[{"key": "lamp", "variation": 0}], **OPEN)
    | {"variations": ["lit", "dark"]},
    segment(included=["ben"]),
]


@dataclass
class Site:
    """A relay in production, and the upstream that feeds it."""

    upstream: ScriptedUpstream
    relay: RelayProcess
    folder: Path

    async def send(self, message: bytes) -> None:
        await self.upstream.raw(SDK_KEY, message)

    def client(self, name: str, proof: str = ""):
        key = MOBILE_KEY if name == "react-native" else ENVIRONMENT_ID
        return client(name, key, self.relay.url, ANNA, self.folder, proof=proof)


@pytest.fixture(name="site", params=["pings", "evaluated"])
async def a_site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Site, None]:
    """A relay whose streams are of one or the other kind."""
    async with running(tmp_path, EVAL_STREAMS=str(request.param == "evaluated").lower()) as site:
        yield site


@asynccontextmanager
async def running(folder: Path, **variables: str) -> AsyncGenerator[Site, None]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, data.all_data(*EVERYTHING))
        variables |= {"LD_ENV_main": SDK_KEY, "LD_MOBILE_KEY_main": MOBILE_KEY}
        variables |= {"LD_CLIENT_SIDE_ID_main": ENVIRONMENT_ID, "STREAM_URI": upstream.url}
        async with RelayProcess(folder, **variables) as relay:
            await upstream.connected(SDK_KEY)
            yield Site(upstream, relay, folder)


async def shows(sdk: Client, **values: object) -> None:
    """Wait until an SDK has these values."""
    for key, value in values.items():
        await sees(sdk, key.replace("_", "-"), value)


@pytest.mark.parametrize("name", CLIENTS)
async def test_a_client_follows_everything_that_changes(name: str, site: Site):
    """Flag, segment alone, prerequisite, delete, new flag; then another context, and its changes."""
    async with site.client(name) as sdk:
        await sdk.ready()
        await shows(sdk, lamp="on", for_crowd="others", needs_lamp="lit")
        await site.send(data.patch(flag("lamp", 2, value="off", **OPEN)))
        await shows(sdk, lamp="off")
        await site.send(data.patch(segment(version=2, included=["anna"])))
        await shows(sdk, for_crowd="crowd")
        await site.send(data.patch(flag("lamp", 3, value="off", on=False, **OPEN)))
        await shows(sdk, needs_lamp="dark", lamp="(none)")
        await site.send(data.patch(segment(version=3, included=["ben"])))
        await shows(sdk, for_crowd="others")
        await site.send(data.delete("/flags/lamp", 4))
        await shows(sdk, lamp="(none)")
        await site.send(data.patch(flag("new", value="here", **OPEN)))
        await shows(sdk, new="here")
        await site.send(data.patch(flag("lamp", 5, value="again", **OPEN)))
        await shows(sdk, lamp="again", needs_lamp="lit")

        await sdk.identify(BEN)
        await shows(sdk, for_crowd="crowd", lamp="again", new="here")
        await site.send(data.patch(segment(version=4)))
        await shows(sdk, for_crowd="others")
        await site.send(data.patch(flag("lamp", 6, value="last", **OPEN)))
        await shows(sdk, lamp="last")


@pytest.mark.parametrize("name", CLIENTS)
async def test_a_client_comes_back_to_a_relay_that_was_restarted(name: str, site: Site):
    """It gets what changed meanwhile, and every change from then on."""
    async with site.client(name) as sdk:
        await sdk.ready()
        await shows(sdk, lamp="on")
        for version in range(2, 6):
            await site.send(data.patch(segment(version=version, included=["anna"] * (version % 2))))
        await shows(sdk, for_crowd="crowd")
        await site.relay.kill()
        changed = [flag("lamp", 2, value="off", **OPEN), *EVERYTHING[1:]]
        site.upstream.serve(SDK_KEY, data.all_data(*changed))
        await site.relay.start()
        await shows(sdk, lamp="off", for_crowd="others")
        await site.send(data.patch(segment(version=2, included=["anna"])))
        await shows(sdk, for_crowd="crowd")
        await site.send(data.patch(flag("lamp", 3, value="on", **OPEN)))
        await shows(sdk, lamp="on")


@pytest.mark.parametrize("name", ["client", "v3", "v4"])
@pytest.mark.parametrize("evaluated", ["true", "false"])
async def test_secure_mode(name: str, evaluated: str, tmp_path: Path):
    """The right hash opens everything; without it nothing is told."""
    variables = {"LD_SECURE_MODE_main": "true", "LD_EVAL_STREAMS_main": evaluated}
    async with running(tmp_path, **variables) as site:
        proof = hmac.new(SDK_KEY.encode(), b"anna", hashlib.sha256).hexdigest()
        async with site.client(name, proof) as sdk:
            await sdk.ready()
            await shows(sdk, lamp="on")
            await site.send(data.patch(flag("lamp", 2, value="off", **OPEN)))
            await shows(sdk, lamp="off")
        async with site.client(name, "0" * 64) as sdk:
            with pytest.raises((SDKFailed, TimeoutError)):
                async with asyncio.timeout(8):
                    await sdk.ready()
            assert await sdk.value("lamp", fallback="(none)") == "(none)"
