"""The machine: which core does what, and what a server's processes cost."""

import os
import resource
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

ROOT = Path(__file__).resolve().parent.parent
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE = CORES[0]
LOAD_CORE = CORES[1 % len(CORES)]


@contextmanager
def pinned(*cores: int) -> Iterator[None]:
    """Stay on these cores; processes started meanwhile stay there for life."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin_threads(pid: int, core: int) -> None:
    """Let a process go on on one core."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def allow_many_files() -> int:
    """Raise this process's limit of open files to the hard limit, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class Closing(ABC):
    """Base of objects that are closed at the end of a `with`."""

    @abstractmethod
    def close(self) -> None:
        """End what it has begun."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Process:
    """A server on its cores, with the processes it starts."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        log: IO[bytes],
        cores: Sequence[int] = (SERVER_CORE,),
    ) -> None:
        self.folder = cwd
        self._arguments = command, dict(env), cwd, log, cores
        self._start()

    def _start(self) -> None:
        command, env, cwd, log, cores = self._arguments
        with pinned(*cores):
            self._program = subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._program.pid

    def running(self) -> bool:
        """True until it has ended."""
        return self._program.poll() is None

    def cpu_seconds(self) -> float:
        """CPU time so far, in user and system mode, of the whole tree."""
        return sum(map(cpu_seconds, self._tree()))

    def own_cpu_seconds(self) -> float:
        """CPU time so far of the first process alone, to the microsecond."""
        return cpu_seconds(self.pid)

    def private_bytes(self) -> int:
        """Memory that ending the tree would free (USS)."""
        rollups = (_fields(pid, "smaps_rollup") for pid in self._tree())
        return sum(each["Private_Clean"] + each["Private_Dirty"] for each in rollups)

    def proportional_bytes(self) -> int:
        """Memory of the tree, what its processes share counted once (PSS)."""
        return sum(_fields(pid, "smaps_rollup")["Pss"] for pid in self._tree())

    def children(self) -> list[int]:
        """Process IDs of what the first process has started."""
        return self._tree()[1:]

    def resident_bytes(self) -> int:
        """Resident memory of the tree, what its processes share counted for each."""
        return sum(_fields(pid, "status")["VmRSS"] for pid in self._tree())

    def peak_bytes(self) -> int:
        """The most resident memory each process of the tree ever had, summed."""
        return sum(_fields(pid, "status")["VmHWM"] for pid in self._tree())

    def stop(self) -> None:
        """Kill the tree: what it would do at a proper end is not measured."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._program.wait()

    def start_again(self) -> float:
        """Start it as before, after it was stopped; return the time just before exec."""
        started = time.monotonic()
        self._start()
        return started

    def _tree(self) -> list[int]:
        found = [self.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text().split())
        return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, to the microsecond."""
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) returns


def _fields(pid: int, file: str) -> dict[str, int]:
    """The kB lines of a file in /proc, in bytes."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    rows = (line.split() for line in lines if line.endswith(" kB"))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}
