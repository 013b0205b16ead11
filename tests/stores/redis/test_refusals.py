"""When a server says why it refuses, the reason says so, too, with what to do."""

from __future__ import annotations

import pytest

from relay.config.schema import Redis as RedisOptions
from relay.errors import StoreUnavailable
from relay.model.payload import Payload
from relay.stores.redis.connect import connect
from relay.stores.redis.divided import data_store
from relay.stores.redis.refusals import ADVICE
from tests.stores.contract import flag, segment
from tests.support.peers import peer
from tests.support.redis import secret

ONE = Payload.of([flag("lamp", 1), segment("crowd", 1)])


async def reason_of(options, prefix: str = "p") -> str:
    """Return why a write fails."""
    store = data_store(connect(options), prefix)
    with pytest.raises(StoreUnavailable) as caught:
        await store.init(ONE)
    await store.aclose()
    return str(caught.value)


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        ("-DENIED Redis is running in protected mode", "protected-mode no"),
        ("-NOAUTH Authentication required.", "set REDIS_PASSWORD"),
        ("-WRONGPASS invalid username-password pair", "check REDIS_USERNAME"),
        ("-NOPERM this user has no permissions", "docs/daemon-mode.md"),
        ("-READONLY You can't write against a read only replica.", "name its master"),
        ("-CROSSSLOT Keys in request don't hash to the same slot", "REDIS_CLUSTER=true"),
        ("-MOVED 12182 10.0.0.1:6379", "this is a Redis Cluster: set REDIS_CLUSTER=true"),
        ("-ASK 12182 10.0.0.1:6379", "this is a Redis Cluster: set REDIS_CLUSTER=true"),
        ("-ERR max number of clients reached", "raise maxclients"),
        ("-LOADING Redis is loading the dataset in memory", "it answers when it has them"),
        ("-ERR SELECT is not allowed in cluster mode", "leave the number out"),
        ("-MASTERDOWN Link with MASTER is down", "lost its master"),
        ("-CLUSTERDOWN The cluster is down", "has no master"),
        ("-TRYAGAIN Multiple keys request during rehashing of slot", "keys are moving"),
        ("-MISCONF Redis is configured to save RDB snapshots", "its own log"),
        ("-OOM command not allowed when used memory > 'maxmemory'.", "raise maxmemory"),
    ],
)
async def test_the_servers_words_come_with_advice(answer, advice):
    """For each answer that operators meet."""
    with peer(f"{answer}\r\n".encode(), listens=True) as port:
        options = RedisOptions(url=f"redis://127.0.0.1:{port}")
        reason = await reason_of(options)
    assert answer[1:].rstrip(".") in reason
    assert advice in reason


def test_every_advice_is_one_clause():
    """It stands in brackets, in a log line that goes on."""
    assert all(not advice.endswith(".") for advice in ADVICE.values())


async def test_a_cluster_tells_a_plain_client(cluster):
    """Whichever of its servers is asked."""
    for server in cluster.servers:
        reason = await reason_of(server.options())
        assert reason.endswith("(this is a Redis Cluster: set REDIS_CLUSTER=true)"), reason


async def test_a_number_of_a_database_that_is_not_there(server):
    """A cluster has only the first, others as many as configured."""
    reason = await reason_of(server.options(url=f"{server.url}/99"))
    assert reason.endswith("(the server has fewer databases: choose a smaller number)")


async def test_a_single_server_tells_a_client_of_clusters(server):
    """It has no map of slots."""
    reason = await reason_of(server.options(cluster=True))
    assert reason.endswith("(this is no cluster: leave REDIS_CLUSTER out)")


async def test_a_server_without_a_password_says_so(server):
    """A password that nobody wants is an error of the configuration, too."""
    reason = await reason_of(server.options(password=secret("geheim")))
    assert "geheim" not in reason
    assert reason.endswith("(the server has no password: configure none)")


async def test_a_cluster_that_refuses_says_so(cluster):
    """Each server has its own users; the one that is asked for the map speaks first."""
    options = cluster.options(username="nobody", password=secret("geheim"))
    reason = await reason_of(options)
    assert reason.startswith("the server refuses user or password: WRONGPASS")


async def test_a_user_without_a_right_is_told_of_the_page(cluster):
    """A cluster needs a few more commands than a single server."""
    for server in cluster.servers:
        rights = ["~*", "+@all", "-hkeys"]
        server.do("ACL", "SETUSER", "few", "reset", "on", ">geheim", *rights)
    reason = await reason_of(cluster.options(username="few", password=secret("geheim")))
    assert "NOPERM" in reason
    assert "docs/daemon-mode.md" in reason
