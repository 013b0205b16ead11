"""Programs: all flags of a payload that one kind of SDK may see, compiled.

A `FlagCompiler` compiles the flags of a payload one by one, on demand, and reuses what has not
changed since the previous payload: a compiled flag stays valid while its item and all items that it
may look up stay the same. Two programs therefore differ exactly in the flags whose compiled objects
differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import cached_property

from msgspec import Struct

from relay.evaluation.compiled.conditions import Condition, ConditionCache
from relay.evaluation.compiled.context import EvalContext, Uncompilable
from relay.evaluation.compiled.flag import (
    NO_BIG_SEGMENTS,
    BigSegmentUse,
    CompiledFlag,
    CompiledResult,
    compile_flag,
    interpret_flag,
)
from relay.evaluation.compiled.fragments import (
    EVALX,
    EVALX_REASONED,
    EvalBody,
    Form,
    ResponseTemplate,
)
from relay.evaluation.compiled.index import Index
from relay.evaluation.data import NO_MEMBERSHIPS, Data, Membership, parse_flag, parse_segment
from relay.evaluation.evaluator import MAX_CHAIN
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import DEFAULT_KIND, Context
from relay.model.flag import Clause, Flag
from relay.model.item import Item, Kind
from relay.model.payload import Payload, Selector
from relay.model.segment import Segment

MAX_CALLS = 1000
"""Flags and segments that one compiled flag may evaluate, counted each time one is referenced.
Beyond that it is left to the interpreter, which evaluates each of them once."""

Name = tuple[Kind, str]
"""Kind and key, by which flags and segments refer to each other."""


MembershipMap = Mapping[str, Membership]
"""Memberships in big segments, by context key."""


class _ParsedItem(Struct, frozen=True):
    """A parsed item, and the names of the items that it refers to."""

    item: Item
    value: Flag | Segment
    references: tuple[Name, ...]


class _CachedFlag(Struct, frozen=True):
    """A compiled flag in the cache, valid while all items involved are unchanged.

    Args:
        item: the item of the flag.
        flag: its compiled form.
        dependencies: all other items that it depends on; None for one that is not live.
    """

    item: Item
    flag: CompiledFlag
    dependencies: tuple[tuple[Name, Item | None], ...]


class FlagCompiler:
    """Compiler of the flags of one payload.

    Args:
        payload: the payload with the flags.
        previous: the compiler of an earlier payload, whose results are reused where still valid.
    """

    def __init__(self, payload: Payload, previous: FlagCompiler | None = None) -> None:
        self.payload = payload
        self._parsed_items: dict[Name, _ParsedItem] = {}
        self._flags: dict[str, CompiledFlag] = {}
        self._cache: dict[str, _CachedFlag] = {}
        self._segments: dict[str, Condition | None] = {}
        """Conditions of segments by key; None for one that cannot be compiled."""
        self._conditions = ConditionCache()
        if previous is not None:
            self._start_from(previous)

    def _start_from(self, previous: FlagCompiler) -> None:
        """Start from the caches of another compiler, including entries that it has not used."""
        self._conditions = previous._conditions
        self._parsed_items = previous._parsed_items.copy()
        self._cache = previous._cache.copy()
        if len(self._parsed_items) > len(self.payload):
            self._drop_removed()

    def __repr__(self) -> str:
        total, done = len(self.payload.flags), len(self._flags)
        return f"<FlagCompiler of {total} flags, {done} used>"

    def seen(self, sdk_kind: SDKKind, key: str) -> CompiledFlag | None:
        """Return a compiled live flag; None if there is none that this kind of SDK may see."""
        cached = self._cache.get(key)
        if (
            cached is not None
            and not cached.dependencies
            and cached.item is self.payload.flags.get(key)
        ):
            # The short way, for almost all flags after a patch.
            return cached.flag if sdk_kind.sees(cached.flag.flag) else None
        parsed = self._parse((Kind.FLAG, key))
        if parsed is None or not isinstance(parsed.value, Flag) or not sdk_kind.sees(parsed.value):
            return None
        return self.flag(key)

    def flag(self, key: str) -> CompiledFlag | None:
        """Return a compiled live flag; None if there is none."""
        known = self._flags.get(key)
        if known is None:
            known = self._reuse(key) or self._compile(key)
            if known is not None:
                self._flags[key] = known
        return known

    def dependencies(self, key: str) -> Iterator[Name]:
        """Return the names of all items that a compiled flag may look up, except its own."""
        return (name for name, _ in self._cache[key].dependencies)

    def _item(self, name: Name) -> Item | None:
        kind, key = name
        return self.payload.get(kind, key)

    def _drop_removed(self) -> None:
        self._parsed_items = {name: p for name, p in self._parsed_items.items() if self._item(name)}
        self._cache = {
            key: cached for key, cached in self._cache.items() if key in self.payload.flags
        }

    def _reuse(self, key: str) -> CompiledFlag | None:
        cached = self._cache.get(key)
        if cached is None:
            return None
        # A full data set replaces all items, most of them by equal ones.
        current = self.payload.flags.get(key)
        if current is not cached.item and current != cached.item:
            return None
        if any(self._item(name) != item for name, item in cached.dependencies):
            return None
        return cached.flag

    def _parse(self, name: Name) -> _ParsedItem | None:
        item = self._item(name)
        if item is None or item.json is None:
            return None
        known = self._parsed_items.get(name)
        if known is None or (known.item is not item and known.item != item):
            known = _parse_item(item, item.json)
            self._parsed_items[name] = known
        return known

    def _compile(self, key: str) -> CompiledFlag | None:
        parsed = self._parse((Kind.FLAG, key))
        if parsed is None or not isinstance(parsed.value, Flag):
            return None
        reach = self._reach((Kind.FLAG, key)) if parsed.references else {(Kind.FLAG, key): parsed}
        flag = self._compile_or_interpret(key, parsed.value, reach)
        dependencies = tuple((name, self._item(name)) for name in reach if name != (Kind.FLAG, key))
        self._cache[key] = _CachedFlag(parsed.item, flag, dependencies)
        return flag

    def _compile_or_interpret(
        self, key: str, flag: Flag, reach: Mapping[Name, _ParsedItem | None]
    ) -> CompiledFlag:
        use = _big_segment_use(reach)
        if _is_compilable(reach, (Kind.FLAG, key)):
            try:
                return compile_flag(
                    key, flag, self.flag, self._conditions, self._in_segment, big_segments=use
                )
            except Uncompilable:
                pass
        return interpret_flag(key, flag, _data(reach), use)

    def _in_segment(self, key: str) -> Condition:
        if key not in self._segments:
            parsed = self._parse((Kind.SEGMENT, key))
            self._segments[key] = self._segment(parsed)
        condition = self._segments[key]
        if condition is None:
            raise Uncompilable
        return condition

    def _segment(self, parsed: _ParsedItem | None) -> Condition | None:
        if parsed is None or not isinstance(parsed.value, Segment):
            return False
        try:
            return self._conditions.segment(parsed.value, self._in_segment)
        except Uncompilable:
            return None

    def _reach(self, start: Name) -> dict[Name, _ParsedItem | None]:
        """Return all items that a flag may look up, itself first."""
        reach: dict[Name, _ParsedItem | None] = {}
        pending = [start]
        while pending:
            name = pending.pop()
            if name not in reach:
                reach[name] = parsed = self._parse(name)
                pending.extend(parsed.references if parsed else ())
        return reach


def _parse_item(item: Item, json: bytes) -> _ParsedItem:
    value: Flag | Segment
    if item.kind is Kind.FLAG:
        value = flag = parse_flag(json)
        references = [(Kind.FLAG, each.key) for each in flag.prerequisites or ()]
    else:
        value = parse_segment(json)
        references = []
    for rule in value.rules or ():
        references.extend((Kind.SEGMENT, key) for key in _segments_of(rule.clauses))
    return _ParsedItem(item, value, tuple(references))


def _segments_of(clauses: Iterable[Clause] | None) -> Iterator[str]:
    for clause in clauses or ():
        if clause.op == "segmentMatch":
            yield from (key for key in clause.values or () if isinstance(key, str))


def _is_compilable(reach: Mapping[Name, _ParsedItem | None], start: Name) -> bool:
    """Return whether these items can be compiled to functions that call each other.

    That excludes cycles, chains that the interpreter may find too long, items whose inner key is
    not the key of their item (the interpreter finds cycles by the inner key), and evaluations with
    too many calls.
    """
    first = reach[start]
    if first is None or not first.references:
        return True
    if any(parsed and parsed.value.key != key for (_, key), parsed in reach.items()):
        return False
    depths: dict[Name, int] = {}
    calls: dict[Name, int] = {}
    visited: set[Name] = set()
    stack = [start]
    while stack:
        name = stack[-1]
        parsed = reach[name]
        references = parsed.references if parsed else ()
        if name not in visited:
            visited.add(name)
            if any(reference in visited and reference not in depths for reference in references):
                return False
            stack.extend({reference: None for reference in references if reference not in depths})
            continue
        stack.pop()
        if name not in depths:
            depths[name] = 1 + max((depths[reference] for reference in references), default=0)
            calls[name] = 1 + sum(calls[reference] for reference in references)
    return depths[start] <= MAX_CHAIN and calls[start] <= MAX_CALLS


def _big_segment_use(reach: Mapping[Name, _ParsedItem | None]) -> BigSegmentUse:
    """Return which big segments are within reach."""
    segments = (parsed.value for parsed in reach.values() if parsed is not None)
    big = [each for each in segments if isinstance(each, Segment) and each.unbounded]
    if not big:
        return NO_BIG_SEGMENTS
    kinds = (
        each.unbounded_context_kind or DEFAULT_KIND for each in big if each.generation is not None
    )
    return BigSegmentUse(True, frozenset(kinds))


def _data(reach: Mapping[Name, _ParsedItem | None]) -> Data:
    """Return the data for the interpreter: only the items within reach."""

    def flag(key: str) -> Flag | None:
        parsed = reach.get((Kind.FLAG, key))
        return parsed.value if parsed and isinstance(parsed.value, Flag) else None

    def segment(key: str) -> Segment | None:
        parsed = reach.get((Kind.SEGMENT, key))
        return parsed.value if parsed and isinstance(parsed.value, Segment) else None

    return Data(flag, segment)


class Program:
    """All compiled flags of a payload for one kind of SDK; immutable.

    Args:
        flags: the flags that it may see, by key, in the order of the response.
        version: version of the data.
        index: index of their features; built here if None.
        selector: names the payload.
        dependencies: returns the names of the items that a flag may look up beside its own.
    """

    def __init__(
        self,
        flags: Mapping[str, CompiledFlag],
        version: int,
        index: Index | None = None,
        *,
        selector: Selector | None = None,
        dependencies: Callable[[str], Iterable[Name]] = lambda _: (),
    ) -> None:
        self.version = version
        self.selector = selector or Selector()
        self._flags = flags
        self._dependencies = dependencies
        self._templates: dict[Form, ResponseTemplate] = {}
        self._big_segment_kinds = tuple(
            sorted({kind for flag in flags.values() for kind in flag.big_segments.kinds})
        )
        if index is None:
            index = Index()
            for flag in flags.values():
                index.add(flag.features or ())
        self._index = index

    def __repr__(self) -> str:
        return f"<Program of {self.size} flags, version {self.version}>"

    def __contains__(self, key: str) -> bool:
        """Return whether a flag is visible."""
        return key in self._flags

    @property
    def size(self) -> int:
        """Number of flags."""
        return len(self._flags)

    @property
    def has_big_segments(self) -> bool:
        """True if evaluations may look at members of big segments."""
        return bool(self._big_segment_kinds)

    def members_needed(self, context: Context) -> tuple[str, ...]:
        """Return the context keys whose memberships in big segments an evaluation may look at."""
        kinds = self._big_segment_kinds
        if not kinds:
            return ()
        individuals = (context.individuals.get(kind) for kind in kinds)
        return tuple({each.key: None for each in individuals if each is not None})

    @cached_property
    def flags_with_big_segments(self) -> frozenset[str]:
        """Keys of the flags that may look at members of big segments."""
        return frozenset(key for key, flag in self._flags.items() if flag.big_segments.kinds)

    def all(
        self, context: Context, memberships: MembershipMap = NO_MEMBERSHIPS, *, with_reasons: bool
    ) -> bytes:
        """Return the body of an evaluation response (endpoints 1.5)."""
        return b"".join(self.body(context, memberships, with_reasons=with_reasons).pieces)

    def body(
        self, context: Context, memberships: MembershipMap = NO_MEMBERSHIPS, *, with_reasons: bool
    ) -> EvalBody:
        """Return the body of an evaluation response in fragments.

        Args:
            context: to evaluate for.
            memberships: those of `members_needed`; empty without a big-segment store.
            with_reasons: include reasons.
        """
        form = EVALX_REASONED if with_reasons else EVALX
        template = self._templates.get(form) or self._template(form)
        return template.body(EvalContext(context, memberships))

    def fill(
        self, form: Form, context: Context, memberships: MembershipMap = NO_MEMBERSHIPS
    ) -> EvalBody:
        """Return all results in some form; see `body`."""
        template = self._templates.get(form) or self._template(form)
        return template.body(EvalContext(context, memberships))

    def _template(self, form: Form) -> ResponseTemplate:
        template = ResponseTemplate(self._flags.values(), self._index, form)
        self._templates[form] = template
        return template

    def some(
        self,
        context: Context,
        keys: Iterable[str],
        memberships: MembershipMap = NO_MEMBERSHIPS,
        *,
        with_reasons: bool,
    ) -> dict[str, bytes]:
        """Return the entries of some flags, without those that this kind of SDK may not see."""
        results = self.results(context, keys, memberships)
        return {key: result.entry(with_reasons=with_reasons) for key, result in results.items()}

    def results(
        self, context: Context, keys: Iterable[str], memberships: MembershipMap = NO_MEMBERSHIPS
    ) -> dict[str, CompiledResult]:
        """Return the results of some flags, without those that this kind of SDK may not see."""
        eval_context = EvalContext(context, memberships)
        flags = ((key, self._flags.get(key)) for key in keys)
        return {key: flag.choose(eval_context) for key, flag in flags if flag is not None}

    def affected_by(self, names: AbstractSet[Name]) -> frozenset[str]:
        """Return the keys of the flags that are among some items, or may look one up."""
        flags, dependents = self._flags, self._dependents
        return frozenset(
            {key for kind, key in names if kind is Kind.FLAG and key in flags}.union(
                *(dependents.get(name, ()) for name in names)
            )
        )

    @cached_property
    def _dependents(self) -> Mapping[Name, AbstractSet[str]]:
        """Keys of the flags that may look up an item."""
        dependents: defaultdict[Name, set[str]] = defaultdict(set)
        for key in self._flags:
            for name in self._dependencies(key):
                dependents[name].add(key)
        return dependents

    def flags_touched_by(self, previous: Program) -> frozenset[str]:
        """Return the keys of flags whose result may differ from `previous` for some context."""
        after, before = self._flags, previous._flags
        changed = {key for key, flag in after.items() if before.get(key) is not flag}
        return frozenset(changed | (before.keys() - after.keys()))
