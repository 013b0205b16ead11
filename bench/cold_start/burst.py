"""Processes with an SDK each that stand ready, and are let go: together, or one by one."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple, Self

from bench import data
from bench.machine import CORES, LOAD_CORE, ROOT, pin_threads, pinned

PACKAGES = ROOT / "tests/sdk-node"
"""Where the Node SDK is installed (`make` does that)."""
NODE = "node"
NODE_PROGRAM = Path(__file__).with_name("node_sdk.mjs")
INITIAL_LIMIT = 60
"""Seconds that a function gives its SDK: none shall give up because this machine is small."""
READY_LIMIT = 300
"""Seconds until the last process must stand ready: Node starts 200 times on one core."""
END_LIMIT = 2 * INITIAL_LIMIT
"""Seconds until the last process must have ended."""
SDKS = ("python", "node")


@dataclass(frozen=True)
class Setup:
    """Configuration of the SDK of each process."""

    sdk_key: str
    flags_url: str
    events_url: str
    stream: bool
    redis: str = ""
    """URL of the database to read in daemon mode."""
    flag: str = data.flag_key(0)
    event: str = data.EVENT_KEY
    limit: int = INITIAL_LIMIT
    count: int = 1
    """Processes that a program makes."""
    number: int = 0
    """Number of the process, where a program makes one."""


class Run(NamedTuple):
    """Result of one process."""

    number: int
    first: float
    """Seconds from the SDK's construction to the first flag's value."""
    queued: float
    """Seconds of these in which it could have gone on, but had no core; too many where threads
    waited side by side."""
    cpu: float
    """CPU seconds of these."""
    total: float
    """Seconds until `close` had returned."""
    error: str
    """Empty when the value was the flag's."""
    closed: bool
    """True if `close` returned without an error."""

    @property
    def unhindered(self) -> float:
        """Seconds to the first flag's value, less those for which it had no core."""
        return max(self.first - self.queued, self.cpu)


class Standing:
    """Processes that stand ready: each goes when it has read a byte, or at the end of the input."""

    def __init__(self, gate: IO[bytes], lines: "_Lines", count: int) -> None:
        self._gate = gate
        self._lines = lines
        self._count = count

    def let_all_go(self) -> list[Run]:
        """Let them go together; return how those fared that said so in time."""
        self._gate.close()
        return self._runs(self._count)

    def let_one_go(self) -> None:
        """Let one of them go."""
        self._count -= 1
        self._gate.write(b".")

    def one(self) -> list[Run]:
        """Return how the one fared that was let go last; nothing if it did not say so in time."""
        return self._runs(1)

    def _runs(self, count: int) -> list[Run]:
        return [Run(**json.loads(line)) for line in self._lines.take(count, END_LIMIT)]


@contextmanager
def standing_ready(sdk: str, setup: Setup, count: int) -> Iterator[Standing]:
    """Start `count` processes and wait until all stand ready."""
    output, said = os.pipe()
    barrier, gate = os.pipe()
    with ExitStack() as end:
        lines = end.enter_context(_Lines(output))
        held = end.enter_context(os.fdopen(gate, "wb", buffering=0))
        try:
            programs = [
                end.enter_context(_program(command, barrier, said))
                for command in _commands(sdk, setup, count)
            ]
        finally:
            os.close(barrier)
            os.close(said)
        ready = lines.take(count, READY_LIMIT)
        if ready != ["ready"] * count:
            raise RuntimeError(f"{len(ready)} of {count} processes stood ready: {ready[-1:]}")
        for program in programs:
            pin_threads(program, LOAD_CORE)
        yield Standing(held, lines, count)


def _commands(sdk: str, setup: Setup, count: int) -> Iterator[Sequence[str]]:
    """Commands to start: one Python program that forks, but as many of Node, which cannot."""
    if sdk == "python":
        given = json.dumps(asdict(replace(setup, count=count)))
        yield [sys.executable, "-m", "bench.cold_start.python_sdk", given]
        return
    for number in range(count):
        given = json.dumps(asdict(replace(setup, number=number)))
        yield [NODE, str(NODE_PROGRAM), str(PACKAGES), given]


@contextmanager
def _program(command: Sequence[str], barrier: int, said: int) -> Iterator[int]:
    """Start one, on all cores unless it makes others; end it with those, should it still run."""
    cores = CORES if command[0] == NODE else {LOAD_CORE}
    with pinned(*cores):
        program = subprocess.Popen(
            command, cwd=ROOT, stdin=barrier, stdout=said, start_new_session=True
        )
    try:
        yield program.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.wait()


class _Lines:
    """The lines that all processes write into one pipe; each comes whole."""

    def __init__(self, output: int) -> None:
        self._file: IO[bytes] = os.fdopen(output, "rb", buffering=0)
        self._rest = b""

    def take(self, count: int, seconds: float) -> list[str]:
        """Return the next `count` lines, fewer if time or the processes end before."""
        until = time.monotonic() + seconds
        lines: list[bytes] = []
        while len(lines) < count:
            line, ended, rest = self._rest.partition(b"\n")
            if ended:
                lines.append(line)
                self._rest = rest
                continue
            left = max(0.0, until - time.monotonic())
            if not select.select([self._file], [], [], left)[0]:
                break
            more = self._file.read(65536)
            if not more:
                break
            self._rest += more
        return [line.decode() for line in lines]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
