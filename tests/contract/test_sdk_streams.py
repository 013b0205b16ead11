"""LaunchDarkly's SDKs, unmodified: on a scripted LaunchDarkly, and on the relay's own server."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from relay.protocol import fdv1
from tests.support import data
from tests.support.data import flag, segment
from tests.support.sdk import (
    ANNA,
    EVERYTHING,
    SDKS,
    SDKFailed,
    Setup,
    evaluates_everything,
    make,
    sees,
)
from tests.support.serving import SDK_KEY, Served, serving, until
from tests.support.upstream import ScriptedUpstream, status

pytestmark = [pytest.mark.sdk, pytest.mark.usefixtures("packages")]
UNKNOWN = "sdk-5ca1ab1e-0002-4000-8000-00000000a002"


class OnUpstream:
    """A scripted LaunchDarkly: shows that the tests ask for what LaunchDarkly does."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self._upstream = upstream
        self.url = upstream.url

    async def send(self, message: bytes) -> None:
        await self._upstream.raw(SDK_KEY, message)


class OnRelay:
    """The relay's server, whose source yields what LaunchDarkly would send."""

    def __init__(self, served: Served, url: str) -> None:
        self._served = served
        self.url = url

    async def send(self, message: bytes) -> None:
        event, text = (line.split(b": ", 1)[1] for line in message.strip().split(b"\n"))
        changes = fdv1.parse(event.decode(), text)
        assert changes is not None
        await self._served.source.give(changes)


@pytest.fixture(name="origin", params=["upstream", "relay"])
async def an_origin(request: pytest.FixtureRequest) -> AsyncIterator[OnUpstream | OnRelay]:
    """Something that serves `EVERYTHING` to SDKs."""
    text = data.all_data(*EVERYTHING)
    async with AsyncExitStack() as stack:
        if request.param == "upstream":
            upstream = await stack.enter_async_context(ScriptedUpstream())
            upstream.serve(SDK_KEY, text)
            yield OnUpstream(upstream)
            return
        served = Served()
        address = await stack.enter_async_context(serving(served))
        origin = OnRelay(served, f"http://localhost:{address.port}")
        await origin.send(data.put(text))
        yield origin


@pytest.mark.parametrize("name", SDKS)
async def test_an_sdk_evaluates_and_follows_changes(name: str, origin: OnUpstream | OnRelay):
    """Values arrive unharmed, a change and a delete are seen, and so is a new flag."""
    async with make(name, Setup(SDK_KEY, origin.url)) as sdk:
        await sdk.ready()
        await evaluates_everything(sdk)

        await origin.send(data.patch(flag("lamp", 2, value="off")))
        await sees(sdk, "lamp", "off")
        await origin.send(data.patch(segment("crowd", 2, included=["somebody"])))
        await sees(sdk, "for-crowd", "others", ANNA)
        await origin.send(data.delete("/flags/lamp", 3))
        await sees(sdk, "lamp", "(none)")
        await origin.send(data.patch(flag("new", value="here")))
        await sees(sdk, "new", "here")
        assert await sdk.value("text") == EVERYTHING[1]["variations"][0]


@pytest.mark.parametrize("name", ["node9", "node7"])
async def test_an_unknown_key_makes_a_node_sdk_give_up(name: str, origin: OnUpstream | OnRelay):
    """A 401 is final for Node SDKs: they must get it for unknown keys only."""
    async with make(name, Setup(UNKNOWN, origin.url)) as sdk:
        with pytest.raises(SDKFailed):
            await sdk.ready()


@pytest.mark.parametrize("name", SDKS)
async def test_an_sdk_that_connects_before_the_relay_has_data_gets_them_later(name: str):
    """The stream is open at once and silent; the SDK initialises when data come."""
    served = Served()
    async with serving(served) as address:
        origin = OnRelay(served, f"http://localhost:{address.port}")
        async with make(name, Setup(SDK_KEY, origin.url)) as sdk:
            await until(lambda: len(served.hub) == 1)
            assert await sdk.value("lamp", fallback="fallback") == "fallback"
            await origin.send(data.put(data.all_data(*EVERYTHING)))
            await sdk.ready()
            assert await sdk.value("lamp") == "on"


@pytest.mark.parametrize("name", SDKS)
async def test_an_sdk_that_is_answered_503_keeps_trying(name: str):
    """Two refusals for now, then data: the SDK initialises."""
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, data.all_data(*EVERYTHING))
        upstream.script(SDK_KEY, status(503), status(503))
        async with make(name, Setup(SDK_KEY, upstream.url)) as sdk:
            await sdk.ready()
            assert await sdk.value("lamp") == "on"
        assert len(upstream.requests) == 3


@pytest.mark.parametrize("name", ["python", "node9"])
async def test_an_openfeature_provider_follows_changes(name: str, origin: OnUpstream | OnRelay):
    """Applications that speak OpenFeature see the same flags."""
    async with make(name, Setup(SDK_KEY, origin.url, openfeature=True)) as sdk:
        assert await sdk.value("lamp", fallback="fallback") == "on"
        await origin.send(data.patch(flag("lamp", 2, value="off")))
        await sees(sdk, "lamp", "off")
