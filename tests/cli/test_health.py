"""`relay health` tells Docker and Kubernetes whether a relay is ready."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relay import announcement as announcement_module
from relay.cli import health


@contextmanager
def answering(answer: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Run a server on a free port that sends one response; yield its port and the requests."""
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
    """The exit code is 0 for a ready relay, and 1 for any other response."""
    with answering(answer) as (port, asked):
        assert health.main([], {"PORT": str(port)}) == code
    assert asked[0].startswith(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1:")


def test_the_argument_may_be_a_url() -> None:
    """`relay health URL` checks that URL."""
    with answering(b"HTTP/1.1 200 OK\r\n\r\n") as (port, asked):
        assert health.main([f"http://127.0.0.1:{port}/readyz/Shop"], {}) == 0
    assert asked[0].startswith(b"GET /readyz/Shop ")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_usage_is_no_check(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is printed, whatever runs."""
    assert health.main([flag], {}) == 0
    assert "relay health [URL]" in capsys.readouterr().out


def test_a_refused_connection_is_not_ready(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is 1, and a reason is printed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert health.main([], {"PORT": str(port)}) == 1
    assert capsys.readouterr().err.startswith("not ready: ")


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "ftp://h/", "http://", "http://h:x/", "http://h/\r\nX: y", "http://u@h"],
)
def test_an_invalid_url_is_rejected(url: str) -> None:
    """The error says so, and nothing is sent."""
    with pytest.raises(ValueError, match="address"):
        health.split(url)


HERE = announcement_module.namespace()
FIRST, LATER = (HERE, "1", "https", "9000"), (HERE, "77", "https", "9001")
ELSEWHERE = ("pid:[1]", "1", "https", "80")


@pytest.mark.parametrize(
    ("variables", "servers", "url"),
    [
        ({}, [], "http://127.0.0.1:8030"),
        ({"PORT": ""}, [], "http://127.0.0.1:8030"),
        ({"PORT": "80\n", "TLS_ENABLED": "Yes"}, [], "https://127.0.0.1:80"),
        ({}, [LATER], "https://127.0.0.1:9001"),
        ({}, [LATER, ELSEWHERE], "https://127.0.0.1:9001"),
        ({}, [LATER, (HERE, "78", "http", "9002")], "http://127.0.0.1:8030"),
        ({}, [LATER, (HERE, "78", "https", "8030")], "https://127.0.0.1:8030"),
        ({"PORT": "9001"}, [LATER, ELSEWHERE], "https://127.0.0.1:9001"),
        ({"PORT": "80"}, [LATER, ELSEWHERE], "https://127.0.0.1:80"),
        # One that is not there is not mistaken for another.
        ({"PORT": "8030", "TLS_ENABLED": "1"}, [LATER], "https://127.0.0.1:8030"),
        ({}, [ELSEWHERE], "http://127.0.0.1:8030"),
        # The variables of an image are not always read.
        ({"PORT": "8030"}, [LATER, FIRST], "https://127.0.0.1:9000"),
        ({"TLS_ENABLED": "true"}, [(HERE, "1", "http", "9000")], "http://127.0.0.1:9000"),
    ],
)
def test_the_own_relay_is_found(variables, servers, url) -> None:
    """The container's own command takes precedence, then PORT, then the only running relay."""
    assert health.own_url(variables, servers) == f"{url}/readyz"


def test_a_server_is_announced_until_it_ends() -> None:
    """By a name in the kernel's table of Unix sockets."""
    holder = announcement_module.announce(65123, tls=True)
    assert holder is not None
    announced = (HERE, str(os.getpid()), "https", "65123")
    assert announced in announcement_module.announced()
    assert announcement_module.announce(65123, tls=True) is None, (
        "one process has one server at a port"
    )
    holder.close()
    assert announced not in announcement_module.announced()


def test_names_of_other_programs_are_ignored(tmp_path: Path) -> None:
    """Whatever they are; a system without the table announces nothing."""
    table = tmp_path / "unix"
    names = (
        *("", " /run/x", " @relay/", " @relay/a/1/http/x", " @relay/a/1/ftp/1", " @relay/a/1/http"),
        *(" @relay/a/1/http/1/2", " @relay\xff", " x @relay/b/2/https/3", " @relay/a/1/http/80"),
    )
    head = "Num       RefCount Protocol Flags    Type St Inode Path\n"
    row = "0000000000000000: 00000002 00000000 00010000 0001 01 2342"
    table.write_text(head + "".join(f"{row}{name}\n" for name in names), "latin-1")
    assert announcement_module.announced(str(table)) == [
        ("b", "2", "https", "3"),
        ("a", "1", "http", "80"),
    ]
    assert announcement_module.announced(str(tmp_path / "none")) == []


def test_the_brackets_of_ipv6_addresses_are_removed() -> None:
    """`[::1]` is the host `::1`."""
    assert health.split("http://[::1]:80/x") == ("http", "::1", 80, "[::1]:80", "/x")


def test_the_check_imports_next_to_nothing() -> None:
    """Neither server nor TLS nor configuration is imported for a plain check."""
    program = (
        "import sys, relay.cli.health as h; h.main(['http://127.0.0.1:1/'], {});"
        "print(sorted({'ssl', 'asyncio', 'urllib', 'logging', 'relay.cli.main'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == "[]\n"
