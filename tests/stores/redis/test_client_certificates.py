"""A cluster, or Sentinels and the master that they name, which want certificates of their clients."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from relay.config.schema import Redis as RedisOptions
from relay.errors import StoreUnavailable
from relay.model.payload import Payload
from relay.stores.redis.connect import connect
from relay.stores.redis.divided import data_store
from relay.stores.redis.divided_bigsegments import big_segment_store
from tests.stores.bigsegments_contract import ANN, patch
from tests.stores.contract import flag, segment
from tests.support.authorities import Authority
from tests.support.redis import encrypted, pump
from tests.support.rediscluster import encrypted_cluster

CONTENT = Payload.of([flag("lamp", 1), segment("crowd", 1)])


def demanding(authority: Authority, *hosts: str) -> ssl.SSLContext:
    """Return what a server needs to refuse clients without a certificate, within the handshake."""
    tls = authority.server(*hosts)
    tls.load_verify_locations(authority.file)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    return tls


async def check(options: Callable[..., RedisOptions], authority: Authority) -> None:
    """See that data are kept with the certificate, and nothing is without it or with another."""
    certificate, key = map(str, authority.issue("a client"))
    certified = {"client_certificate_file": certificate, "client_key_file": key}
    store = data_store(connect(options(**certified)), "shop")
    await store.init(CONTENT)
    assert await store.upsert([flag("lamp", 2)])
    stored = await store.load()
    assert {item.key: item.version for item in stored.payload} == {"lamp": 2, "crowd": 1}
    await store.aclose()
    members = big_segment_store(connect(options(**certified)), "shop")
    await members.apply(patch("v1", include=[ANN]), None)
    assert await members.memberships([ANN]) == [{"team.g2": True}]
    await members.aclose()
    foreign = dict(
        zip(certified, map(str, Authority(authority.file.parent).issue("b")), strict=True)
    )
    for refused in ({}, foreign):
        store = data_store(connect(options(**refused)), "shop")
        with pytest.raises(StoreUnavailable):
            await store.load()
        await store.aclose()


async def test_a_cluster_wants_certificates(tmp_path):
    """Each of its servers does, also those that only the first one names."""
    authority = Authority(tmp_path)
    tls = demanding(authority, "localhost")
    async with encrypted_cluster(tmp_path, tls) as (cluster, url):

        def options(**more: str) -> RedisOptions:
            return cluster.options(url=url, ca_file=str(authority.file), **more)

        await check(options, authority)


async def test_sentinels_and_their_master_want_certificates(sentinels, tmp_path):
    """Both do; the Sentinels name the encrypted port of the master."""
    authority = Authority(tmp_path)
    tls = demanding(authority, "localhost", "127.0.0.1")
    master = sentinels.master
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(encrypted(master, tls))
        own, named = (
            b"$%d\r\n%b\r\n" % (len(port), port)
            for port in (str(master.port).encode(), url.rpartition(":")[2].encode())
        )

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner_reader, inner = await asyncio.open_connection("127.0.0.1", sentinels.ports[0])
            await asyncio.gather(pump(reader, inner), answer(inner_reader, writer))

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                writer.write(data.replace(own, named))
            writer.close()

        front = await stack.enter_async_context(listening(forward, tls))

        def options(**more: str) -> RedisOptions:
            encrypted_both = {"tls": True, "sentinel_tls": True, "ca_file": str(authority.file)}
            return sentinels.options(sentinels=(f"localhost:{front}",), **encrypted_both, **more)

        await check(options, authority)


@asynccontextmanager
async def listening(forward, tls: ssl.SSLContext) -> AsyncIterator[int]:
    """Listen with TLS; yields the port."""
    async with await asyncio.start_server(forward, "localhost", 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]
