"""Extensions of uvicorn's protocol: absolute URLs and HTTP/1.0."""

from __future__ import annotations

import pytest

from relay.streams.transport import LAST_CHUNK, encode_chunk
from relay.web.protocol import BareTransport, with_path

HEAD = b"HTTP/1.1 200 OK\r\n%bconnection: close\r\n\r\n"


class Transport:
    """Transport that records writes."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/", b"/"),
        (b"*", b"*"),
        (b"", b""),
        (b"/a?u=http://x", b"/a?u=http://x"),
        (b"http://h", b"http://h/"),
        (b"http://h?", b"http://h/?"),
        (b"http://h?a=http://x/b", b"http://h/?a=http://x/b"),
        (b"https://[::1]:80", b"https://[::1]:80/"),
        (b"http://h/a?b", b"http://h/a?b"),
        (b"http://", b"http://"),
        (b"host:80", b"host:80"),
    ],
)
def test_a_url_without_a_path_gets_one(target, path):
    """A URL without a path gets `/`; any other target is unchanged."""
    assert with_path(target) == path


def test_chunked_encoding_is_removed():
    """Chunks are decoded, even several in one write, and the head does not announce them."""
    transport = Transport()
    bare = BareTransport(transport)
    bare.write(HEAD % b"transfer-encoding: chunked\r\n")
    bare.write(encode_chunk(b"one\r\n"))
    bare.write(encode_chunk(b"two") + encode_chunk(b"three") + LAST_CHUNK)
    assert transport.written == HEAD % b"" + b"one\r\ntwothree"


def test_a_body_with_a_length_is_unchanged():
    """A body with a length is not decoded, even if it looks like chunks."""
    transport = Transport()
    bare = BareTransport(transport)
    bare.write(HEAD % b"content-length: 5\r\n")
    bare.write(LAST_CHUNK)
    assert transport.written == HEAD % b"content-length: 5\r\n" + LAST_CHUNK
