"""Load of a large fleet on its Redis. Its members have no clients; many share a process."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench.databases import Valkey
from bench.machine import CORES, ROOT, Closing, cpu_seconds, pinned
from bench.measures import Measured
from bench.servers import Certificate, Server
from bench.table import OURS

WHOLE, WATCHING = 5, (15, 15, 15)
"""Members of both kinds, see `bench.members`: the whole ones, among whom the leaders are, share one
process, the others three."""
MEMBERS = WHOLE + sum(WATCHING)
ENVIRONMENTS = 100
CHANGES = 100
"""Changes a second, in all environments together."""
START_SECONDS = 60
SETTLE_SECONDS = 5
WATCHED_SECONDS = 15
READS = 5
"""Times that all members read all data at once; their median counts."""
LABEL = f"{MEMBERS} members × {ENVIRONMENTS} environments"
AT_ONCE = f"{MEMBERS} members read 2 MB at once"


class Members(Closing):
    """Members of a fleet, in a few processes on all cores."""

    def __init__(
        self,
        database: Valkey,
        environments: int,
        dataset: str,
        whole: int = WHOLE,
        watching: Sequence[int] = WATCHING,
    ) -> None:
        self._url = database.variables["REDIS_URL"]
        self._environments, self._dataset = environments, dataset
        self._programs: list[subprocess.Popen[str]] = []
        roles = [environments * (whole - 1), environments, 0]
        try:
            self._start(whole, 0)
            self._await([*roles, 0])
            for number in watching:
                self._start(0, number)
            self._await([*roles, sum(watching) * environments])
        except BaseException:
            self.close()
            raise

    def _await(self, wanted: list[int]) -> None:
        until = time.monotonic() + START_SECONDS
        while (roles := self.roles()) != wanted:
            if time.monotonic() > until:
                raise RuntimeError(f"followers, leaders, members alone, watchers are {roles}")
            time.sleep(0.2)

    def _start(self, whole: int, watching: int) -> None:
        given = [self._url, str(whole), str(watching), str(self._environments), self._dataset]
        with pinned(*CORES):
            program = subprocess.Popen(
                [sys.executable, "-m", "bench.members", *given],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self._programs.append(program)

    def roles(self) -> list[int]:
        """Return the numbers of followers, leaders, members alone, and watchers that look."""
        return [sum(each) for each in zip(*self._ask(roles=1), strict=True)]

    def change(self, changes: float) -> None:
        """Let each environment change so many times a second from now on."""
        self._ask(changes=changes, since=time.monotonic())

    def read(self) -> float:
        """Let all members read all data at once; return the seconds until the last has them."""
        start = time.monotonic() + 0.1
        return max(self._ask(read_at=start)) - start

    def cpu_seconds(self) -> float:
        """Return the CPU time that they have taken so far."""
        return sum(cpu_seconds(program.pid) for program in self._programs)

    def _ask(self, **order: float) -> list[Any]:
        for program in self._programs:
            assert program.stdin
            program.stdin.write(json.dumps(order) + "\n")
            program.stdin.flush()
        answers = []
        for program in self._programs:
            assert program.stdout
            line = program.stdout.readline()
            if not line:
                raise RuntimeError("members have ended")
            answers.append(json.loads(line))
        return answers

    def close(self) -> None:
        for program in self._programs:
            program.kill()
            program.communicate()


def load(server: Server, _: Certificate) -> Measured:
    """Measure the CPU time of Redis while nothing changes, and while much does."""
    if server.name != OURS:
        return {}
    with Valkey() as database, Members(database, ENVIRONMENTS, "2k") as members:
        time.sleep(SETTLE_SECONDS)
        idle, _ = _watch(database)
        members.change(CHANGES / ENVIRONMENTS)
        time.sleep(SETTLE_SECONDS)
        busy, published = _watch(database)
    return {
        f"Redis, {LABEL}, idle: CPU": idle,
        f"Redis, {LABEL}, {CHANGES} changes/s: CPU": busy,
        f"Redis, {LABEL}, {CHANGES} changes/s: published": published,
    }


def _watch(database: Valkey) -> tuple[float, float]:
    """Return the CPU time of Redis in percent, and publications a second."""
    cpu, entries, start = database.cpu_seconds(), entries_of(database), time.monotonic()
    time.sleep(WATCHED_SECONDS)
    seconds = time.monotonic() - start
    used = database.cpu_seconds() - cpu
    return used / seconds * 100, (entries_of(database) - entries) / seconds


def entries_of(database: Valkey) -> int:
    stream: Any = database.client.xinfo_stream("relay:feed:1")
    return int(stream["entries-added"])


def read(server: Server, _: Certificate) -> Measured:
    """Let all members read all data at once, as after a restart of Redis."""
    if server.name != OURS:
        return {}
    with Valkey() as database, Members(database, 1, "2m") as members:
        time.sleep(SETTLE_SECONDS)
        redis, own = database.cpu_seconds(), members.cpu_seconds()
        times = sorted(members.read() for _ in range(READS))
        redis, own = database.cpu_seconds() - redis, members.cpu_seconds() - own
    return {
        f"{AT_ONCE}: last": times[READS // 2],
        f"{AT_ONCE}: CPU of Redis, each": redis / READS / MEMBERS * 1e3,
        f"{AT_ONCE}: CPU of a member": own / READS / MEMBERS * 1e3,
    }
