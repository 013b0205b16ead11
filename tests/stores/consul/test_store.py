"""The Consul store has the layout that SDKs read, keeps Consul's limits, and says what is wrong."""

from __future__ import annotations

import pytest

from tests.stores.contract import StoreContract
from tests.support.consul import ConsulAgent, ConsulServer, store_in


@pytest.fixture(scope="module")
def agent():
    if ConsulAgent.binary is None:
        pytest.skip("there is no binary of Consul; its emulation is tested")
    with ConsulAgent() as agent:
        yield agent


@pytest.fixture
async def server():
    """An empty, working server."""
    async with ConsulServer() as server:
        yield server


@pytest.fixture
async def store(server):
    store = store_in(server.address)
    yield store
    await store.aclose()


class TestContract(StoreContract):
    """The contract of all data stores."""


class TestContractWithConsul(StoreContract):
    """The same with Consul itself, where it is installed."""

    @pytest.fixture
    async def store(self, agent):
        agent.empty()
        store = store_in(agent.address)
        yield store
        await store.aclose()
