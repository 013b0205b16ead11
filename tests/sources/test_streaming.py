"""The streaming source against a real server."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest
import trustme

from relay.backoff import Backoff
from relay.errors import ConfigError, ErrorKind
from relay.model.credential import SDKKey
from relay.model.item import Kind
from relay.model.payload import ChangeSet
from relay.protocol.sse import Decoder
from relay.sources import Interrupted, UpToDate
from relay.sources.streaming import StreamingSource
from relay.sources.timings import SourceTimings
from relay.upstream import MAX_REDIRECTS, Upstream
from tests.support import upstream as answers
from tests.support.data import all_data, flag, patch, put
from tests.support.proxy import a_proxy
from tests.support.upstream import ScriptedUpstream

KEY = "sdk-secret-4711"
LOG = logging.getLogger("relay.env.test")
FAST = SourceTimings(
    retry=Backoff(0.01, 0.02), refused=Backoff(0.01, 300), read_timeout=0.2, confirm_every=0.0
)


@pytest.fixture(name="server")
async def scripted_upstream():
    async with ScriptedUpstream() as server:
        server.serve(KEY, all_data(flag("a", 1)))
        yield server


@asynccontextmanager
async def listening(url, timings=FAST, session=None):
    """Yield the updates of a streaming source, and the source."""
    async with session or Upstream() as upstream:
        source = StreamingSource(upstream, url + "/", SDKKey(KEY), LOG, timings)
        async with asyncio.timeout(20), aclosing(source.updates()) as updates:
            yield updates, source


async def until(updates, kind):
    """Return the next update of a kind, skipping all others."""
    async for update in updates:
        if isinstance(update, kind):
            return update
    raise AssertionError


async def test_a_stream_brings_all_data_and_then_changes(server):
    """A put, a patch, a delete, in order."""
    async with listening(server.url) as (updates, _):
        first = await until(updates, ChangeSet)
        assert first.full
        assert [item.key for item in first.items] == ["a"]
        await server.connected(KEY)
        await server.patch(KEY, flag("a", 2))
        assert (await until(updates, ChangeSet)).items[0].version == 2
        await server.delete(KEY, "/flags/a", 3)
        gone = (await until(updates, ChangeSet)).items[0]
        assert (gone.kind, gone.key, gone.version, gone.json) == (Kind.FLAG, "a", 3, None)
        await server.raw(KEY, b":\n\n")
        assert await until(updates, UpToDate) == UpToDate()


async def test_requests_look_like_those_of_an_sdk(server):
    """The headers of streams 2.4; the last id comes back."""
    server.script(KEY, answers.body(b"id: 77\n" + put(all_data())))
    async with listening(server.url) as (updates, _):
        await until(updates, Interrupted)
        await until(updates, ChangeSet)
    first, second = server.requests
    assert (first.method, first.path) == ("GET", "/all")
    assert first.headers["Authorization"] == KEY
    assert first.headers["Accept"] == "text/event-stream"
    assert first.headers["Cache-Control"] == "no-cache"
    assert first.headers["Accept-Encoding"] == "gzip"
    assert first.headers["User-Agent"].startswith("PythonRelay/")
    assert " LDRelay/" in first.headers["User-Agent"]
    assert "Last-Event-Id" not in first.headers
    assert second.headers["Last-Event-Id"] == "77"


FAULTS = {
    "401": (answers.status(401), ErrorKind.ERROR_RESPONSE, 401, "invalid SDK key"),
    "403": (answers.status(403), ErrorKind.ERROR_RESPONSE, 403, "not permitted"),
    "404": (answers.status(404), ErrorKind.ERROR_RESPONSE, 404, "HTTP error 404"),
    "400": (answers.status(400), ErrorKind.ERROR_RESPONSE, 400, "HTTP error 400"),
    "429": (answers.status(429), ErrorKind.ERROR_RESPONSE, 429, "HTTP error 429"),
    "503": (answers.status(503), ErrorKind.ERROR_RESPONSE, 503, "HTTP error 503"),
    "204": (answers.status(204), ErrorKind.ERROR_RESPONSE, 204, "HTTP error 204"),
    "stalled": (answers.stall, ErrorKind.NETWORK_ERROR, None, "no answer in time"),
    "hung up": (answers.hang_up, ErrorKind.NETWORK_ERROR, None, "closed the connection"),
    "stalled later": (
        answers.body(b":\n", then="stall"), ErrorKind.NETWORK_ERROR, None, "no answer in time"),
    "half a put": (
        answers.half_a_put(all_data(flag("x"))), ErrorKind.NETWORK_ERROR, None, "closed"),
    "cut": (
        answers.body(put(all_data())[:30], then="abort"), ErrorKind.NETWORK_ERROR, None, "closed"),
    "not JSON": (
        answers.body(b"event: put\ndata: {oops\n\n"), ErrorKind.INVALID_DATA, None, "put message"),
    "put without data": (
        answers.body(b"event: put\n\n"), ErrorKind.INVALID_DATA, None, "put message"),
    "a web page": (
        answers.body(b"<p>", "text/html"), ErrorKind.ERROR_RESPONSE, 200, "not an event stream"),
    "redirect loop": (answers.redirect("/all"), ErrorKind.ERROR_RESPONSE, 307, "redirects"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_interrupts_and_passes(server, caplog, fault):
    """Nothing is applied, the reason is stated without the key, and data arrives in the end."""
    answer, kind, status, words = FAULTS[fault]
    # A request whose connection breaks before any answer is repeated once by aiohttp.
    server.script(KEY, *[answer] * {"redirect loop": MAX_REDIRECTS, "hung up": 2}.get(fault, 1))
    async with listening(server.url) as (updates, _):
        outage = await anext(updates)
        assert isinstance(outage, Interrupted)
        assert (outage.kind, outage.status) == (kind, status)
        assert words in outage.reason
        assert outage.refused == (fault in ("401", "403", "404"))
        assert (await until(updates, ChangeSet)).full
    assert KEY not in caplog.text + outage.reason


async def test_a_silent_server_times_out_before_the_read_timeout(server):
    """A stream that has begun may be silent for minutes; before that, silence is a failure."""
    server.script(KEY, answers.stall)
    patient, session = replace(FAST, read_timeout=3600.0), Upstream(head_timeout=0.1)
    async with listening(server.url, patient, session) as (updates, _):
        assert (await anext(updates)).reason.endswith("no answer in time")
        assert await until(updates, ChangeSet)


async def test_a_refused_connection_and_an_unknown_host_are_tried_again(server):
    """Even before the first success."""
    await server.stop()
    async with listening(server.url) as (updates, _):
        outage = await anext(updates)
        assert outage.kind is ErrorKind.NETWORK_ERROR
        assert "cannot connect" in outage.reason
        await server.start()
        assert await until(updates, ChangeSet)
    async with listening("http://nowhere.invalid") as (updates, _):
        assert (await anext(updates)).kind is ErrorKind.NETWORK_ERROR


@pytest.mark.parametrize(
    ("content", "half_life"),
    [(put(all_data()), 1000), (patch(flag("a", 2)), 1e-6), (b":\n", 1e-6)],
    ids=["data", "a patch", "a comment"],
)
async def test_a_stream_that_ends_at_once_is_reopened_less_and_less_often(
    server, content, half_life
):
    """Streams that deliver and end are slowed down; one that never delivers all data fails."""
    server.always(KEY, answers.body(content))
    timings = SourceTimings(retry=Backoff(0.01, 1), half_life=half_life)
    begin = time.monotonic()
    async with listening(server.url, timings) as (updates, _):
        for _ in range(7):
            await until(updates, Interrupted)
    assert time.monotonic() - begin >= sum(0.01 * 2**n for n in range(6)) / 2  # jitter


async def test_a_bad_item_does_not_break_the_stream(server):
    """It is reported separately; the connection stays."""
    async with listening(server.url) as (updates, _):
        await until(updates, ChangeSet)
        await server.connected(KEY)
        await server.patch(KEY, flag("a", 2, variations=3))
        assert (await until(updates, ChangeSet)).invalid[0].key == "a"
        await server.patch(KEY, flag("b", 2))
        assert (await until(updates, ChangeSet)).items[0].key == "b"
    assert len(server.requests) == 1


async def test_unknown_events_are_logged_once_and_ignored(server, caplog):
    """The stream goes on."""
    caplog.set_level(logging.INFO)
    async with listening(server.url) as (updates, _):
        await until(updates, ChangeSet)
        await server.connected(KEY)
        await server.raw(KEY, b"event: news\ndata: x\n\n" * 3)
        await server.raw(KEY, b"".join(b"event: n%d\ndata: x\n\n" % n for n in range(50)))
        await server.patch(KEY, flag("a", 2))
        await until(updates, ChangeSet)
    assert caplog.text.count("'news'") == 1
    assert len(caplog.messages) == 20


async def test_resync_reconnects_without_an_interruption(server):
    """All data arrives again, and no outage is reported."""
    calm = SourceTimings(confirm_every=1000)
    async with listening(server.url, calm) as (updates, source):
        assert (await anext(updates)).full
        waiting = asyncio.ensure_future(anext(updates))
        await server.connected(KEY)
        source.resync()
        assert (await waiting).full
    assert len(server.requests) == 2


async def test_resync_ends_a_long_wait(server):
    """A refused key is retried immediately."""
    server.script(KEY, answers.status(401))
    async with listening(server.url, SourceTimings(refused=Backoff(300, 300))) as (updates, source):
        assert (await anext(updates)).refused
        source.resync()
        assert (await anext(updates)).full


async def test_a_key_never_goes_to_another_server(server):
    """A redirect elsewhere is followed without it, and its response does not refuse the key."""
    async with ScriptedUpstream() as other:
        server.script(KEY, answers.redirect(other.url + "/all"))
        async with listening(server.url) as (updates, _):
            outage = await anext(updates)
            assert (outage.status, outage.refused) == (401, False)
        assert KEY not in str(other.requests)


async def test_a_redirect_on_the_same_server_keeps_the_key(server):
    """As LaunchDarkly may do."""
    server.script(KEY, answers.redirect("/all?here"))
    async with listening(server.url) as (updates, _):
        assert (await anext(updates)).full


async def test_large_and_compressed_puts_work(server):
    """50 MB, and gzip."""
    large = all_data(*(flag(f"f{n}", value="x" * 1_000_000) for n in range(50)))
    server.script(KEY, answers.body(put(large)), answers.body(put(all_data(flag("z"))), gzip=True))
    async with listening(server.url, SourceTimings(retry=Backoff(0.01, 30))) as (updates, _):
        assert len((await until(updates, ChangeSet)).items) == 50
        assert (await until(updates, ChangeSet)).items[0].key == "z"


async def test_a_message_without_end_is_rejected(server, monkeypatch):
    """A message that never ends does not exhaust the memory."""
    monkeypatch.setattr(
        "relay.sources.event_stream.Decoder", lambda: Decoder(max_message=1_000_000)
    )
    server.script(KEY, answers.drip(b"x" * 100_000))
    async with listening(server.url) as (updates, _):
        outage = await anext(updates)
        assert outage.kind is ErrorKind.INVALID_DATA
        assert "longer than" in outage.reason


async def test_the_repr_states_the_connection():
    """Passwords in the URL are masked."""
    async with Upstream() as session:
        url = "http://me:hidden@stream.example"
        source = StreamingSource(session, url, SDKKey(KEY), LOG)
        assert repr(source).endswith("@stream.example/all disconnected>")
        assert "hidden" not in repr(source)


async def test_cancelling_closes_the_connection(server):
    """Nothing stays open, wherever the source is cancelled."""
    async with listening(server.url, SourceTimings()) as (updates, _):
        await anext(updates)
        waiting = asyncio.ensure_future(anext(updates))
        await server.connected(KEY)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await server.left(KEY)


async def test_an_extra_authority_is_trusted(server, tmp_path):
    """Without it the server is not; the reason names the host."""
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with ScriptedUpstream(tls) as secure:
        secure.serve(KEY, all_data())
        async with listening(secure.url) as (updates, _):
            assert "not trusted" in (await anext(updates)).reason
        session = Upstream(ca_files=[tmp_path / "ca.pem"])
        async with listening(secure.url, session=session) as (updates, _):
            assert (await anext(updates)).full


def test_unusable_settings_are_named(tmp_path):
    """All at once, and without the proxy's password."""
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        Upstream(ca_files=[tmp_path / "missing.pem"])
    with pytest.raises(ConfigError, match="proxy's URL") as caught:
        Upstream(proxy="socks5://me:hidden@x")
    assert "hidden" not in str(caught.value)


