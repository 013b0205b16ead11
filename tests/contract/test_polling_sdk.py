"""LaunchDarkly's SDKs, unmodified, that poll, and those that ask by the newer protocol first."""

from __future__ import annotations

import pytest

from relay.protocol import fdv1
from tests.support.data import all_data, flag
from tests.support.sdk import Setup, install_packages, make
from tests.support.serving import SDK_KEY, Served, ask, serving

pytestmark = pytest.mark.sdk


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    """What the Node SDKs need, installed on first use."""
    install_packages()


async def deliver(served: Served, *flags: dict) -> None:
    changes = fdv1.parse("put", f'{{"path":"/","data":{all_data(*flags)}}}'.encode())
    assert changes is not None
    await served.source.give(changes)


@pytest.mark.parametrize("name", ["python", "node9", "node7"])
async def test_an_sdk_in_polling_mode_initialises(name: str):
    """Polling mode asks `/sdk/latest-all`, which the reference does not have."""
    served = Served()
    async with serving(served) as address:
        await deliver(served, flag("lamp", value="on"))
        setup = Setup(SDK_KEY, f"http://localhost:{address.port}", stream=False)
        async with make(name, setup) as sdk:
            await sdk.ready()
            assert await sdk.value("lamp") == "on"
    assert len(served.hub) == 0


@pytest.mark.parametrize("name", ["python", "node9"])
async def test_an_sdk_of_the_newer_protocol_works_by_the_older(name: str):
    """The refusal of FDv2 says where to go, and the SDK goes there at once."""
    served = Served()
    async with serving(served) as address:
        await deliver(served, flag("lamp", value="on"))
        setup = Setup(SDK_KEY, f"http://localhost:{address.port}", fdv2=True)
        async with make(name, setup) as sdk:
            await sdk.ready()
            assert await sdk.value("lamp") == "on"
        key = [("Authorization", SDK_KEY)]
        assert (await ask(address, "/sdk/poll", key)).headers["x-ld-fd-fallback"] == "true"
    routes = {series.route: count.value for series, count in served.traffic.requests.items()}
    assert routes["/sdk/poll"] + routes.get("/sdk/stream", 0) >= 2
    assert routes["/sdk/latest-all"] >= 1
