"""A relay in networks that are not clean: other people's authorities, paths before everything."""

from __future__ import annotations

import json

import pytest
from aiohttp import web

from tests.support.authorities import UNTIDY, Authority
from tests.support.data import all_data, flag
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer, encrypted
from tests.support.serving import SDK_KEY, ask
from tests.support.upstream import ScriptedUpstream

GOALS = b'[{"key":"seen"}]'
EVENT = {"kind": "custom", "key": "clicked", "creationDate": 1, "contextKeys": {"user": "anna"}}
SETTINGS = {
    "LD_ENV_main": SDK_KEY,
    "LD_CLIENT_SIDE_ID_main": "id-main",
    "USE_EVENTS": "true",
    "EVENTS_FLUSH_INTERVAL": "10ms",
}


async def goals(_: web.Request) -> web.Response:
    return web.Response(body=GOALS, content_type="application/json")


def relay_of(upstream: ScriptedUpstream, folder, end: str = "", **more: str) -> RelayProcess:
    """A relay all of whose addresses are upstream's, followed by `end`."""
    names = ("STREAM_URI", "BASE_URI", "CLIENT_SIDE_BASE_URI", "EVENTS_HOST")
    upstream.serve(SDK_KEY, all_data(flag(value="one")))
    upstream.always("", goals)
    return RelayProcess(folder, **dict.fromkeys(names, upstream.url + end), **SETTINGS, **more)


async def exchange(relay: RelayProcess, upstream: ScriptedUpstream) -> set[str]:
    """Have data, goals and an event pass; return the paths that upstream was asked for."""
    await relay.said("Initialized")
    reply = await ask(relay.address, "/sdk/goals/id-main")
    assert (reply.status, reply.body) == (200, GOALS)
    key = [("Authorization", SDK_KEY), ("X-LaunchDarkly-Event-Schema", "4")]
    body = json.dumps([EVENT]).encode()
    assert (await ask(relay.address, "/bulk", key, method="POST", body=body)).status == 202
    await upstream.took()
    return {request.path for request in upstream.requests}


@pytest.mark.parametrize("end", ["", "/"])
@pytest.mark.parametrize("source", ["streaming", "polling"])
async def test_addresses_may_have_paths(tmp_path, source, end):
    """Streams, polls, goals and events: all are below the path, however it ends."""
    async with (
        ScriptedUpstream(prefix="/a/prefix") as upstream,
        relay_of(upstream, tmp_path, end, DATA_SOURCE=source) as relay,
    ):
        paths = await exchange(relay, upstream)
    data = "/all" if source == "streaming" else "/sdk/latest-all"
    wanted = {data, "/sdk/goals/id-main", "/bulk"}
    assert wanted <= {path.removeprefix("/a/prefix") for path in paths}
    assert all(path.startswith("/a/prefix/") for path in paths)


@pytest.mark.parametrize("form", UNTIDY.values(), ids=UNTIDY.keys())
@pytest.mark.parametrize("variable", ["PROXY_CA_CERTS", "SSL_CERT_FILE"])
async def test_authorities_need_not_be_by_the_book(tmp_path, form, variable):
    """For flags, goals, events and the database, on every interpreter."""
    authority = Authority(tmp_path, **form)
    more = {variable: str(authority.file), "USE_REDIS": "true"}
    if variable == "PROXY_CA_CERTS":
        more["REDIS_CA_FILE"] = str(authority.file)
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as redis:
        async with (
            ScriptedUpstream(authority.server("127.0.0.1")) as upstream,
            encrypted(redis, authority.server("localhost")) as url,
            relay_of(upstream, tmp_path, **more, REDIS_URL=url) as relay,
        ):
            await exchange(relay, upstream)
            await relay.until(lambda: redis.do("EXISTS", "launchdarkly:$inited") == 1)
            sync = RelayProcess(
                tmp_path, "sync", "--from-env", **SETTINGS, **more,
                REDIS_URL=url, STREAM_URI=upstream.url,
            )  # fmt: skip
            await sync.spawn()
            assert await sync.ended() == 0, sync.log


async def test_what_is_not_trusted_is_named_with_the_reason(tmp_path):
    """In OpenSSL's words, for LaunchDarkly and for the database; nothing is sent to either."""
    authority, other = Authority(tmp_path), Authority(tmp_path)
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as redis:
        async with (
            ScriptedUpstream(other.server("127.0.0.1")) as upstream,
            encrypted(redis, authority.server("another.example")) as url,
            relay_of(
                upstream, tmp_path, PROXY_CA_CERTS=str(authority.file), USE_REDIS="true",
                REDIS_URL=url, REDIS_CA_FILE=str(authority.file),
            ) as relay,
        ):  # fmt: skip
            await relay.said(
                "the certificate of 127.0.0.1 is not trusted: unable to get local issuer certificate"
            )
            await relay.said("Hostname mismatch, certificate is not valid for 'localhost'.")
            assert not upstream.requests
