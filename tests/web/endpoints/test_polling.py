"""Polls: ETags, compression, and the credentials that allow them."""

import asyncio
import gzip
import json
from hashlib import sha1

import pytest
from starlette.requests import Request

from relay.environment import Environment
from relay.model.item import Item, Kind, parse
from relay.model.payload import Payload
from relay.registry import Grant
from relay.web.access import Access
from relay.web.endpoints.polling import PollingHandler
from relay.web.resources import MAX_COMPRESSED_AT_ONCE, Resource, accepts_gzip
from relay.web.responses import PreparedResponse
from relay.web.routes import match
from tests.support.data import flag, segment
from tests.support.serving import Served


def poll(
    handler: PollingHandler,
    environment: Environment,
    path: str,
    if_none_match: bytes = b"",
    accept_encoding: bytes = b"",
) -> PreparedResponse | None:
    """Return the response of the fast path."""
    found = match(b"GET", path.partition("?")[0].encode())
    assert found
    access = Access(found.route, Grant(environment, environment.spec.sdk_key))
    key = handler.key(access, found.segment.decode(), {}, path.partition("?")[2].encode())
    return handler.respond(access, key, if_none_match, accept_encoding)


def item(kind, value):
    return parse(kind, value["key"], json.dumps(value).encode())


@pytest.fixture
def environment():
    environment = Served().environment
    flags = [item(Kind.FLAG, flag("b", 2)), item(Kind.FLAG, flag("a", 7))]
    gone = Item(Kind.FLAG, "gone", 3, None)
    environment.payload = Payload.of([*flags, gone, item(Kind.SEGMENT, segment("s", 4))])
    return environment


async def test_etag_of_all_flags_is_that_of_ld_relay(environment):
    """The ETag is made of sorted keys and versions, tombstones included, and is unquoted."""
    response = poll(PollingHandler(), environment, "/sdk/flags")
    tag = "relay-" + sha1(b"a:7b:2gone:3").hexdigest()[:15]
    assert dict(response.headers)[b"etag"] == tag.encode()
    assert json.loads(response.body).keys() == {"a", "b"}


@pytest.mark.parametrize("template", [b"%b", b'"%b"', b'W/"%b"', b'"x", "%b"'])
@pytest.mark.parametrize(
    "path", ["/sdk/flags", "/sdk/flags/a", "/sdk/segments/s", "/sdk/latest-all"]
)
async def test_unchanged(environment, path, template):
    """Old exact and standard forms of If-None-Match give a 304 with the ETag and no body."""
    polls = PollingHandler()
    etag = dict(poll(polls, environment, path).headers)[b"etag"]
    if_none_match = etag if template == b"%b" else template % etag.strip(b'"')
    response = poll(polls, environment, path, if_none_match, b"gzip")
    assert (response.status, response.body) == (304, b"")
    assert dict(response.headers)[b"etag"] == etag
    assert poll(polls, environment, path, b"*", b"").status == 304
    assert poll(polls, environment, path, b'"other"', b"").status == 200


async def test_etag_of_all_data_depends_on_content(environment):
    """The ETag changes with the content, even if versions stay; it does not with the order."""
    polls = PollingHandler()
    items = list(environment.payload)
    first = poll(polls, environment, "/sdk/latest-all")
    environment.payload = Payload.of(reversed(items))
    assert dict(poll(polls, environment, "/sdk/latest-all").headers)[b"etag"] in first.head
    environment.payload = Payload.of([*items, item(Kind.FLAG, flag("a", 7, "new"))])
    assert dict(poll(polls, environment, "/sdk/latest-all").headers)[b"etag"] not in first.head


async def test_large_bodies_are_not_compressed_on_the_loop(environment):
    """The fast path leaves a large body to the application until it has been compressed."""
    polls = PollingHandler()
    environment.payload = Payload.of([item(Kind.FLAG, flag("a", 1, "x" * MAX_COMPRESSED_AT_ONCE))])
    assert poll(polls, environment, "/sdk/flags", b"", b"gzip") is None
    found = match(b"GET", b"/sdk/flags")
    access = Access(found.route, Grant(environment, environment.spec.sdk_key))
    request = Request(
        {"type": "http", "query_string": b"", "headers": [(b"accept-encoding", b"gzip")]}
    )
    first, same = await asyncio.gather(polls.handle(request, access), polls.handle(request, access))
    assert poll(polls, environment, "/sdk/flags", b"", b"gzip") is first is same
    assert gzip.decompress(first.body) == poll(polls, environment, "/sdk/flags").body


async def test_missing(environment):
    """Unknown and deleted items are an empty 404; without data there is no response yet."""
    polls = PollingHandler()
    for path in ("/sdk/flags/gone", "/sdk/flags/none", "/sdk/segments/none"):
        response = poll(polls, environment, path)
        assert (response.status, response.body) == (404, b"")
    environment.payload = None
    assert poll(polls, environment, "/sdk/flags") is None


@pytest.mark.parametrize(
    ("header", "accepted"),
    [(b"", False), (b"gzip", True), (b"GZIP;q=0.5, br", True), (b"gzip;q=0", False),
     (b"*", True), (b"*;q=0", False), (b"gzip;q=0, *", False), (b"identity, gzip;q=0.1", False),
     (b"gzip;q=x", False)],
)  # fmt: skip
def test_accept_encoding(header, accepted):
    """The weights of `Accept-Encoding` decide."""
    assert accepts_gzip(header) is accepted


async def test_a_debugger_shows_sizes_instead_of_data(environment):
    """A resource states its ETag and size, a response its status and size."""
    response = poll(PollingHandler(), environment, "/sdk/flags/a")
    size = len(response.body)
    assert repr(response) == f"<PreparedResponse [200, {size} bytes]>"
    assert repr(Resource((b"[", b"]"), b'"tag"', ())) == '<Resource "tag" [2 bytes]>'
