"""The relay as people run it: `python -m relay` in a process of its own."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Self

from tests.support.serving import Address

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 15.0
"""Seconds that a wait may take before the test fails."""


def free_port() -> int:
    """A port that is free, and that the kernel gives to no connection meanwhile."""
    while True:
        port = random.randrange(10_000, 32_000)  # below the usual range of ephemeral ports
        with suppress(OSError), closing(socket.create_server(("", port))):
            return port


class RelayProcess:
    """One relay, started when entered and ended when left; may be killed and started again.

    Args:
        folder: an empty folder for its output.
        arguments: of the command line; by default it reads its variables.
        variables: beside `PATH` and `PORT`.
    """

    command: Sequence[str] = (sys.executable, "-m", "relay")
    cwd = ROOT
    """Where it runs; both may be another in a subclass."""

    def __init__(self, folder: Path, *arguments: str, **variables: str) -> None:
        self.port = free_port()
        self._arguments = arguments or ("--from-env",)
        self._variables = variables
        self._output = folder / f"relay-{self.port}.log"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        scheme = "https" if self._variables.get("TLS_ENABLED") else "http"
        return f"{scheme}://localhost:{self.port}"

    @property
    def address(self) -> Address:
        return Address(self.port)

    @property
    def log(self) -> str:
        """All that it has printed, to both outputs."""
        return self._output.read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it, and wait until its port is open."""
        await self.spawn()
        await self.until(self._listens)

    async def spawn(self) -> None:
        """Start it, and wait for nothing."""
        with self._output.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(*self.command, *self._arguments),
                cwd=self.cwd,
                env={"PATH": os.environ["PATH"], "PORT": str(self.port), **self._variables},
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
            )

    async def stop(self) -> int:
        """Ask it to end, as Docker does; return its exit code."""
        assert self._process is not None
        self._process.terminate()
        return await self.ended()

    async def ended(self) -> int:
        """Wait until it has ended; return its exit code."""
        assert self._process is not None
        async with asyncio.timeout(PATIENCE):
            return await self._process.wait()

    async def kill(self) -> None:
        """End it without a chance to do anything."""
        self.signal(signal.SIGKILL)
        await self.ended()

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def said(self, text: str, times: int = 1) -> None:
        """Wait until its log holds a text, so many times."""
        try:
            await self.until(lambda: self.log.count(text) >= times)
        except TimeoutError:
            raise AssertionError(f"{text!r} is not in the log:\n{self.log}") from None

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that has no event of its own, as long as the relay runs."""
        async with asyncio.timeout(PATIENCE):
            while not holds():
                assert self._process is not None
                assert self._process.returncode is None, f"the relay has ended:\n{self.log}"
                await asyncio.sleep(0.01)

    def _listens(self) -> bool:
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None and self._process.returncode is None:
            await self.kill()
