"""LaunchDarkly's tests of SDKs, of those that follow it by FDv2, against a relay."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.process import free_port

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
HARNESS = os.environ.get("SDK_TEST_HARNESS", "")
LONG = bool(os.environ.get("SDK_TEST_HARNESS_LONG"))
"""True to run the cases that take minutes, too."""
KNOWN = set((HERE / "known-failures.txt").read_text().splitlines())
KNOWN |= set((HERE / "known-failures-long.txt").read_text().splitlines()) if LONG else set()
SUITES = "^streaming|^polling"
MINUTES = 60.0


@pytest.mark.skipif(not HARNESS, reason="SDK_TEST_HARNESS does not name LaunchDarkly's harness")
@pytest.mark.timeout((60 if LONG else 20) * MINUTES)
async def test_the_harness_finds_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    """A case that has come to pass is to be taken from the list."""
    port, failures = free_port(), tmp_path / "failures.txt"
    failures.touch()
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.harness.service", "--port", str(port)), cwd=ROOT
    )
    try:
        async with asyncio.timeout(MINUTES):
            while not listens(port):  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.1)
        harness = await asyncio.create_subprocess_exec(
            *(HARNESS, "-url", f"http://localhost:{port}", "-run", SUITES),
            *("-port", str(free_port()), "-record-failures", str(failures)),
            *(["-enable-long-running-tests"] if LONG else []),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await harness.communicate()
    finally:
        service.terminate()
        await service.wait()
    summary = re.search(rb"Test Summary: .*", output)
    assert summary, output[-2000:].decode()
    print(summary[0].decode())  # noqa: T201 - the figures
    assert set(failures.read_text().splitlines()) == KNOWN
    assert int(re.findall(rb"(\d+) ran", summary[0])[0]) > len(KNOWN)


def listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
