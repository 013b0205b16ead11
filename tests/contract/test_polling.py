"""Polling SDKs get the same bytes at both doors, with and without TLS."""

from __future__ import annotations

import gzip
import json

import pytest

from relay.protocol import fdv1
from relay.web.resources import MAX_COMPRESSED_AT_ONCE
from tests.support.data import all_data, flag, segment
from tests.support.serving import SDK_KEY, Address, Served, serving

LARGE = flag("large", 3, "x" * (MAX_COMPRESSED_AT_ONCE + 1))
DATA = all_data(flag("lamp", 7), flag("ключ", 2), LARGE, segment("crowd", 5))
PATHS = (
    *("/sdk/flags", "/sdk/flags/lamp", "/sdk/flags/large", "/sdk/segments/crowd"),
    *("/sdk/latest-all", "/sdk/flags/none", "/sdk/segments/lamp", "/sdk/flags/lamp%20"),
    *("/sdk/flags/%D0%BA%D0%BB%D1%8E%D1%87", "/sdk/flags?a=b", "/sdk/flags/a/b", "/sdk/flags/"),
    *(
        "/sdk/flags//",
        "/sdk/flags/../flags",
        "/sdk/segments",
        "/sdk/flags/lamp#x",
        "/sdk/flags?filter=x",
        "/sdk/flags?filter=",
        "/sdk/flags?",
        "/sdk/flags/lamp?a=%zz&filter=%78",
        "/sdk/latest-all?f%69lter=&filter=x",
    ),
)
HEADERS = (
    (),
    ("Accept-Encoding: gzip",),
    ("Accept-Encoding: br, gzip;q=0",),
    ("If-None-Match: *",),
)


async def deliver(served: Served, text: str) -> None:
    changes = fdv1.parse("put", b'{"path":"/","data":' + text.encode() + b"}")
    assert changes is not None
    await served.source.give(changes)


async def exchange(address: Address, path: str, *headers: str, method: str = "GET") -> bytes:
    """Send one request on a connection that stays open; return the answer without its date."""
    reader, writer = await address.connect()
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: {SDK_KEY}", *headers]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    head = await reader.readuntil(b"\r\n\r\n")
    kept = [line for line in head.split(b"\r\n") if not line.startswith(b"date: ")]
    sizes = [int(line.split()[1]) for line in kept if line.startswith(b"content-length: ")]
    size = sizes[0] if sizes and method != "HEAD" else 0
    body = await reader.readexactly(size)
    writer.close()
    return b"\r\n".join(kept) + body


async def all_variants(address: Address) -> dict[tuple, bytes]:
    return {
        (path, headers): await exchange(address, path, *headers)
        for path in PATHS
        for headers in HEADERS
    }


async def test_both_doors_give_the_same_bytes(door):
    """Every path in every variant: status, headers in their order, and body."""
    served = Served()
    async with serving(served, **door) as address:
        await deliver(served, DATA)
        received = await all_variants(address)
        again = await all_variants(address)
    other = Served()
    async with serving(other, front=not door["front"]) as address:
        await deliver(other, DATA)
        reference = await all_variants(address)
    beside = [key for key in reference if "#" not in key[0]]
    assert {key: received[key] for key in beside} == {key: reference[key] for key in beside}
    assert again == received
    statuses = {answer.split()[1] for answer in received.values()}
    assert statuses == {b"200", b"301", b"304", b"404"}


async def test_compressed_bodies_hold_the_same(door):
    """gzip is sent where it is asked for and worth it, for all sizes; the ETag stays."""
    served = Served()
    async with serving(served, **door) as address:
        await deliver(served, DATA)
        for path in ("/sdk/flags", "/sdk/latest-all", "/sdk/flags/large"):
            plain = await exchange(address, path)
            zipped = await exchange(address, path, "Accept-Encoding: gzip")
            head, _, body = zipped.partition(b"\r\n\r\n")
            assert b"\r\ncontent-encoding: gzip\r\n" in head + b"\r\n"
            assert b"\r\nvary: Accept-Encoding\r\n" in head
            assert gzip.decompress(body) == plain.partition(b"\r\n\r\n")[2]


async def test_head_is_get_without_a_body(door):
    """HEAD gives the headers of GET, its length included."""
    served = Served()
    async with serving(served, **door) as address:
        await deliver(served, DATA)
        for path in PATHS:
            head = await exchange(address, path, method="HEAD")
            get = await exchange(address, path)
            assert head == get.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


async def test_waiting_without_data(door):
    """While there are no data, polls get 503, and the data the moment there are some."""
    served = Served()
    async with serving(served, **door) as address:
        for path in ("/sdk/flags", "/sdk/flags/lamp", "/sdk/segments/crowd", "/sdk/latest-all"):
            answer = await exchange(address, path)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert answer.endswith(b"\r\n\r\nclient was not initialized")
            assert b"\r\nx-ld-envid: env-1\r\n" in answer
        await deliver(served, DATA)
        answer = await exchange(address, "/sdk/latest-all")
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == json.loads(DATA)


async def test_a_change_is_polled_at_once(door):
    """Nobody gets old data after a change, and the old ETag no longer matches."""
    served = Served()
    async with serving(served, **door) as address:
        for version in (1, 2, 3):
            await deliver(served, all_data(flag("lamp", version)))
            etag = f"relay-{version}"
            answer = await exchange(
                address, "/sdk/flags/lamp", f"If-None-Match: relay-{version - 1}"
            )
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert f"\r\netag: {etag}\r\n".encode() in answer
            answer = await exchange(address, "/sdk/flags/lamp", f"If-None-Match: {etag}")
            assert answer.startswith(b"HTTP/1.1 304 ")


@pytest.mark.parametrize("header", ["api_key {}", " {} ", "api_key  {}"])
async def test_forms_of_the_key(door, header):
    """Old SDKs send a prefix; blanks around do not matter."""
    served = Served()
    async with serving(served, **door) as address:
        await deliver(served, DATA)
        reader, writer = await address.connect()
        given = header.format(SDK_KEY)
        request = f"GET /sdk/flags/lamp HTTP/1.1\r\nHost: x\r\nAuthorization: {given}\r\n\r\n"
        writer.write(request.encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.close()
