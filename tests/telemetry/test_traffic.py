"""Counts and log lines of requests, on the fast path and in the application."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re

import pytest

from relay.protocol import fdv1
from relay.telemetry.redaction import redact_url
from relay.telemetry.traffic import (
    MAX_USER_AGENT,
    MAX_USER_AGENTS,
    OTHER,
    RequestLabels,
    RequestMetrics,
)
from relay.web.access_log import request_line
from tests.support.process import RelayProcess
from tests.support.serving import SDK_KEY, Served, Stream, ask, serving, until

SDK = (("Authorization", SDK_KEY),)
PUT = b'{"path":"/","data":{"flags":{"lamp":{"key":"lamp","version":1}}}}'


async def deliver(served: Served) -> None:
    changes = fdv1.parse("put", PUT)
    assert changes is not None
    await served.source.give(changes)


@pytest.fixture
def debug(caplog):
    """A log at level debug before the server is made."""
    caplog.set_level(logging.DEBUG, "relay.traffic")
    return caplog


def lines(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "relay.traffic"]


@pytest.mark.parametrize("front", [True, False])
async def test_requests_are_counted(front):
    """By environment, route, method and platform, but not if refused or of other pages."""
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
        RequestLabels("main", "/sdk/flags", "GET", "server"): 2,
        RequestLabels("main", "/sdk/flags", "HEAD", "server"): 1,
        RequestLabels("main", "/sdk/flags/{key}", "GET", "server"): 2,
        RequestLabels("main", "/ping/{envId}", "GET", "browser"): 1,
        RequestLabels("main", "/all", "GET", "server"): 1,
    }
    streams = {series: count.value for series, count in served.traffic.new_streams.items()}
    assert streams == {
        RequestLabels("main", "/ping/{envId}", "GET", "browser"): 1,
        RequestLabels("main", "/all", "GET", "server"): 1,
    }


@pytest.mark.parametrize("front", [True, False])
async def test_each_request_is_logged_at_debug(front, debug):
    """One line per request and one for the end of a stream, the same on both paths."""
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
        "Request: method=GET url=/livez?{query} auth=n/a status=200 bytes=18",
        "Request: method=GET url=/all auth=*0a001 status=200 (streaming)",
        f"Stream closed: url=/all auth=*0a001 bytes={len(opening) + len(change)}",
    ]


@pytest.mark.parametrize("front", [True, False])
async def test_lines_hold_no_secrets(front, debug):
    """No keys, contexts or events get into lines."""
    served = Served()
    async with serving(served, front=front) as address:
        await ask(address, "/sdk/evalx/env-1/contexts/eyJrZXkiOiJhIn0?withReasons=true")
        await ask(address, f"/sdk/evalx/{SDK_KEY}/contexts/eyJrZXkiOiJhIn0")
        await ask(address, "/sdk/poll/eval/eyJrZXkiOiJhIn0?auth=key-without-prefix&x=y")
        await ask(address, "/a/env-1.gif?d=W10=")
        await ask(address, "/sdk/poll", SDK)
    assert [re.sub(r" status.*", "", line.partition("url=")[2]) for line in lines(debug)] == [
        "/sdk/evalx/env-1/contexts/{context}?{query} auth=n/a",
        "/sdk/evalx/*0a001/contexts/{context} auth=n/a",
        "/sdk/poll/eval/{context}?{query} auth=n/a",
        "/a/env-1.gif?{query} auth=n/a",
        "/sdk/poll auth=*0a001",
    ]


async def test_nothing_is_logged_at_other_levels(caplog):
    """Unless the level was debug at the start, there are no lines, and streams have no overhead."""
    served = Served()
    assert not served.traffic.logs
    async with serving(served) as address:
        caplog.set_level(logging.DEBUG, "relay.traffic")
        await ask(address, "/livez")
        stream = await Stream.open(address)
        await until(lambda: len(served.hub) == 1)
        (subscription,) = served.hub._channels["all"].subscriptions
        assert type(subscription.transport).__name__ == "TCPTransport"
        stream.close()
    assert lines(caplog) == []


def test_format_of_lines():
    """As in ld-relay."""
    line = request_line("GET", "/sdk/flags", "sdk-abcdefghij", 200, 3)
    assert line == "Request: method=GET url=/sdk/flags auth=*fghij status=200 bytes=3"
    line = request_line("GET", "/all", "", 200, None)
    assert line == "Request: method=GET url=/all auth=n/a status=200 (streaming)"
    assert redact_url("/x/sdk-1234-5678/mob-key") == "/x/*-5678/*b-key"
    assert redact_url("/x?a=1&b=sdk-1234?c") == "/x?{query}"
    assert redact_url("/x/Y29udGV4dA?a", has_context=True) == "/x/{context}?{query}"


PERSON = "anna@example.com"
CONTEXT = base64.urlsafe_b64encode(json.dumps({"kind": "user", "key": PERSON}).encode()).decode()
QUERY = f"email={PERSON}&auth=key-without-prefix"


async def test_no_line_has_the_content_of_a_query(tmp_path):
    """Nor a context: any request to a whole relay at level debug, on both paths."""
    flags = tmp_path / "flags.yaml"
    flags.write_text("flagValues: {lamp: true}")
    requests = [
        f"{line.replace('CONTEXT', CONTEXT)}?{QUERY} HTTP/{version}"
        for version in ("1.1", "1.0", "2.0")
        for line in (
            *("GET /status", "GET /status/demo", "GET /readyz", "GET /metrics", "HEAD /livez"),
            *("GET /nothing", "POST /status", "GET /sdk//flags", "GET /%", "OPTIONS *"),
            *("GET /sdk/latest-all", "GET /sdk/flags/lamp", "GET /sdk/goals/demo-client-side-id"),
            *("GET /all", "GET /flags", "GET /mping", "GET /ping/demo-client-side-id"),
            *("GET /meval/CONTEXT", "GET /eval/demo-client-side-id/CONTEXT"),
            *("GET /sdk/evalx/contexts/CONTEXT", "GET /msdk/evalx/users/CONTEXT"),
            *("GET /sdk/evalx/nobody/contexts/CONTEXT", "REPORT /sdk/evalx/context"),
            *("GET /sdk/poll/eval/CONTEXT", "GET /a/demo-client-side-id.gif"),
            *("POST /bulk", "POST /mobile", "POST /events/bulk/demo-client-side-id"),
            *("GET http://relay", "GET http://relay/livez", "GET nonsense"),
        )
    ]
    body = json.dumps({"kind": "user", "key": PERSON})
    relay = RelayProcess(tmp_path, "--flags", str(flags), LOG_LEVEL="debug")
    async with relay:
        await relay.said("Initialized")
        for line in requests:
            for key in ("sdk-demo", "mob-demo"):
                length = len(body) if line.startswith(("POST", "REPORT")) else 0
                head = [line, "Host: x", f"Authorization: {key}", f"Referer: /?{QUERY}"]
                head += [f"Content-Length: {length}"] if length else []
                reader, writer = await relay.address.connect()
                writer.write("\r\n".join([*head, "", body[:length]]).encode())
                async with asyncio.timeout(5):
                    assert await reader.readline()
                writer.close()
        await relay.said("url=/status?{query}")
        await relay.said("url=/meval/{context}?{query}")
        assert await relay.stop() == 0
    for secret in (PERSON, "email", "without-prefix", CONTEXT, CONTEXT[:20]):
        assert secret not in relay.log


async def test_the_start_names_addresses_without_their_queries(tmp_path):
    """As there may be a secret in a query."""
    addresses = dict.fromkeys(
        ("STREAM_URI", "EVENTS_HOST", "BASE_URI"), f"http://localhost:1/path?token={QUERY}"
    )
    relay = RelayProcess(
        tmp_path,
        "--from-env",
        LD_ENV_main=SDK_KEY,
        USE_EVENTS="true",
        LOG_LEVEL="debug",
        **addresses,
    )
    async with relay:
        await relay.said("from http://localhost:1/path")
        await relay.said("Forwarding events to http://localhost:1/path;")
        await relay.said("cannot connect")
    assert PERSON not in relay.log


def test_the_label_of_a_user_agent():
    """The SDK's own header takes precedence; the label is short, printable and without keys."""
    traffic = RequestMetrics()
    assert traffic.user_agent(b"", b"") == ""
    assert traffic.user_agent(b"Go/1", b"curl") == "Go/1"
    assert traffic.user_agent(b"", b"curl \n\x9f\xe9 ") == "curl ??\u00e9"
    assert traffic.user_agent(b"", f"x {SDK_KEY}".encode()) == "x *0a001"
    assert traffic.user_agent(b"", b"y" * 500) == "y" * MAX_USER_AGENT


def test_the_number_of_user_agents_is_bounded():
    """Those that came first keep their labels; the others share one."""
    traffic = RequestMetrics()
    names = [traffic.user_agent(b"name %d" % n, b"") for n in range(3 * MAX_USER_AGENTS)]
    assert len(set(names)) == MAX_USER_AGENTS + 1
    assert names[-1] == OTHER
    assert traffic.user_agent(b"name 0", b"") == "name 0"


def test_a_count_is_one_object():
    """A caller may keep it and add to it without a look-up."""
    traffic = RequestMetrics()
    series = RequestLabels("main", "/all", "GET", "server")
    count = traffic.requests[series]
    count.value += 1
    assert traffic.requests[series] is count
