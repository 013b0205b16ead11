"""The session towards LaunchDarkly against real servers: trust, proxies, and what failures say."""

from __future__ import annotations

import asyncio
import base64
import re
import ssl

import pytest
import uvloop

from relay.errors import UpstreamUnavailable
from relay.model.credential import SDKKey
from relay.upstream import Upstream, read_body
from tests.support.authorities import UNTIDY, Authority
from tests.support.data import all_data
from tests.support.peers import peer
from tests.support.proxy import a_proxy
from tests.support.upstream import ScriptedUpstream

KEY = "sdk-secret-4711"


async def ask(session: Upstream, url: str) -> int:
    """Read a whole answer and close the session."""
    async with session, session.get(url, SDKKey(KEY), accept="*/*", read_timeout=5) as response:
        await read_body(response)
        return response.status


@pytest.mark.parametrize("form", UNTIDY.values(), ids=UNTIDY.keys())
@pytest.mark.parametrize("named", [True, False], ids=["named", "of the system"])
async def test_an_authority_that_is_not_by_the_book_is_trusted(tmp_path, monkeypatch, form, named):
    """As inspection proxies and old tools make them, on every interpreter."""
    authority = Authority(tmp_path, **form)
    if not named:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    session = Upstream(ca_files=[authority.file] if named else [])
    async with ScriptedUpstream(authority.server("127.0.0.1")) as secure:
        secure.serve(KEY, all_data())
        assert await ask(session, f"{secure.url}/sdk/latest-all") == 200


@pytest.mark.parametrize(
    ("host", "days", "reason"),
    [
        ("localhost", 1, "IP address mismatch, certificate is not valid for '127.0.0.1'."),
        ("127.0.0.1", -1, "certificate has expired"),
    ],
)
async def test_another_host_and_an_old_certificate_are_not(tmp_path, host, days, reason):
    """The reason is what OpenSSL says."""
    authority = Authority(tmp_path, **UNTIDY["no keyUsage"])
    session = Upstream(ca_files=[authority.file])
    async with ScriptedUpstream(authority.server(host, days=days)) as secure:
        with pytest.raises(UpstreamUnavailable) as caught:
            await ask(session, f"{secure.url}/sdk/latest-all")
        assert caught.value.reason == f"the certificate of 127.0.0.1 is not trusted: {reason}"
        assert not secure.requests


@pytest.mark.parametrize(
    ("tls", "answer", "reason"),
    [
        (False, b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "the answer is not HTTP: "),
        (False, b"HTTP/1.1 200 OK\r\nAuthori\0zation: sdk-secret-4711\r\n\r\n", "the answer is not HTTP: "),
        (False, b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", "the answer cannot be decompressed"),
        (False, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "the server closed the connection"),
        (False, b"", "the server closed the connection"),
        ("plain", b"HTTP/1.1 400 Bad Request\r\n\r\n", "TLS failed: wrong version number"),
        ("client certificate", b"", "TLS failed: .*alert handshake failure"),
        ("old", b"", "TLS failed: tlsv1 alert protocol version"),
    ],
)  # fmt: skip
async def test_a_failure_says_what_happened(tmp_path, tls, answer, reason):
    """In the words of OpenSSL or of the parser; never a class of exceptions, and never the key."""
    authority = Authority(tmp_path)
    context = authority.server("127.0.0.1")
    if tls == "client certificate":
        context.verify_mode = ssl.CERT_REQUIRED
        context.maximum_version = ssl.TLSVersion.TLSv1_2  # refuses within the handshake
    session = Upstream(ca_files=[authority.file])
    if tls == "old":
        session._tls.maximum_version = ssl.TLSVersion.TLSv1_2
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    with (
        peer(answer, tls=context if tls and tls != "plain" else None) as port,
        pytest.raises(UpstreamUnavailable, match=reason) as caught,
    ):
        await ask(session, f"{'https' if tls else 'http'}://127.0.0.1:{port}/all")
    assert not re.search(f"Error\\b|{KEY}", caught.value.reason)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:1", "cannot connect to 127.0.0.1:1: Connection refused"),
        ("http://localhost:1", "cannot connect to localhost:1: Connection refused"),
        ("http://nowhere.invalid", r"cannot connect to nowhere\.invalid:80: .*[Nn]ame"),
    ],
)
async def test_a_server_that_cannot_be_reached_is_described(url, reason):
    """In the words of the system and of its resolver."""
    with pytest.raises(UpstreamUnavailable, match=reason):
        await ask(Upstream(), url)


