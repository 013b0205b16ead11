"""The evaluation of one environment: programs for its payload, compiled when somebody asks.

Compiling a large payload takes longer than the loop may be held, so it is done in slices; of a
payload that differs little from the one before, almost everything is taken over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from relay.evaluation.compiled.flag import CompiledFlag
from relay.evaluation.compiled.index import Index
from relay.evaluation.compiled.program import FlagCompiler, Program
from relay.evaluation.sdkkind import SDKKind
from relay.model.item import version_of_time
from relay.model.payload import Payload

SLICE = 0.001
"""Seconds for which compiling holds the loop at a time. The flag that is being compiled when they
are over is finished, and polls in between should wait no more than twice as long."""

AT_ONCE = 0.002
"""Seconds of work for which nobody has to wait: enough to look through thousands of flags for those
that a patch has changed."""


@dataclass(slots=True)
class _Work:
    """A program in the making.

    Args:
        keys: of flags that were not looked at so far.
        index: of the features of the others.
        flags: those of them that the audience sees.
    """

    keys: Iterator[str]
    index: Index
    flags: dict[str, CompiledFlag] = field(default_factory=dict)


class ProgramCache:
    """Programs of the newest payload of an environment, for each audience that asks."""

    def __init__(self) -> None:
        self._payload: Payload | None = None
        self._library: FlagCompiler | None = None
        self._version = 0
        self._programs: dict[SDKKind, Program] = {}
        self._works: dict[SDKKind, _Work] = {}
        self._indexes: dict[SDKKind, Index] = {}
        """Those of the last programs, also of earlier payloads."""
        self._compiling = asyncio.Lock()

    def update(self, payload: Payload) -> None:
        """Take note of new data; nothing is compiled yet.

        The version of the data is about the time in seconds, so that it still grows when the relay
        is started anew. It is greater than that of
        any flag, because SDKs hold flags with their own version until a stream changes them.
        """
        if payload is self._payload:
            return
        self._payload = payload
        self._version = max(self._version + 1, version_of_time(time.time()), payload.newest + 1)
        self._programs = {}
        self._works = {}

    def current(self, audience: SDKKind, /) -> Program | None:
        """Return the program of the newest payload if it is ready, or can be at once."""
        program = self._programs.get(audience)
        if program is None and audience not in self._works and not self._compiling.locked():
            program = self._advance(audience, AT_ONCE)
        return program

    async def ready(self, audience: SDKKind, /) -> Program | None:
        """Return the program of the newest payload when it is compiled.

        One of those who wait does the work; if he gives up, the next one goes on with it.

        Returns:
            None if there is no payload.
        """
        async with self._compiling:
            while self._payload is not None:
                program = self._programs.get(audience) or self._advance(audience, SLICE)
                if program is not None:
                    return program
                await asyncio.sleep(0)
        return None

    def _advance(self, audience: SDKKind, seconds: float) -> Program | None:
        """Work for a while; return the program if that completes it."""
        if self._payload is None:
            return None
        until = time.perf_counter() + seconds
        payload = self._payload
        if self._library is None or self._library.payload is not payload:
            self._library = FlagCompiler(payload, self._library)
        work = self._works.get(audience)
        if work is None:
            index = Index(self._indexes.get(audience))
            work = self._works[audience] = _Work(iter(sorted(payload.flags)), index)
        if not _compile(self._library, audience, work, until):
            return None
        del self._works[audience]
        self._indexes[audience] = work.index
        program = self._programs[audience] = Program(work.flags, self._version, work.index)
        return program


def _compile(library: FlagCompiler, audience: SDKKind, work: _Work, until: float) -> bool:
    """Compile flags until the time is over; return whether none is left."""
    for key in work.keys:
        flag = library.seen(audience, key)
        if flag is not None:
            work.flags[key] = flag
            if flag.features:
                work.index.add(flag.features)
        if time.perf_counter() > until:
            return False
    return True
