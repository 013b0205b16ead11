"""`relay health` tells Docker and Kubernetes whether a relay is ready."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from relay import health


@contextmanager
def answering(answer: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A server on a free port that gives one answer; and what it was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(65536))
                connection.sendall(answer)

        thread = threading.Thread(target=run)
        thread.start()
        yield listener.getsockname()[1], asked
        thread.join(10)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", 0),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", 1),
        (b"HTTP/1.1 301 Moved\r\n\r\n", 1),
        (b"SSH-2.0-OpenSSH\r\n", 1),
        (b"", 1),
        (b"x" * 5000, 1),
    ],
)
def test_only_200_counts_as_ready(answer: bytes, code: int) -> None:
    """The exit code is 0 for a ready relay and 1 for whatever else answers."""
    with answering(answer) as (port, asked):
        assert health.main([], {"PORT": str(port)}) == code
    assert asked[0].startswith(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1:")


def test_a_whole_address_may_be_given() -> None:
    """`relay health URL` asks that URL."""
    with answering(b"HTTP/1.1 200 OK\r\n\r\n") as (port, asked):
        assert health.main([f"http://127.0.0.1:{port}/readyz/Shop"], {}) == 0
    assert asked[0].startswith(b"GET /readyz/Shop ")


def test_nobody_there_is_not_ready(capsys: pytest.CaptureFixture[str]) -> None:
    """A refused connection gives 1 and a reason."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert health.main([], {"PORT": str(port)}) == 1
    assert capsys.readouterr().err.startswith("not ready: ")


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "ftp://h/", "http://", "http://h:x/", "http://h/\r\nX: y", "http://u@h"],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    """A bad address is said to be one; nothing is sent."""
    with pytest.raises(ValueError, match="address"):
        health.split(url)


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, "http://127.0.0.1:8030/readyz"),
        ({"PORT": ""}, "http://127.0.0.1:8030/readyz"),
        ({"PORT": "80", "TLS_ENABLED": "Yes"}, "https://127.0.0.1:80/readyz"),
    ],
)
def test_the_own_relay_is_found_by_its_variables(variables: dict[str, str], url: str) -> None:
    """PORT and TLS_ENABLED say where the relay of this host is."""
    assert health.own_url(variables) == url


def test_ipv6_addresses_keep_their_brackets_out_of_the_socket() -> None:
    """`[::1]` is the host `::1`."""
    assert health.split("http://[::1]:80/x") == ("http", "::1", 80, "[::1]:80", "/x")


def test_the_check_imports_next_to_nothing() -> None:
    """Neither the server nor TLS nor the configuration is loaded for a plain check."""
    program = (
        "import sys, relay.health as h; h.main(['http://127.0.0.1:1/'], {});"
        "print(sorted({'ssl', 'asyncio', 'urllib', 'logging', 'relay.cli'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == "[]\n"