@pytest.fixture
def no_proxies(monkeypatch):
    """Nothing of the environment that the tests run in."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "REQUEST_METHOD"):
        for each in (name, name.lower()):
            monkeypatch.delenv(each, raising=False)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_environments_proxy_counts_where_none_is_configured(
    tmp_path, monkeypatch, no_proxies, scheme
):
    """With user and password in UTF-8; only the proxy sees them, and it does not see the key."""
    credentials = base64.b64encode("mü:€".encode()).decode()
    authority = Authority(tmp_path)
    tls = authority.server("ld.example") if scheme == "https" else None
    async with a_proxy(f"Basic {credentials}") as (port, seen), ScriptedUpstream(tls) as server:
        server.serve(KEY, all_data())
        url = f"{scheme}://ld.example:{server.port}/sdk/latest-all"
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://m%C3%BC:%E2%82%AC@127.0.0.1:{port}")
        assert await ask(Upstream(ca_files=[authority.file]), url) == 200
        (request,) = server.requests
        (head,) = seen
    if scheme == "https":
        assert head.startswith(f"CONNECT ld.example:{server.port} ")
        assert KEY not in head
        assert "Proxy-Authorization" not in request.headers
    else:
        assert head.startswith(f"GET {url} ")


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_proxy_may_be_asked_over_tls(tmp_path, run, scheme):
    """Its certificate is verified with the same authorities; TLS goes through TLS."""
    authority = Authority(tmp_path)
    tls = authority.server("ld.example") if scheme == "https" else None

    async def attempt() -> int:
        async with (
            a_proxy(tls=authority.server("127.0.0.1")) as (port, _),
            ScriptedUpstream(tls) as server,
        ):
            server.serve(KEY, all_data())
            session = Upstream(f"https://127.0.0.1:{port}", [authority.file])
            return await ask(session, f"{scheme}://ld.example:{server.port}/sdk/latest-all")

    assert run(attempt()) == 200


async def test_events_go_through_the_environments_proxy(tmp_path, monkeypatch, no_proxies):
    """And nothing of the proxy's credentials gets to LaunchDarkly."""
    authority = Authority(tmp_path)
    async with (
        a_proxy("Basic bWU6cHc=") as (port, seen),
        ScriptedUpstream(authority.server("ld.example")) as server,
    ):
        monkeypatch.setenv("https_proxy", f"me:pw@127.0.0.1:{port}")
        async with Upstream(ca_files=[authority.file]) as session:
            url = f"https://ld.example:{server.port}/bulk"
            receipt = await session.post(url, b"[]", headers={"Authorization": KEY}, within=5)
    assert receipt.status == 202
    assert "Proxy-Authorization" not in server.posts[0].headers
    assert len(seen) == 1


@pytest.mark.parametrize("no_proxy", ["", "127.0.0.0/8", "*"])
async def test_this_machine_is_asked_directly(monkeypatch, no_proxies, no_proxy):
    """Whatever the environment says: a proxy has its own idea of `localhost`."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    async with ScriptedUpstream() as server:
        server.serve(KEY, all_data())
        assert await ask(Upstream(), f"{server.url}/sdk/latest-all") == 200


async def test_the_environment_is_read_once(monkeypatch, no_proxies):
    """When the session is made; what is wrong with it is said then."""
    session = Upstream()
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with pytest.raises(UpstreamUnavailable, match=r"cannot connect to ld\.invalid:80"):
        await ask(session, "http://ld.invalid")
    with pytest.raises(UpstreamUnavailable, match=r"cannot connect to 127\.0\.0\.1:1"):
        await ask(Upstream(), "http://ld.invalid")
