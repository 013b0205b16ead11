"""The source for FDv2 against a real server (fdv2 13.7.1)."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest

from relay.backoff import Backoff
from relay.errors import ErrorKind
from relay.model.credential import SDKKey
from relay.model.payload import ChangeSet, Selector
from relay.protocol import fdv2 as protocol
from relay.sources import Interrupted, UpToDate
from relay.sources.fdv2 import FDv2Source
from relay.sources.polling import PollingSource
from relay.sources.streaming import StreamingSource
from relay.sources.timings import SourceTimings
from relay.upstream import Upstream
from tests.support import fdv2_upstream as fdv2
from tests.support import upstream as answers
from tests.support.data import all_data, flag, segment
from tests.support.fdv2_upstream import STREAMS, FDv2Upstream, answer, state, streaming
from tests.support.upstream import filtered

KEY = "sdk-secret-4711"
LOG = logging.getLogger("relay.env.test")
PATIENT = SourceTimings(
    retry=Backoff(0.01, 0.02),
    refused=Backoff(0.01, 0.02),
    read_timeout=5,
    poll_interval=0.02,
    confirm_every=0.0,
    first_event=5,
)
SOON = replace(PATIENT, polls_after=0.0)
"""Polls take the place of streams at the first failure."""
BASIS = state(fdv2.PAYLOAD, 1)


@pytest.fixture(name="server")
async def scripted_upstream():
    async with FDv2Upstream() as server:
        server.serve(KEY, all_data(flag("a", 1), segment("s", 1)))
        yield server


@asynccontextmanager
async def following(server, basis="", timings=PATIENT, *, streams=True, payload_filter=""):
    """Yield the updates of a source, and the source."""
    url = server.url + "/"
    async with Upstream() as session:

        def fdv1():
            part = {"payload_filter": payload_filter}
            if streams:
                return StreamingSource(session, url, SDKKey(KEY), LOG, timings, **part)
            return PollingSource(session, url, SDKKey(KEY), timings, **part)

        source = FDv2Source(
            session,
            url,
            url if streams else None,
            SDKKey(KEY),
            make_fdv1=fdv1,
            log=LOG,
            timings=timings,
            payload_filter=payload_filter,
        )
        async with asyncio.timeout(20), aclosing(source.updates(basis)) as updates:
            yield updates, source


async def until(updates, kind):
    """Return the next update of a kind, skipping all others."""
    async for update in updates:
        if isinstance(update, kind):
            return update
    raise AssertionError


async def changes_of(updates, *keys):
    """Return the next change set that has just these keys."""
    while True:
        changes = await until(updates, ChangeSet)
        if sorted(item.key for item in changes.items) == sorted(keys):
            return changes


def asked(server):
    """Return path and basis of each request."""
    urls = [urlsplit(request.path) for request in server.requests]
    return [(url.path, parse_qs(url.query).get("basis", [""])[0]) for url in urls]


async def test_everything_is_polled_and_a_stream_continues(server):
    """The stream costs upstream nothing, and brings changes."""
    async with following(server) as (updates, source):
        first = await anext(updates)
        assert (first.full, first.selector) == (True, Selector(BASIS, fdv2.PAYLOAD, 1))
        assert await anext(updates) == UpToDate(BASIS)
        await server.put(KEY, all_data(flag("a", 2), flag("b")))
        change = await until(updates, ChangeSet)
        assert (change.full, change.since, change.selector.version) == (False, BASIS, 2)
        assert [(item.key, item.version) for item in change.items] == [("a", 2), ("b", 1), ("s", 0)]
        await server.raw(STREAMS + KEY, b":\n\n")
        assert await anext(updates) == UpToDate()
        assert source.protocol == "fdv2"
        assert asked(server) == [("/sdk/poll", ""), ("/sdk/stream", BASIS)]
        server.close_streams()
        await until(updates, Interrupted)
        assert await anext(updates) == UpToDate(state(fdv2.PAYLOAD, 2))
    request = server.requests[1]
    assert request.headers["Authorization"] == KEY
    assert request.headers["Accept"] == "text/event-stream"
    assert request.headers["User-Agent"].startswith("PythonRelay/")
    assert asked(server)[-1] == ("/sdk/stream", state(fdv2.PAYLOAD, 2))


@pytest.mark.parametrize("streams", [True, False])
async def test_a_restart_costs_upstream_a_delta(server, streams):
    """Or nothing, if nothing has changed."""
    async with following(server, BASIS, streams=streams) as (updates, _):
        assert await anext(updates) == UpToDate(BASIS)
    server.serve(KEY, all_data(flag("a", 2), segment("s", 1)))
    async with following(server, BASIS, streams=streams) as (updates, _):
        change = await anext(updates)
        assert (change.full, change.since) == (False, BASIS)
        assert [item.key for item in change.items] == ["a"]
    path = "/sdk/stream" if streams else "/sdk/poll"
    assert asked(server) == [(path, BASIS)] * 2


@pytest.mark.parametrize("basis", ["(p:other:9)", "a b&c=d%20+ü", "x" * 2000])
async def test_a_basis_that_upstream_does_not_know_brings_everything(server, basis):
    """It arrives as it was, whatever it is made of."""
    async with following(server, basis) as (updates, _):
        assert (await anext(updates)).full
    assert asked(server) == [("/sdk/stream", basis)]


async def test_upstream_may_send_everything_again(server):
    """In mid-stream, too."""
    async with following(server) as (updates, _):
        assert await until(updates, UpToDate)
        await server.raw(STREAMS + KEY, fdv2.full(fdv2.PAYLOAD, 7, flag("z")))
        change = await until(updates, ChangeSet)
        assert (change.full, change.selector.version) == (True, 7)


async def test_polls_bring_what_has_changed(server):
    """Without streams, at each interval."""
    async with following(server, streams=False) as (updates, _):
        assert (await anext(updates)).full
        assert await anext(updates) == UpToDate(BASIS)
        server.serve(KEY, all_data(flag("a", 2), segment("s", 1)))
        assert (await changes_of(updates, "a")).since == BASIS
    assert set(asked(server)[1:]) <= {("/sdk/poll", BASIS), ("/sdk/poll", state(fdv2.PAYLOAD, 2))}


def half() -> bytes:
    """The first part of a transfer of everything."""
    return fdv2.intent("P", 9, "xfer-full") + fdv2.objects("P", 9, flag("half"))


CUTS = {
    "cut": streaming(half(), then="end"),
    "error and cut": streaming(half() + fdv2.error("x"), then="end"),
    "goodbye": streaming(half() + fdv2.goodbye("x")),
    "broken": streaming(half() + fdv2.event("put-object", "{oops")),
    "no stream": answers.body(half(), "text/plain"),
    "503": answers.status(503),
    "400": answers.status(400),
    "401": answers.status(401),
    "hung up": answers.hang_up,
}


@pytest.mark.parametrize("cut", CUTS)
async def test_half_a_transfer_is_never_seen(server, cut):
    """The next connection continues from what was complete."""
    async with following(server) as (updates, _):
        await anext(updates)
        server.script(KEY, *[CUTS[cut]] * {"hung up": 2}.get(cut, 1))
        seen = []
        while not seen or seen[-1] != UpToDate(BASIS):
            seen.append(await anext(updates))
            if isinstance(seen[-1], ChangeSet):
                assert [item.key for item in seen[-1].items] == ["a", "s"]
    if cut == "goodbye":
        assert seen == [UpToDate(BASIS)]  # it is no outage
    else:
        assert isinstance(seen[0], Interrupted)
        assert seen[0].refused == (cut == "401")
        kind = {"broken": ErrorKind.INVALID_DATA, "hung up": ErrorKind.NETWORK_ERROR}
        assert seen[0].kind is kind.get(cut, seen[0].kind)


async def test_after_a_broken_answer_to_a_basis_everything_is_requested(server):
    """The same answer would come again."""
    server.script(KEY, streaming(fdv2.intent("P", 2, "xfer-changes") + b"event: put-object\n\n"))
    async with following(server, BASIS) as (updates, _):
        assert (await anext(updates)).kind is ErrorKind.INVALID_DATA
        assert (await anext(updates)).full
    assert asked(server) == [("/sdk/stream", BASIS), ("/sdk/poll", "")]


@pytest.mark.parametrize("code", ["xfer-changes", "none"])
async def test_changes_of_what_is_not_there_are_an_error(server, code):
    """They are answered by a request for everything."""
    wrong = fdv2.intent("P", 2, code) + fdv2.transferred("P", 2)
    server.script(KEY, answer(wrong), streaming(wrong))
    async with following(server) as (updates, _):
        assert (await anext(updates)).kind is ErrorKind.INVALID_DATA
        assert (await anext(updates)).full
    assert asked(server)[:3] == [("/sdk/poll", ""), ("/sdk/stream", ""), ("/sdk/poll", "")]


async def test_data_without_a_name_are_followed_by_everything(server):
    """There is nothing that the next request could name."""
    end = fdv2.event("payload-transferred", '{"state":"","version":0}')
    nameless = fdv2.intent("P", 1, "xfer-full") + fdv2.objects("P", 1, flag("n")) + end
    server.script(KEY, answer(nameless))
    async with following(server) as (updates, _):
        first, second = await anext(updates), await anext(updates)
        assert (first.full, first.selector.state) == (True, "")
        assert (second.full, second.selector.state) == (True, BASIS)
    assert asked(server)[:2] == [("/sdk/poll", ""), ("/sdk/stream", "")]


async def test_a_failed_poll_does_not_keep_the_stream_from_trying(server):
    """It brings everything, too."""
    server.script_path("/sdk/poll", answers.status(503), answers.body(b"<p>", "text/html"))
    for _ in range(2):
        async with following(server) as (updates, _):
            assert (await anext(updates)).full
    assert asked(server) == [("/sdk/poll", ""), ("/sdk/stream", "")] * 2


async def test_polls_take_the_place_of_a_stream_that_fails(server, caplog):
    """Nothing is interrupted; the log says when it begins and when it ends."""
    caplog.set_level(logging.INFO)
    server.script_path("/sdk/stream", *[answers.status(503)] * 3)
    async with following(server, BASIS, SOON) as (updates, _):
        assert await anext(updates) == UpToDate(BASIS)
        server.serve(KEY, all_data(flag("a", 2), segment("s", 1)))
        assert (await anext(updates)).since == BASIS
        while server.asked("/sdk/stream") < 4:
            assert not isinstance(await anext(updates), Interrupted)
    assert caplog.text.count("Polling every 0.02 s, as the stream fails") == 1
    assert caplog.text.count("The stream works again") == 1


async def test_a_stream_that_says_nothing_is_given_up(server):
    """A proxy may keep back what it should pass on; polls get through it."""
    server.script_path("/sdk/stream", *[streaming(b":\n\n")] * 9)
    async with following(server, BASIS, replace(SOON, first_event=0.05)) as (updates, _):
        assert await anext(updates) == UpToDate(BASIS)
    assert asked(server) == [("/sdk/stream", BASIS), ("/sdk/poll", BASIS)]


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("code", [401, 403])
async def test_a_refused_key_is_tried_again(server, code, streams):
    """Data that are there stay, and continue where they were."""
    server.script(KEY, *[answers.status(code)] * 3)
    async with following(server, BASIS, streams=streams) as (updates, _):
        for _ in range(3):
            outage = await anext(updates)
            assert (outage.refused, outage.status) == (True, code)
        assert await anext(updates) == UpToDate(BASIS)
    assert KEY not in str(outage)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("basis", ["", BASIS])
@pytest.mark.parametrize("codes", [(404, 404), (405, 405), (404, 405)])
async def test_an_upstream_that_does_not_know_fdv2_is_followed_by_fdv1(
    server, caplog, codes, basis, streams
):
    """Such as an older relay; the log says so."""
    caplog.set_level(logging.INFO)
    for path, code in zip(("/sdk/stream", "/sdk/poll"), codes, strict=True):
        server.script_path(path, answers.status(code))
    async with following(server, basis, streams=streams) as (updates, source):
        first = await until(updates, ChangeSet)
        assert (first.full, first.selector) == (True, None)
        assert source.protocol == "fdv1"
        assert repr(source).startswith("<FDv2Source [by <")
        await server.put(KEY, all_data(flag("a", 2), flag("c")))
        assert any(item.key == "c" for item in (await until(updates, ChangeSet)).items)
    assert caplog.text.count("Upstream does not know FDv2 (HTTP error 40") == 1


async def test_where_only_the_stream_is_missing_polls_go_on(server):
    """Upstream knows FDv2."""
    server.script_path("/sdk/stream", *[answers.status(404)] * 99)
    async with following(server, BASIS) as (updates, source):
        assert await anext(updates) == UpToDate(BASIS)
        server.serve(KEY, all_data(flag("a", 2), segment("s", 1)))
        await changes_of(updates, "a")
        assert source.protocol == "fdv2"


FALLBACK = {"X-LD-FD-Fallback": "true", "X-LD-FD-Fallback-TTL": "1"}


def directives():
    """Return how upstream may ask for FDv1: on which path, and whether with data."""
    everything = fdv2.full(fdv2.PAYLOAD, 1, flag("directed"))
    goodbye = fdv2.goodbye("x", protocolFallbackTTL=1)
    cut = streaming(half(), FALLBACK, then="end")
    return {
        "poll": ("/sdk/poll", answer(everything, FALLBACK), True),
        "poll 503": ("/sdk/poll", answers.status(503, **FALLBACK), False),
        "poll 401": ("/sdk/poll", answers.status(401, **FALLBACK), False),
        "poll goodbye": ("/sdk/poll", answer(goodbye), False),
        "stream": ("/sdk/stream", streaming(everything, FALLBACK), True),
        "stream 200, cut": ("/sdk/stream", cut, False),
        "stream 403": ("/sdk/stream", answers.status(403, **FALLBACK), False),
        "stream 404": ("/sdk/stream", answers.status(404, **FALLBACK), False),
        "stream goodbye": ("/sdk/stream", streaming(half() + goodbye), False),
        "stream goodbye after data": ("/sdk/stream", streaming(everything + goodbye), True),
    }


@pytest.mark.parametrize("case", directives())
async def test_upstream_may_ask_for_fdv1_for_a_while(server, caplog, case):
    """Data that come with it are applied first; then FDv2 comes back, from a poll besides FDv1."""
    caplog.set_level(logging.INFO)
    path, directive, has_data = directives()[case]
    server.script_path(path, directive)
    async with following(server) as (updates, source):
        seen = []
        while source.protocol == "fdv2" or not isinstance(seen[-1], ChangeSet):
            seen.append(await anext(updates))
        assert not any(isinstance(each, Interrupted) for each in seen)
        keys = [[item.key for item in each.items] for each in seen if isinstance(each, ChangeSet)]
        assert (["directed"] in keys) == has_data
        assert ["half"] not in keys
        assert seen[-1].selector is None
        while source.protocol == "fdv1":
            update = await anext(updates)
        assert (update.full, update.selector.state) == (True, BASIS)
        assert await anext(updates) == UpToDate(BASIS)
    assert caplog.text.count("Upstream asks for FDv1; it is followed by FDv1 for 1 s") == 1
    assert caplog.text.count("Upstream is followed by FDv2 again") == 1


async def test_fdv1_goes_on_while_fdv2_does_not_come_back(server):
    """Whatever upstream says to the polls that ask for it."""
    broken = answers.body(b"<p>", "text/html")
    again = [answers.status(200, **FALLBACK), answers.status(503), broken]
    server.script_path("/sdk/poll", answers.status(503, **FALLBACK), *again)
    async with following(server, timings=SOON) as (updates, source):
        assert (await until(updates, ChangeSet)).selector is None
        await server.put(KEY, all_data(flag("a", 2)))
        assert (await until(updates, ChangeSet)).selector is None
        assert (await until(updates, ChangeSet)).selector.state == state(fdv2.PAYLOAD, 2)
        assert source.protocol == "fdv2"
    assert [path for path, _ in asked(server)][:6] == ["/sdk/poll", "/all", *["/sdk/poll"] * 4]


async def test_requests_for_checks_go_to_fdv1_meanwhile(server):
    """As to any source."""
    server.script_path("/sdk/poll", answers.status(503, **FALLBACK))
    slow = replace(PATIENT, poll_interval=60)
    async with following(server, timings=slow, streams=False) as (updates, source):
        assert (await anext(updates)).full
        source.check()
        assert await anext(updates) == UpToDate()
        source.resync()
        assert (await anext(updates)).full
    assert server.asked("/sdk/latest-all") == 3


async def test_a_resync_requests_everything_without_an_interruption(server):
    """By a poll; the stream continues from there."""
    async with following(server, BASIS) as (updates, source):
        assert await anext(updates) == UpToDate(BASIS)
        await server.connected(STREAMS + KEY)
        source.resync()
        update = await anext(updates)
        while not isinstance(update, ChangeSet):
            assert update == UpToDate()
            update = await anext(updates)
        assert update.full
        assert await anext(updates) == UpToDate(BASIS)
    stream, poll = ("/sdk/stream", BASIS), ("/sdk/poll", "")
    assert asked(server) == [stream, poll, stream]


async def test_a_resync_is_not_lost_with_a_connection(server):
    """Also if upstream says no more than goodbye."""
    goodbye = fdv2.goodbye("x")
    async with following(server, BASIS) as (updates, source):
        assert await anext(updates) == UpToDate(BASIS)
        server.script_path("/sdk/poll", answers.status(503))
        server.script_path("/sdk/stream", streaming(goodbye))
        source.resync()
        assert (await until(updates, ChangeSet)).full
    assert asked(server)[1:4] == [("/sdk/poll", ""), ("/sdk/stream", ""), ("/sdk/poll", "")]


async def test_a_resync_during_a_poll_is_not_lost(server):
    """The next poll asks for everything."""
    waits = asyncio.Event()

    async def wait(request):
        await waits.wait()
        return await answer(fdv2.intent(fdv2.PAYLOAD, 1, "none"))(request)

    server.script_path("/sdk/poll", wait)
    async with following(server, BASIS, streams=False) as (updates, source):
        waiting = asyncio.ensure_future(anext(updates))
        await server.until_asked("/sdk/poll")
        source.resync()
        waits.set()
        assert await waiting == UpToDate(BASIS)
        assert (await anext(updates)).full


async def test_a_check_that_hits_an_older_cache_changes_nothing(server):
    """A regular poll accepts older data: upstream may have gone back on purpose."""
    older = answer(fdv2.full(fdv2.PAYLOAD, 1, flag("old")))
    server.serve(KEY, all_data(flag("a", 2)))
    slow = replace(PATIENT, poll_interval=60)
    async with following(server, timings=slow, streams=False) as (updates, source):
        assert (await anext(updates)).selector.version == 2
        server.script(KEY, older)
        source.check()
        assert await anext(updates) == UpToDate()
        source.check()
        assert await anext(updates) == UpToDate(state(fdv2.PAYLOAD, 2))
    async with following(server, state(fdv2.PAYLOAD, 2), streams=False) as (updates, _):
        server.script(KEY, older)
        await changes_of(updates, "old")


async def test_a_check_replaces_a_healthy_stream_only_if_asked_to(server):
    """It continues from where the former one was."""
    async with following(server, BASIS) as (updates, source):
        assert await anext(updates) == UpToDate(BASIS)
        source.check()
        await server.connected(STREAMS + KEY)
        await server.raw(STREAMS + KEY, b":\n\n")
        assert await anext(updates) == UpToDate()
        source.check(reconnect=True)
        assert await anext(updates) == UpToDate(BASIS)
    assert asked(server) == [("/sdk/stream", BASIS)] * 2


async def test_large_transfers_work(server):
    """50 MB, polled and streamed."""
    large = all_data(*(flag(f"f{n}", value="x" * 1_000_000) for n in range(50)))
    server.serve(KEY, large)
    async with following(server) as (updates, _):
        assert len((await anext(updates)).items) == 50
    server.script_path("/sdk/poll", answers.status(503))
    async with following(server) as (updates, _):
        assert len((await anext(updates)).items) == 50


async def test_an_outage_ends(server):
    """The source goes on by itself, from where it was."""
    async with following(server) as (updates, _):
        await until(updates, UpToDate)
        await server.stop()
        outage = await until(updates, Interrupted)
        assert outage.kind is ErrorKind.NETWORK_ERROR
        server.serve(KEY, all_data(flag("a", 2), segment("s", 1)))
        await server.start()
        assert (await changes_of(updates, "a")).since == BASIS


@pytest.mark.parametrize(
    ("streams", "url"),
    [("http://me:hidden@host", "@host/sdk/stream"), (None, "@host/sdk/poll")],
)
async def test_the_repr_states_the_connection(streams, url):
    """Passwords in the URL are masked."""
    base = "http://me:hidden@host"
    async with Upstream() as session:
        source = FDv2Source(session, base, streams, SDKKey(KEY), make_fdv1=object, log=LOG)
        assert repr(source).endswith(f"{url} disconnected basis=''>")
        assert "hidden" not in repr(source)


NORTH = filtered(KEY, "north")
OF_NORTH = state(fdv2.payload_of(NORTH), 1)


def queries(server):
    """Return path, filter and basis of each request."""
    urls = [urlsplit(request.path) for request in server.requests]
    found = [(url.path, parse_qs(url.query)) for url in urls]
    return [(path, *(query.get(n, [""])[0] for n in ("filter", "basis"))) for path, query in found]


@pytest.mark.parametrize("streams", [True, False], ids=["streams", "polls"])
async def test_a_filter_that_upstream_knows(server, streams):
    """It is another payload, with names of its own; that is made sure once, and costs a poll."""
    server.serve(NORTH, all_data(flag("n", 1)))
    async with following(server, streams=streams, payload_filter="north") as (updates, source):
        first = await anext(updates)
        assert first.selector.state == OF_NORTH
        assert await anext(updates) == UpToDate(OF_NORTH)
        await server.put(NORTH, all_data(flag("n", 2)))
        assert (await changes_of(updates, "n")).since == OF_NORTH
        assert source.protocol == "fdv2"
        path = "/sdk/stream" if streams else "/sdk/poll"
        wanted = [
            ("/sdk/poll", "north", ""),
            ("/sdk/poll", "", OF_NORTH),
            (path, "north", OF_NORTH),
        ]
        assert queries(server)[:3] == wanted
        assert ("/sdk/poll", "") not in [each[:2] for each in queries(server)[2:]]
        server.close_streams()


async def test_a_filtered_part_continues_from_its_basis(server):
    """A restart costs what has changed, and nothing to make sure: upstream knows the name."""
    server.serve(NORTH, all_data(flag("n", 1)))
    server.serve(NORTH, all_data(flag("n", 2)))
    async with following(server, OF_NORTH, payload_filter="north") as (updates, _):
        changes = await anext(updates)
        assert (changes.full, changes.since, len(changes.items)) == (False, OF_NORTH, 1)
        assert queries(server) == [("/sdk/stream", "north", OF_NORTH)]
        server.close_streams()


@pytest.mark.parametrize("streams", [True, False], ids=["streams", "polls"])
@pytest.mark.parametrize("basis", ["", "(p:other:3)"])
async def test_a_filter_that_upstream_ignores(server, streams, basis, monkeypatch):
    """As LaunchDarkly does. Nobody gets what the filter leaves out: FDv1 filters.

    Whether that has changed is asked with what is known by then, so that it costs little.
    """
    monkeypatch.setattr(protocol, "MAX_FALLBACK", 0.05)
    server.serve(NORTH, all_data(flag("n", 1)))
    server.filters = False
    patient = following(server, basis, streams=streams, payload_filter="north")
    async with patient as (updates, source):
        first = await until(updates, ChangeSet)
        assert ([item.key for item in first.items], first.selector) == (["n"], None)
        assert source.protocol == "fdv1"
        await server.until_asked("/sdk/poll", 5)
        codes = [code for code, _ in server.transfers]
        assert codes.count("xfer-full") == 1
        assert codes[-1] == "none"
        await server.put(KEY, all_data(flag("a", 2)))
        await server.put(NORTH, all_data(flag("n", 2)))
        assert (await changes_of(updates, "n")).selector is None

        server.filters = True
        change = await until(updates, ChangeSet)
        while change.selector is None:
            change = await until(updates, ChangeSet)
        assert (change.full, [item.key for item in change.items]) == (True, ["n"])
        assert change.selector.id == fdv2.payload_of(NORTH)
        assert source.protocol == "fdv2"
        server.close_streams()
