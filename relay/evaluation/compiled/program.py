"""All flags of a payload that an audience may see, compiled.

A `FlagCompiler` compiles the flags of a payload one by one, when they are asked for, and takes over
from the compiler before it what did not change: a flag is the same as long as its item and all
items that it may look up are. So two programs differ just where their compiled flags are not the
same objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from relay.evaluation.compiled.conditions import Condition, ConditionCache
from relay.evaluation.compiled.context import EvalContext, Uncompilable
from relay.evaluation.compiled.flag import CompiledFlag, compiled, interpreted
from relay.evaluation.compiled.fragments import EvalBody, ResponseTemplate
from relay.evaluation.compiled.index import Index
from relay.evaluation.data import Data, parse_flag, parse_segment
from relay.evaluation.evaluator import MAX_CHAIN
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import Context
from relay.model.flag import Clause, Flag
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.model.segment import Segment

MAX_CALLS = 1000
"""Flags and segments that one evaluation may go through, each as often as it is named. Beyond, the
interpreter is better, which looks at each of them once."""

Name = tuple[Kind, str]
"""What flags and segments call each other by."""


@dataclass(frozen=True, slots=True)
class _Parsed:
    """An item that was parsed, and what it names."""

    item: Item
    value: Flag | Segment
    needs: tuple[Name, ...]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A flag that was compiled.

    Args:
        item: the flag itself.
        flag: its compiled form.
        others: all else on which that depends; None where there is no live item.
    """

    item: Item
    flag: CompiledFlag
    others: tuple[tuple[Name, Item | None], ...]


class FlagCompiler:
    """The compiled flags of one payload.

    Args:
        payload: whose flags.
        before: the library of an earlier payload, whose work is taken over where it still counts.
    """

    def __init__(self, payload: Payload, before: FlagCompiler | None = None) -> None:
        self.payload = payload
        self._parsed: dict[Name, _Parsed] = {}
        self._flags: dict[str, CompiledFlag] = {}
        self._kept: dict[str, _Kept] = {}
        self._segments: dict[str, Condition | None] = {}
        """None for one that cannot be compiled."""
        self._vocabulary = ConditionCache()
        if before is not None:
            self._begin_with(before)

    def _begin_with(self, before: FlagCompiler) -> None:
        """Keep what was made for another payload, also what nobody has asked for since."""
        self._vocabulary = before._vocabulary
        self._parsed = before._parsed.copy()
        self._kept = before._kept.copy()
        if len(self._parsed) > len(self.payload):
            self._forget_vanished()

    def seen(self, audience: SDKKind, key: str) -> CompiledFlag | None:
        """Return a live flag, compiled; None if there is none that the audience may see."""
        kept = self._kept.get(key)
        if kept is not None and not kept.others and kept.item is self.payload.flags.get(key):
            # Almost all flags after a patch.
            return kept.flag if audience.sees(kept.flag.flag) else None
        parsed = self._parse((Kind.FLAG, key))
        if parsed is None or not isinstance(parsed.value, Flag) or not audience.sees(parsed.value):
            return None
        return self.flag(key)

    def flag(self, key: str) -> CompiledFlag | None:
        """Return a live flag, compiled; None if there is none."""
        known = self._flags.get(key)
        if known is None:
            known = self._take_over(key) or self._compile(key)
            if known is not None:
                self._flags[key] = known
        return known

    def _item(self, name: Name) -> Item | None:
        kind, key = name
        return self.payload.get(kind, key)

    def _forget_vanished(self) -> None:
        self._parsed = {name: p for name, p in self._parsed.items() if self._item(name)}
        self._kept = {key: kept for key, kept in self._kept.items() if key in self.payload.flags}

    def _take_over(self, key: str) -> CompiledFlag | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        # A full set of data brings all items anew, most of them equal to those before.
        now = self.payload.flags.get(key)
        if now is not kept.item and now != kept.item:
            return None
        if any(self._item(name) != item for name, item in kept.others):
            return None
        return kept.flag

    def _parse(self, name: Name) -> _Parsed | None:
        item = self._item(name)
        if item is None or item.json is None:
            return None
        known = self._parsed.get(name)
        if known is None or (known.item is not item and known.item != item):
            known = _parsed(item, item.json)
            self._parsed[name] = known
        return known

    def _compile(self, key: str) -> CompiledFlag | None:
        parsed = self._parse((Kind.FLAG, key))
        if parsed is None or not isinstance(parsed.value, Flag):
            return None
        reach = self._reach((Kind.FLAG, key)) if parsed.needs else {(Kind.FLAG, key): parsed}
        flag = self._compiled(key, parsed.value, reach)
        others = tuple((name, self._item(name)) for name in reach if name != (Kind.FLAG, key))
        self._kept[key] = _Kept(parsed.item, flag, others)
        return flag

    def _compiled(self, key: str, flag: Flag, reach: Mapping[Name, _Parsed | None]) -> CompiledFlag:
        if _is_sound(reach, (Kind.FLAG, key)):
            try:
                return compiled(key, flag, self.flag, self._vocabulary, self._in_segment)
            except Uncompilable:
                pass
        return interpreted(key, flag, _data(reach))

    def _in_segment(self, key: str) -> Condition:
        if key not in self._segments:
            parsed = self._parse((Kind.SEGMENT, key))
            self._segments[key] = self._segment(parsed)
        condition = self._segments[key]
        if condition is None:
            raise Uncompilable
        return condition

    def _segment(self, parsed: _Parsed | None) -> Condition | None:
        if parsed is None or not isinstance(parsed.value, Segment):
            return False
        try:
            return self._vocabulary.segment(parsed.value, self._in_segment)
        except Uncompilable:
            return None

    def _reach(self, name: Name) -> dict[Name, _Parsed | None]:
        """Return all that a flag may look up, itself first."""
        reach: dict[Name, _Parsed | None] = {}
        waiting = [name]
        while waiting:
            each = waiting.pop()
            if each not in reach:
                reach[each] = parsed = self._parse(each)
                waiting.extend(parsed.needs if parsed else ())
        return reach


