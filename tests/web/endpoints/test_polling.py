"""What is polled, and who may."""

import asyncio
import gzip
import json
from hashlib import sha1

import pytest

from relay.model.item import Item, Kind, parse
from relay.model.payload import Payload
from relay.web import access, responses
from relay.web.endpoints.polling import PollingHandler
from relay.web.resources import MAX_COMPRESSED_AT_ONCE, accepts_gzip
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


async def test_etag_of_all_flags_is_the_references(environment):
    """The ETag is made of sorted keys and versions, tombstones included, and is not quoted."""
    answer = PollingHandler()(environment, "/sdk/flags", b"", b"")
    tag = "relay-" + sha1(b"a:7b:2gone:3").hexdigest()[:15]
    assert dict(answer.headers)[b"etag"] == tag.encode()
    assert json.loads(answer.body).keys() == {"a", "b"}


@pytest.mark.parametrize("form", [b"%b", b'"%b"', b'W/"%b"', b'"x", "%b"'])
@pytest.mark.parametrize(
    "path", ["/sdk/flags", "/sdk/flags/a", "/sdk/segments/s", "/sdk/latest-all"]
)
async def test_unchanged(environment, path, form):
    """Old exact and standard forms of If-None-Match give a 304 with the ETag and no body."""
    poll = PollingHandler()
    etag = dict(poll(environment, path, b"", b"").headers)[b"etag"]
    asked = etag if form == b"%b" else form % etag.strip(b'"')
    answer = poll(environment, path, asked, b"gzip")
    assert (answer.status, answer.body) == (304, b"")
    assert dict(answer.headers)[b"etag"] == etag
    assert poll(environment, path, b"*", b"").status == 304
    assert poll(environment, path, b'"other"', b"").status == 200


async def test_data_etag_sees_content(environment):
    """Other content with the same versions has another ETag; other order has not."""
    poll = PollingHandler()
    items = list(environment.payload)
    first = poll(environment, "/sdk/latest-all", b"", b"")
    environment.payload = Payload.of(reversed(items))
    assert dict(poll(environment, "/sdk/latest-all", b"", b"").headers)[b"etag"] in first.head
    environment.payload = Payload.of([*items, item(Kind.FLAG, flag("a", 7, "new"))])
    assert dict(poll(environment, "/sdk/latest-all", b"", b"").headers)[b"etag"] not in first.head


async def test_large_bodies_are_not_compressed_on_the_loop(environment):
    """The front door leaves a large body to the application until it has been compressed."""
    poll = PollingHandler()
    environment.payload = Payload.of([item(Kind.FLAG, flag("a", 1, "x" * MAX_COMPRESSED_AT_ONCE))])
    assert poll(environment, "/sdk/flags", b"", b"gzip") is None
    asked = (environment, "/sdk/flags", b"", b"gzip")
    made, same = await asyncio.gather(poll.complete(*asked), poll.complete(*asked))
    assert poll(*asked) is made is same
    assert gzip.decompress(made.body) == poll(environment, "/sdk/flags", b"", b"").body


async def test_missing(environment):
    """Unknown and deleted items are an empty 404; other paths and waiting environments no poll."""
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
        answer = poll(environment, path, b"", b"")
        assert (answer.status, answer.body) == (404, b"")
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
    """Weights of Accept-Encoding count."""
    assert accepts_gzip(header) is accepted


@pytest.mark.parametrize(
    ("header", "status"),
    [(b"", 401), (b"api_key  %b ", 0), (b"%b", 0), (b"api_key api_key %b", 401),
     (b"Bearer %b", 401), (b"other", 401)],
)  # fmt: skip
async def test_credentials(header, status):
    """Only the plain key and the prefix `api_key` are understood."""
    served = Served()
    given = header.replace(b"%b", SDK_KEY.encode())
    found = access.for_sdk_key(served.relay, given, "")
    assert found is served.environment if not status else found.status == status
    assert isinstance(access.for_mobile_key(served.relay, given, ""), responses.PreparedResponse)


async def test_refusals():
    """Filters and unknown IDs are refused in the reference's words."""
    served = Served()
    key = SDK_KEY.encode()
    assert access.for_sdk_key(served.relay, key, "f") is responses.UNKNOWN_FILTER
    assert access.for_environment_id(served.relay, "x", "") is responses.UNKNOWN_ENVIRONMENT_ID
    assert access.for_client(served.relay, key, "") is responses.UNKNOWN_CREDENTIAL
    assert access.for_client(served.relay, b"env-1", "") is served.environment
