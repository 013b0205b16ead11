"""Polls: ETags, compression, and the credentials that allow them."""

import asyncio
import gzip
import json
from hashlib import sha1

import pytest

from relay.model.item import Item, Kind, parse
from relay.model.payload import Payload
from relay.web import access, responses
from relay.web.endpoints.polling import PollingHandler
from relay.web.resources import MAX_COMPRESSED_AT_ONCE, Resource, accepts_gzip
from tests.support.data import flag, segment
from tests.support.serving import SDK_KEY, Served


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
    response = PollingHandler()(environment, "/sdk/flags", b"", b"")
    tag = "relay-" + sha1(b"a:7b:2gone:3").hexdigest()[:15]
    assert dict(response.headers)[b"etag"] == tag.encode()
    assert json.loads(response.body).keys() == {"a", "b"}


@pytest.mark.parametrize("template", [b"%b", b'"%b"', b'W/"%b"', b'"x", "%b"'])
@pytest.mark.parametrize(
    "path", ["/sdk/flags", "/sdk/flags/a", "/sdk/segments/s", "/sdk/latest-all"]
)
async def test_unchanged(environment, path, template):
    """Old exact and standard forms of If-None-Match give a 304 with the ETag and no body."""
    poll = PollingHandler()
    etag = dict(poll(environment, path, b"", b"").headers)[b"etag"]
    if_none_match = etag if template == b"%b" else template % etag.strip(b'"')
    response = poll(environment, path, if_none_match, b"gzip")
    assert (response.status, response.body) == (304, b"")
    assert dict(response.headers)[b"etag"] == etag
    assert poll(environment, path, b"*", b"").status == 304
    assert poll(environment, path, b'"other"', b"").status == 200


async def test_etag_of_all_data_depends_on_content(environment):
    """The ETag changes with the content, even if versions stay; it does not with the order."""
    poll = PollingHandler()
    items = list(environment.payload)
    first = poll(environment, "/sdk/latest-all", b"", b"")
    environment.payload = Payload.of(reversed(items))
    assert dict(poll(environment, "/sdk/latest-all", b"", b"").headers)[b"etag"] in first.head
    environment.payload = Payload.of([*items, item(Kind.FLAG, flag("a", 7, "new"))])
    assert dict(poll(environment, "/sdk/latest-all", b"", b"").headers)[b"etag"] not in first.head


async def test_large_bodies_are_not_compressed_on_the_loop(environment):
    """The fast path leaves a large body to the application until it has been compressed."""
    poll = PollingHandler()
    environment.payload = Payload.of([item(Kind.FLAG, flag("a", 1, "x" * MAX_COMPRESSED_AT_ONCE))])
    assert poll(environment, "/sdk/flags", b"", b"gzip") is None
    args = (environment, "/sdk/flags", b"", b"gzip")
    first, same = await asyncio.gather(poll.complete(*args), poll.complete(*args))
    assert poll(*args) is first is same
    assert gzip.decompress(first.body) == poll(environment, "/sdk/flags", b"", b"").body


async def test_missing(environment):
    """Unknown and deleted items are an empty 404; other paths, and missing data, are no polls."""
    poll = PollingHandler()
    for path in (
        "/sdk/flags/",
        "/sdk/flags/a/b",
        "/sdk/flags//",
        "/sdk/segments/..",
        "/sdk/flags/.",
    ):
        assert poll(environment, path, b"", b"") is None
    for path in ("/sdk/flags/gone", "/sdk/flags/none"):
        response = poll(environment, path, b"", b"")
        assert (response.status, response.body) == (404, b"")
    assert poll(environment, "/all", b"", b"") is None
    environment.payload = None
    assert poll(environment, "/sdk/flags", b"", b"") is None


@pytest.mark.parametrize(
    ("header", "accepted"),
    [(b"", False), (b"gzip", True), (b"GZIP;q=0.5, br", True), (b"gzip;q=0", False),
     (b"*", True), (b"*;q=0", False), (b"gzip;q=0, *", False), (b"identity, gzip;q=0.1", False),
     (b"gzip;q=x", False)],
)  # fmt: skip
def test_accept_encoding(header, accepted):
    """The weights of `Accept-Encoding` decide."""
    assert accepts_gzip(header) is accepted


@pytest.mark.parametrize(
    ("header", "status"),
    [(b"", 401), (b"api_key  %b ", 0), (b"%b", 0), (b"api_key api_key %b", 401),
     (b"Bearer %b", 401), (b"other", 401)],
)  # fmt: skip
async def test_credentials(header, status):
    """A key is accepted alone or with the prefix `api_key`."""
    served = Served()
    authorization = header.replace(b"%b", SDK_KEY.encode())
    resolved = access.for_sdk_key(served.relay, authorization, "")
    if status:
        assert resolved.status == status
    else:
        assert resolved.environment is served.environment
    assert isinstance(
        access.for_mobile_key(served.relay, authorization, ""), responses.PreparedResponse
    )


async def test_refusals():
    """Filters and unknown IDs are refused in ld-relay's words."""
    served = Served()
    key = SDK_KEY.encode()
    assert access.for_sdk_key(served.relay, key, "f") is responses.UNKNOWN_FILTER
    assert access.for_environment_id(served.relay, "x", "") is responses.UNKNOWN_ENVIRONMENT_ID
    assert access.for_client(served.relay, key, "") is responses.UNKNOWN_CREDENTIAL
    assert access.for_client(served.relay, b"env-1", "").environment is served.environment


async def test_a_debugger_shows_sizes_instead_of_data(environment):
    """A resource states its ETag and size, a response its status and size."""
    response = PollingHandler()(environment, "/sdk/flags/a", b"", b"")
    size = len(response.body)
    assert repr(response) == f"<PreparedResponse [200, {size} bytes]>"
    assert repr(Resource((b"[", b"]"), b'"tag"', ())) == '<Resource "tag" [2 bytes]>'