def _parsed(item: Item, json: bytes) -> _Parsed:
    value: Flag | Segment
    if item.kind is Kind.FLAG:
        value = flag = parse_flag(json)
        needs = [(Kind.FLAG, each.key) for each in flag.prerequisites or ()]
    else:
        value = parse_segment(json)
        needs = []
    for rule in value.rules or ():
        needs.extend((Kind.SEGMENT, key) for key in _segments_of(rule.clauses))
    return _Parsed(item, value, tuple(needs))


def _segments_of(clauses: Iterable[Clause] | None) -> Iterator[str]:
    for clause in clauses or ():
        if clause.op == "segmentMatch":
            yield from (key for key in clause.values or () if isinstance(key, str))


def _is_sound(reach: Mapping[Name, _Parsed | None], start: Name) -> bool:
    """Whether functions that call each other can stand for these items.

    Not so in a cycle, or in a chain that the interpreter may find too long, or when items call
    themselves otherwise than they are filed: cycles are found by that inner key. Nor if the calls
    would be too many.
    """
    first = reach[start]
    if first is None or not first.needs:
        return True
    if any(parsed and parsed.value.key != key for (_, key), parsed in reach.items()):
        return False
    heights: dict[Name, int] = {}
    calls: dict[Name, int] = {}
    open_ones: set[Name] = set()
    path = [start]
    while path:
        name = path[-1]
        parsed = reach[name]
        needs = parsed.needs if parsed else ()
        if name not in open_ones:
            open_ones.add(name)
            if any(need in open_ones and need not in heights for need in needs):
                return False
            path.extend({need: None for need in needs if need not in heights})
            continue
        path.pop()
        if name not in heights:
            heights[name] = 1 + max((heights[need] for need in needs), default=0)
            calls[name] = 1 + sum(calls[need] for need in needs)
    return heights[start] <= MAX_CHAIN and calls[start] <= MAX_CALLS


def _data(reach: Mapping[Name, _Parsed | None]) -> Data:
    """Return the part of the data that the interpreter may look up."""

    def flag(key: str) -> Flag | None:
        parsed = reach.get((Kind.FLAG, key))
        return parsed.value if parsed and isinstance(parsed.value, Flag) else None

    def segment(key: str) -> Segment | None:
        parsed = reach.get((Kind.SEGMENT, key))
        return parsed.value if parsed and isinstance(parsed.value, Segment) else None

    return Data(flag, segment)


class Program:
    """What an audience gets of a payload; immutable.

    Args:
        flags: those that it may see, by key, in the order in which they are written.
        version: of the data.
        index: of their features; made if there is none.
    """

    def __init__(
        self, flags: Mapping[str, CompiledFlag], version: int, index: Index | None = None
    ) -> None:
        self.version = version
        self._flags = flags
        if index is None:
            index = Index()
            for flag in flags.values():
                index.add(flag.features or ())
        self._index = index

    @property
    def size(self) -> int:
        """The number of flags."""
        return len(self._flags)

    def all(self, context: Context, *, with_reasons: bool) -> bytes:
        """Return the body of an evalx answer (endpoints 1.5)."""
        return b"".join(self.body(context, with_reasons=with_reasons).pieces)

    def body(self, context: Context, *, with_reasons: bool) -> EvalBody:
        """Return the same in pieces."""
        form = self._with_reasons if with_reasons else self._without_reasons
        return form.body(EvalContext(context))

    def some(
        self, context: Context, keys: Iterable[str], *, with_reasons: bool
    ) -> dict[str, bytes]:
        """Return the entries of some flags, without those that the audience does not see."""
        subject = EvalContext(context)
        flags = ((key, self._flags.get(key)) for key in keys)
        return {
            key: flag.choose(subject).entry(with_reasons=with_reasons)
            for key, flag in flags
            if flag is not None
        }

    def flags_touched_by(self, before: Program) -> frozenset[str]:
        """Return the keys of flags whose result for some context may not be what it was before."""
        ours, theirs = self._flags, before._flags
        changed = {key for key, flag in ours.items() if theirs.get(key) is not flag}
        return frozenset(changed | (theirs.keys() - ours.keys()))

    @cached_property
    def _without_reasons(self) -> ResponseTemplate:
        return ResponseTemplate(self._flags.values(), self._index, with_reasons=False)

    @cached_property
    def _with_reasons(self) -> ResponseTemplate:
        return ResponseTemplate(self._flags.values(), self._index, with_reasons=True)
