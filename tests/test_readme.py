"""Commands that README says to paste work when pasted."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NODE_PACKAGES = ROOT / "tests/sdk-node/node_modules"
START_LIMIT = 20.0
"""Seconds until the relay must answer."""


def snippet(command: str) -> str:
    """The text that README feeds to a command on its standard input."""
    found = re.search(
        rf"{re.escape(command)} - <<'END'\n(.*?)^END$", README, re.DOTALL | re.MULTILINE
    )
    assert found, command
    return found.group(1)


@pytest.fixture(name="port", scope="module")
def demo_relay() -> Iterator[int]:
    """A relay with the demo flags, started as `make run` starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "relay", "serve", "--flags", "config/flags.yaml"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PORT": str(port)}) as relay:
        try:
            wait_until_ready(port, relay)
            yield port
        finally:
            relay.terminate()
            assert relay.wait(timeout=15) == 0


def wait_until_ready(port: int, relay: subprocess.Popen[bytes]) -> None:
    """Return once the relay says that it is ready."""
    deadline = time.monotonic() + START_LIMIT
    while True:
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/readyz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            assert relay.poll() is None, "the relay has ended"
            assert time.monotonic() < deadline
            time.sleep(0.02)


def run(command: list[str], program: str, **environment: str) -> str:
    """Run a program given on the standard input, and return what it prints."""
    done = subprocess.run(
        command,
        input=program,
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_curl_line(port: int) -> None:
    """The first line to paste shows a flag."""
    line = re.search(r"(?m)^curl .*$", README)
    assert line
    # curl itself may be missing here.
    _, _, _, header, url = shlex.split(line.group(0).replace("8030", str(port)))
    request = urllib.request.Request(url, headers=dict([header.split(": ")]))
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert b"Hello from Relay" in answer.read()


def test_the_python_snippet(port: int) -> None:
    """The Python SDK sees the demo flags."""
    program = snippet(".venv/bin/python").replace("8030", str(port))
    assert run([sys.executable, "-"], program) == "Python sees: Hello from Relay\n"


@pytest.mark.sdk
def test_the_node_snippet(port: int) -> None:
    """The Node SDK sees the demo flags."""
    node = shutil.which("node")
    assert node, "Node.js is missing; `make test` installs it, or says how"
    program = snippet("NODE_PATH=.venv/node/node_modules node").replace("8030", str(port))
    shown = run([node, "-"], program, NODE_PATH=str(NODE_PACKAGES))
    assert "Node sees: Hello from Relay\n" in shown


def test_make_prints_what_readme_says_to_paste() -> None:
    """`make run` shows the snippets of README, for the port that it starts on."""
    shown = subprocess.run(
        ["make", "--no-print-directory", "hints", "PORT=8123"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout
    assert "http://localhost:8123/sdk/flags/greeting" in shown
    assert snippet(".venv/bin/python").replace("8030", "8123") in shown
    assert "```" not in shown
    assert "8030" not in shown
