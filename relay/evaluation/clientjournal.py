"""Client journal: which flags clients miss that come back (fdv2 13.8.7). Pure.

The journal of the environment knows which items were touched since the state that a client names.
The flags whose results may differ are those that are among them, or may look one of them up *now*:
a path that led from a flag to a touched item at the time begins with items that nobody has touched
since, so it still leads to a touched item, the first one on it. Those flags are evaluated, whether
or not their results differ. So nothing has to be known of any client.

Clients must not learn the keys of flags that they may not see. A flag that they do not see now is
deleted only if they may have seen it, for which its visibility before each step is noted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from msgspec import Struct

from relay.evaluation.compiled.program import Program
from relay.evaluation.data import parse_flag
from relay.evaluation.sdkkind import SDKKind
from relay.lru import LRUMap
from relay.model.answers import AnswerCounter, AnswerCounts
from relay.model.item import Item, Kind
from relay.model.journal import SHARE_OF_DELTA, TOO_LARGE, TOO_OLD, Delta, Full, Journal
from relay.model.payload import Payload

MAX_SEEN = 10_000
"""Flags whose last visible step is remembered, for each kind of SDK."""

MAX_ANSWERS = 64
"""Answers kept until the next change. After an outage most clients name one of a few states."""

CLIENT_SIDE = (SDKKind.MOBILE, SDKKind.BROWSER)


class ClientDelta(Struct, frozen=True):
    """Answer to a client-side SDK: the flags that it may miss.

    Args:
        keys: of the flags to evaluate.
        gone: items of the flags that it does not see any more.
    """

    keys: frozenset[str]
    gone: tuple[Item, ...]


class ClientJournal:
    """Journal of the flags that client-side SDKs see.

    Args:
        journal: of the environment.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._floor = journal.step
        """Step from which on it is known which flags clients have seen."""
        self._seen: dict[SDKKind, OrderedDict[str, int]] = {
            sdk_kind: OrderedDict() for sdk_kind in CLIENT_SIDE
        }
        """Last step before which each touched flag was visible; the latest comes last."""
        self.answers = AnswerCounts()
        """Counts of the answers to clients."""
        self._full_sizes: dict[tuple[SDKKind, bool], int] = {}
        """Bytes of the last transfer of everything to each kind of SDK, with and without reasons:
        measured, for nobody evaluates everything only to know what a delta has saved."""
        self._answers: LRUMap[tuple[Program, str], Full | ClientDelta] = LRUMap(MAX_ANSWERS)

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind.value}: {len(seen)}" for kind, seen in self._seen.items())
        return f"<ClientJournal [{counts}]>"

    def record(self, before: Payload | None) -> None:
        """Record the step that the journal has recorded.

        Args:
            before: the data before it.
        """
        self._answers.clear()
        latest = self._journal.latest
        if isinstance(latest, Full) or before is None:
            for seen in self._seen.values():
                seen.clear()
            self._floor = self._journal.step
            return
        for item in latest.items:
            known = before.flags.get(item.key) if item.kind is Kind.FLAG else None
            if known is not None and known.json is not None:
                self._note(item.key, known.json)

    def _note(self, key: str, json: bytes) -> None:
        """Note who has seen a flag until the present step."""
        flag = parse_flag(json)
        for sdk_kind, seen in self._seen.items():
            if sdk_kind.sees(flag):
                seen[key] = self._journal.step
                seen.move_to_end(key)
                if len(seen) > MAX_SEEN:
                    _, step = seen.popitem(last=False)
                    self._floor = max(self._floor, step)

    def is_behind(self, basis: str) -> bool:
        """Return whether a state may be one that the data have yet to reach; only a hint."""
        return self._journal.is_behind(basis)

    def answer(self, program: Program, sdk_kind: SDKKind, basis: str) -> Full | ClientDelta:
        """Return what a client needs to have the results of a program.

        Args:
            program: of the newest data, or of data before.
            sdk_kind: of the client and the program.
            basis: state of the environment's data that the client names; empty for none.
        """
        known = self._answers.get((program, basis))
        if known is not None:
            return known
        answer = self._journal.answer(basis)
        if isinstance(answer, Full):
            return answer
        known = self._delta(program, sdk_kind, answer)
        self._answers.put((program, basis), known)
        return known

    def counter(
        self,
        sdk_kind: SDKKind,
        kind: str,
        reason: str,
        size: int,
        *,
        with_reasons: bool,
        everything: Callable[[], int],
    ) -> AnswerCounter:
        """Return the counter of an answer, which has to count each time that it is given.

        Args:
            sdk_kind: of the client.
            kind: of the answer: `full`, `delta` or `none`.
            reason: of the answer.
            size: bytes of it.
            with_reasons: whether the client gets reasons.
            everything: returns the bytes of all results for the client; 0 if it would take too
                long. It is asked until they are known.
        """
        of = sdk_kind, with_reasons
        if kind == Full.kind:
            self._full_sizes[of] = size
            return self.answers.counter(kind, reason, 0)
        full = self._full_sizes.get(of)
        if not full:
            full = self._full_sizes[of] = everything()
        return self.answers.counter(kind, reason, max(0, full - size))

    def _delta(self, program: Program, sdk_kind: SDKKind, delta: Delta) -> Full | ClientDelta:
        keys = program.affected_by({(item.kind, item.key) for item in delta.items})
        if len(keys) * SHARE_OF_DELTA > program.size:
            return TOO_LARGE
        gone: list[Item] = []
        for item in delta.items:
            if item.kind is Kind.FLAG and item.key not in program:
                seen = self._seen[sdk_kind].get(item.key)
                if seen is None and delta.since < self._floor:
                    return TOO_OLD
                if seen is not None and seen > delta.since:
                    gone.append(item)
        return ClientDelta(keys, tuple(gone))
