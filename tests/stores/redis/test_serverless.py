"""A cluster with the limits of serverless caches: TLS, names instead of addresses, few commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from relay.model.payload import Payload
from relay.steps import finish
from relay.stores.fingerprint import Fingerprint
from relay.stores.redis.connect import connect
from relay.stores.redis.divided import data_store
from relay.stores.redis.divided_bigsegments import big_segment_store
from tests.stores.bigsegments_contract import ANN, BEN, patch
from tests.stores.contract import flag, segment
from tests.support.authorities import Authority
from tests.support.redis import secret
from tests.support.rediscluster import encrypted_cluster

PAGE = Path(__file__).parents[3] / "docs" / "daemon-mode.md"


def documented_rights() -> list[str]:
    """Return the rights that the page lists."""
    _, _, after = PAGE.read_text().partition("<!-- rights in a cluster -->")
    return re.findall(r"\+[a-z|]+", after.partition("\n\n")[0])


@pytest.fixture
async def serverless(tmp_path):
    """Options of such a cluster, and the cluster.

    Clients see one name with TLS. They have a user with a password and the rights of an
    application, so neither SELECT nor CONFIG nor INFO, and a transaction has keys of one slot only.
    """
    authority = Authority(tmp_path)
    tls = authority.server("localhost")
    async with encrypted_cluster(tmp_path, tls) as (cluster, url):
        for server in cluster.servers:
            allowed = documented_rights()
            keys = ("~shop:*", "~{shop:*", "~{shop}:*")
            server.do("ACL", "SETUSER", "relay", "reset", "on", ">geheim", *keys, *allowed)
        yield cluster.options(
            url=url,
            username="relay",
            password=secret("geheim"),
            ca_file=str(authority.file),
        )
        for server in cluster.servers:
            assert server.denied() == []


@pytest.mark.parametrize("prefix", ["shop", "{shop}"])
async def test_flags_are_kept(serverless, prefix):
    """With and without a hash tag, and with the commands that the page lists."""
    store = data_store(connect(serverless), prefix)
    payload = Payload.of([*(flag(f"f{n}", 1) for n in range(300)), segment("crowd", 1)])
    await store.init(Payload.of([segment("gone", 1)]))
    await store.init(payload)
    await store.mark(finish(Fingerprint.of(payload)))
    assert await store.holds(finish(Fingerprint.of(payload)))
    assert await store.upsert([flag("f7", 2), segment("crowd", 2)])
    assert not await store.holds(finish(Fingerprint.of(Payload.of([]))))
    stored = await store.load()
    assert len(stored.payload) == 301
    assert len(await store.versions()) == 301
    await store.aclose()


@pytest.mark.parametrize("prefix", ["shop", "{shop}"])
async def test_big_segments_are_kept(serverless, prefix):
    """Likewise."""
    store = big_segment_store(connect(serverless), prefix)
    await store.apply(patch("v1", include=[ANN, BEN]), None)
    await store.apply(patch("v2", no_longer=[BEN]), "v1")
    await store.mark_synchronized(1.0)
    assert await store.memberships([ANN, BEN]) == [{"team.g2": True}, {}]
    assert (await store.metadata()).cursor == "v2"
    await store.aclose()
