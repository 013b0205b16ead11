"""What is counted and logged of requests, at both doors."""

from __future__ import annotations

import logging
import re

import pytest

from relay.protocol import fdv1
from relay.web.traffic import (
    MAX_USER_AGENT,
    MAX_USER_AGENTS,
    OTHER,
    Series,
    Traffic,
    request_line,
    shown,
)
from tests.support.serving import SDK_KEY, Served, Stream, ask, serving, until

SDK = (("Authorization", SDK_KEY),)
PUT = b'{"path":"/","data":{"flags":{"lamp":{"key":"lamp","version":1}}}}'


async def deliver(served: Served) -> None:
    changes = fdv1.parse("put", PUT)
    assert changes is not None
    await served.source.give(changes)


@pytest.fixture
def debug(caplog):
    """The level is debug when the server is made."""
    caplog.set_level(logging.DEBUG, "relay.traffic")
    return caplog


def lines(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "relay.traffic"]


@pytest.mark.parametrize("front", [True, False])
async def test_requests_are_counted(front):
    """By environment, route, method and platform; refused ones and other pages not."""
    served = Served()
    async with serving(served, front=front) as address:
        await deliver(served)
        for path in ("/sdk/flags", "/sdk/flags", "/sdk/flags/lamp", "/sdk/flags/none", "/status"):
            await ask(address, path, SDK)
        await ask(address, "/sdk/flags", SDK, method="HEAD")
        await ask(address, "/sdk/flags", [("Authorization", "sdk-x")])
        await ask(address, "/ping/env-1")
        await ask(address, "/ping/env-1", method="OPTIONS")
        await ask(address, "/nothing", SDK)
        (await Stream.open(address)).close()
    counted = {series: count.value for series, count in served.traffic.requests.items()}
    assert counted == {
        Series("main", "/sdk/flags", "GET", "server"): 2,
        Series("main", "/sdk/flags", "HEAD", "server"): 1,
        Series("main", "/sdk/flags/{key}", "GET", "server"): 2,
        Series("main", "/ping/{envId}", "GET", "browser"): 1,
        Series("main", "/all", "GET", "server"): 1,
    }
    streams = {series: count.value for series, count in served.traffic.new_streams.items()}
    assert streams == {
        Series("main", "/ping/{envId}", "GET", "browser"): 1,
        Series("main", "/all", "GET", "server"): 1,
    }


@pytest.mark.parametrize("front", [True, False])
async def test_each_request_is_logged_at_debug(front, debug):
    """One line per request and one for the end of a stream, the same at both doors."""
    served = Served()
    async with serving(served, front=front) as address:
        await deliver(served)
        for _ in range(2):
            await ask(address, "/sdk/flags/lamp", SDK)
        await ask(address, "/livez?a=b")
        await ask(address, "/nothing")
        await ask(address, "/all", method="POST")
        stream = await Stream.open(address)
        opening = await stream.until(b"\n\n")
        await served.source.give(fdv1.parse("delete", b'{"path":"/flags/lamp","version":2}'))
        change = await stream.until(b"\n\n")
        stream.close()
        await until(lambda: "closed" in lines(debug)[-1])
    poll = "Request: method=GET url=/sdk/flags/lamp auth=*0a001 status=200 bytes=26"
    assert lines(debug) == [
        poll,
        poll,
        "Request: method=GET url=/livez?a=b auth=n/a status=200 bytes=18",
        "Request: method=GET url=/all auth=*0a001 status=200 (streaming)",
        f"Stream closed: url=/all auth=*0a001 bytes={len(opening) + len(change)}",
    ]


@pytest.mark.parametrize("front", [True, False])
async def test_lines_hold_no_secrets(front, debug):
    """Neither keys nor contexts nor events get into lines."""
    served = Served()
    async with serving(served, front=front) as address:
        await ask(address, "/sdk/evalx/env-1/contexts/eyJrZXkiOiJhIn0?withReasons=true")
        await ask(address, f"/sdk/evalx/{SDK_KEY}/contexts/eyJrZXkiOiJhIn0")
        await ask(address, "/sdk/poll/eval/eyJrZXkiOiJhIn0?auth=key-without-prefix&x=y")
        await ask(address, "/a/env-1.gif?d=W10=")
        await ask(address, "/sdk/poll", SDK)
    assert [re.sub(r" status.*", "", line.partition("url=")[2]) for line in lines(debug)] == [
        "/sdk/evalx/env-1/contexts/{context}?withReasons=true auth=n/a",
        "/sdk/evalx/*0a001/contexts/{context} auth=n/a",
        "/sdk/poll/eval/{context}?auth=*refix&x=y auth=n/a",
        "/a/env-1.gif?d={events} auth=n/a",
        "/sdk/poll auth=*0a001",
    ]


async def test_nothing_is_logged_otherwise(caplog):
    """Unless the level was debug at the start there are no lines, and streams cost nothing more."""
    served = Served()
    assert not served.traffic.logs
    async with serving(served) as address:
        caplog.set_level(logging.DEBUG, "relay.traffic")
        await ask(address, "/livez")
        stream = await Stream.open(address)
        await until(lambda: len(served.hub) == 1)
        (subscription,) = served.hub._channels["all"].subscriptions
        assert type(subscription.wire).__name__ == "TCPTransport"
        stream.close()
    assert lines(caplog) == []


def test_lines():
    """The forms are the reference's."""
    line = request_line("GET", "/sdk/flags", "sdk-abcdefghij", 200, 3)
    assert line == "Request: method=GET url=/sdk/flags auth=*fghij status=200 bytes=3"
    line = request_line("GET", "/all", "", 200, None)
    assert line == "Request: method=GET url=/all auth=n/a status=200 (streaming)"
    assert (
        shown("/x/sdk-1234-5678/mob-key", "a=1&auth=abcdefgh") == "/x/*-5678/*b-key?a=1&auth=*defgh"
    )


def test_the_name_of_a_client():
    """The SDK's own header comes first; what remains is one short line without keys."""
    traffic = Traffic()
    assert traffic.user_agent(b"", b"") == ""
    assert traffic.user_agent(b"Go/1", b"curl") == "Go/1"
    assert traffic.user_agent(b"", b"curl \n\x9f\xe9 ") == "curl ??\u00e9"
    assert traffic.user_agent(b"", f"x {SDK_KEY}".encode()) == "x *0a001"
    assert traffic.user_agent(b"", b"y" * 500) == "y" * MAX_USER_AGENT


def test_clients_that_are_counted_apart_are_bounded():
    """Those that came first keep their names; of the others nothing is kept."""
    traffic = Traffic()
    names = [traffic.user_agent(b"name %d" % n, b"") for n in range(3 * MAX_USER_AGENTS)]
    assert len(set(names)) == MAX_USER_AGENTS + 1
    assert names[-1] == OTHER
    assert traffic.user_agent(b"name 0", b"") == "name 0"


def test_a_count_is_one_object():
    """Who keeps a count adds to it without a look-up."""
    traffic = Traffic()
    series = Series("main", "/all", "GET", "server")
    count = traffic.requests[series]
    count.value += 1
    assert traffic.requests[series] is count