async def test_a_proxy_with_a_password(server, tmp_path):
    """Plain requests go in absolute form, TLS through CONNECT; the password stays secret."""
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with a_proxy("Basic bWU6cEBzcw==") as (port, seen), ScriptedUpstream(tls) as secure:
        secure.serve(KEY, all_data())
        for target in (server, secure):
            session = Upstream(f"http://me:p%40ss@127.0.0.1:{port}", [tmp_path / "ca.pem"])
            async with listening(target.url, session=session) as (updates, _):
                assert (await anext(updates)).full
            wrong = Upstream(f"http://me:hidden@127.0.0.1:{port}", [tmp_path / "ca.pem"])
            async with listening(target.url, session=wrong) as (updates, _):
                outage = await anext(updates)
                assert "407" in outage.reason
                assert "hidden" not in outage.reason
                assert not outage.refused
    assert seen[0].startswith(f"GET {server.url}/all ")
    assert any(line.startswith(f"CONNECT 127.0.0.1:{secure.port} ") for line in seen)


@pytest.mark.parametrize("location", ["http://[", "ftp://x/all", "http://127.0.0.1:99999/"])
async def test_a_redirect_to_nonsense_is_an_ordinary_failure(server, location):
    """For any content of `Location`."""
    server.script(KEY, answers.redirect(location))
    async with listening(server.url) as (updates, _):
        assert isinstance(await anext(updates), Interrupted)
        assert (await until(updates, ChangeSet)).full
