"""Cache of compiled programs for one environment, filled on demand.

Compiling a large payload would block the event loop for too long, so it runs in slices. If a
payload differs little from the previous one, almost everything is reused.
"""

from __future__ import annotations

import asyncio

from relay import clock
from relay.aio import SLICE, run_for
from relay.evaluation.clientjournal import ClientJournal
from relay.evaluation.compiled.flag import CompiledFlag
from relay.evaluation.compiled.index import Index
from relay.evaluation.compiled.program import FlagCompiler, Program
from relay.evaluation.sdkkind import SDKKind
from relay.model.item import version_of_time
from relay.model.journal import Journal
from relay.model.payload import Payload
from relay.steps import Steps, Work

AT_ONCE = 0.002
"""Seconds of compiling done synchronously: enough to check thousands of flags for those that a
patch has changed."""


class ProgramCache:
    """Programs of an environment's newest payload, compiled on demand for each kind of SDK.

    Args:
        journal: of the environment; knows a change before `update`.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal or Journal("")
        self.client_journal = ClientJournal(self._journal)
        """Journal of what client-side SDKs see."""
        self._payload: Payload | None = None
        self._compiler: FlagCompiler | None = None
        self.version = 0
        """Version of the newest data; greater than that of all before."""
        self._programs: dict[SDKKind, Program] = {}
        self._partials: dict[SDKKind, Work[Program]] = {}
        """Programs that are compiled in part."""
        self._indexes: dict[SDKKind, Index] = {}
        """Indexes of the last programs, possibly of earlier payloads."""
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        ready = ", ".join(sdk_kind.value for sdk_kind in self._programs)
        return f"<ProgramCache version {self.version}, ready: {ready or 'none'}>"

    def update(self, payload: Payload, version: int = 0) -> None:
        """Discard the programs of earlier data; new ones are compiled on demand.

        The version of the data is roughly the time in seconds, so that it keeps growing across
        restarts. It is greater than the version of any flag, because SDKs hold each flag under the
        flag's own version until a stream changes it.

        Args:
            payload: the new data.
            version: version that another process has chosen for them; 0 to choose one.
        """
        if payload is self._payload:
            return
        self.client_journal.record(self._payload)
        self._payload = payload
        least = max(self.version + 1, payload.newest + 1)
        self.version = max(least, version or version_of_time(clock.unix()))
        self._programs = {}
        self._partials = {}

    def is_newest(self, program: Program) -> bool:
        """Return whether a program is that of the newest payload."""
        return program.version == self.version

    def current(self, sdk_kind: SDKKind, /) -> Program | None:
        """Return the program of the newest payload if it is ready or soon compiled, else None."""
        program = self._programs.get(sdk_kind)
        if program is None and sdk_kind not in self._partials and not self._lock.locked():
            program = self._advance(sdk_kind, AT_ONCE)
        return program

    async def ready(self, sdk_kind: SDKKind, /) -> Program | None:
        """Wait until the program of the newest payload is compiled, and return it.

        One of the waiting callers compiles; if it is cancelled, the next one continues.

        Returns:
            None if there is no payload.
        """
        async with self._lock:
            while self._payload is not None:
                program = self._programs.get(sdk_kind) or self._advance(sdk_kind, SLICE)
                if program is not None:
                    return program
                await asyncio.sleep(0)
        return None

    def _advance(self, sdk_kind: SDKKind, seconds: float) -> Program | None:
        """Compile for some seconds; return the program if that completes it."""
        if self._payload is None:
            return None
        work = self._partials.pop(sdk_kind, None) or Work(self._compile(self._payload, sdk_kind))
        if not run_for(seconds, work):
            self._partials[sdk_kind] = work
            return None
        self._programs[sdk_kind] = work.result
        return work.result

    def _compile(self, payload: Payload, sdk_kind: SDKKind) -> Steps[Program]:
        """Compile a payload, with a step for each flag, and for each item to name its state."""
        if self._compiler is None or self._compiler.payload is not payload:
            self._compiler = FlagCompiler(payload, self._compiler)
        compiler, index = self._compiler, Index(self._indexes.get(sdk_kind))
        flags: dict[str, CompiledFlag] = {}
        for key in sorted(payload.flags):
            flag = compiler.seen(sdk_kind, key)
            if flag is not None:
                flags[key] = flag
                if flag.features:
                    index.add(flag.features)
            yield
        while (naming := self._journal.naming) is not None:
            naming.run(0.0, lambda: 1.0)
            yield
        self._indexes[sdk_kind] = index
        return Program(
            flags,
            self.version,
            index,
            selector=self._journal.selector,
            dependencies=compiler.dependencies,
        )
