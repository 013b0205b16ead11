"""Bodies of evalx answers, put together of pieces that many contexts share.

What no context changes is joined once. Of the flags that rules and targets decide, only those are
evaluated on which a context has something unusual, and the members are joined once for all contexts
that have the same features. Rollouts remain for each context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from typing import Any

from msgspec import Struct

from relay.evaluation.compiled.context import EvalContext
from relay.evaluation.compiled.features import Feature
from relay.evaluation.compiled.flag import Choose, CompiledFlag, CompiledResult
from relay.evaluation.compiled.index import Index

DIGEST_SIZE = 16
"""Bytes that tell bodies apart: nobody will meet two with the same."""

MAX_GROUPS = 2 * 1024 * 1024
"""Bytes that are kept for groups of contexts."""

MIN_GROUPED = 8
"""Flags for which a group is worth looking up. Fewer are evaluated as fast."""

GROUP_SIZE = 1024
"""Bytes that keeping a group costs beside its members and features."""

FEATURE_SIZE = 128
"""Bytes of a feature that is not as usual."""

Join = Callable[[Iterable[CompiledResult]], bytes]
Member = Callable[[CompiledResult], bytes]


class EvalBody(Struct, frozen=True):
    """An evalx answer.

    Args:
        pieces: the first was made for the context.
        shared: the others, the same objects for many contexts.
        digest: another one for each other body; the same at all replicas that have the same flags.
    """

    pieces: tuple[bytes, ...]
    shared: tuple[Fragment, ...]
    digest: bytes

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return sum(map(len, self.pieces))


class ResponseTemplate:
    """All flags of a program, with or without reasons.

    Args:
        flags: all of them.
        index: of their features.
        with_reasons: whether there are reasons.
    """

    def __init__(self, flags: Iterable[CompiledFlag], index: Index, *, with_reasons: bool) -> None:
        join = _join_reasoned if with_reasons else _join_plain
        settled: list[CompiledResult] = []
        grouped: list[CompiledFlag] = []
        singles: list[Choose] = []
        for flag in flags:
            outcome = flag.settled(with_reasons=with_reasons)
            if outcome is not None:
                settled.append(outcome)
            elif flag.features is not None:
                grouped.append(flag)
            else:
                singles.append(flag.choose)
        if len(grouped) < MIN_GROUPED:
            singles += [flag.choose for flag in grouped]
            grouped = []
        self._join: Join = join
        self._singles = tuple(singles)
        start = b"," if singles else b""
        member = _reasoned if with_reasons else _plain
        self._groups = _Groups(grouped, index, start, member) if grouped else None
        comma = b"," if settled and (singles or grouped) else b""
        self._end = Fragment(comma + join(settled) + b"}")

    def body(self, context: EvalContext) -> EvalBody:
        """Return the body for a context."""
        own = b"{" + self._join([choose(context) for choose in self._singles])
        end = self._end
        if self._groups is None:
            mark = sha256(own + end.digest).digest()[:DIGEST_SIZE]
            return EvalBody((own, end.text), (end,), mark)
        group = self._groups.piece(context)
        mark = sha256(own + group.digest + end.digest).digest()[:DIGEST_SIZE]
        return EvalBody((own, group.text, end.text), (group, end), mark)


class Fragment:
    """Members, joined.

    Args:
        text: the members.
        digest: another one for each other text that can be in its place.
    """

    __slots__ = ("__weakref__", "digest", "text")

    def __init__(self, text: bytes, digest: bytes = b"") -> None:
        self.text = text
        self.digest = digest or sha256(text).digest()


class _Groups:
    """Flags that depend on features only, for groups of contexts that have the same ones.

    If groups are so many that most contexts are in a new one, nothing is kept any more.
    """

    def __init__(
        self, flags: Sequence[CompiledFlag], index: Index, start: bytes, member: Member
    ) -> None:
        self._index = index
        self._flags = tuple(flag.choose for flag in flags)
        self._places: dict[Feature[Any], list[int]] = {}
        """Of the flags that depend on a feature."""
        for place, flag in enumerate(flags):
            for feature in flag.features or ():
                self._places.setdefault(feature, []).append(place)
        self._depend_on_all = len(self._places) == index.size
        self._member = member
        self._start = start
        self._members = [member(flag.usual) for flag in flags if flag.usual is not None]
        """The usual ones."""
        self._usual = Fragment(start + b",".join(self._members))
        self._kept: dict[frozenset[tuple[Feature[Any], Any]], Fragment] = {}
        self._size = 0
        self._hits = 0
        self._worthwhile = True

    def piece(self, subject: EvalContext) -> Fragment:
        """Return the members of all these flags."""
        unusual = self._index.unusual(subject)
        if not self._depend_on_all:
            places = self._places
            unusual = {each: value for each, value in unusual.items() if each in places}
        if not self._worthwhile:
            return self._new(subject, unusual)
        features = frozenset(unusual.items())
        piece = self._kept.get(features)
        if piece is not None:
            self._hits += 1
            return piece
        piece = self._new(subject, unusual)
        self._keep(features, piece)
        return piece

    def _new(self, subject: EvalContext, unusual: Iterable[Feature[Any]]) -> Fragment:
        """Put the usual members together with the others, which alone make a difference."""
        members, others = self._members.copy(), []
        for place in sorted({place for feature in unusual for place in self._places[feature]}):
            member = self._member(self._flags[place](subject))
            if member != members[place]:
                members[place] = member
                others.append(member)
        if not others:
            return self._usual
        digest = sha256(self._usual.digest + b",".join(others)).digest()
        return Fragment(self._start + b",".join(members), digest)

    def _keep(self, features: frozenset[tuple[Feature[Any], Any]], piece: Fragment) -> None:
        self._size += GROUP_SIZE + FEATURE_SIZE * len(features) + len(piece.text)
        if self._size > MAX_GROUPS:
            self._worthwhile = self._hits > len(self._kept)
            self._kept.clear()
            self._size = self._hits = 0
        else:
            self._kept[features] = piece


def _plain(outcome: CompiledResult) -> bytes:
    return outcome.plain or outcome.make_plain()


def _reasoned(outcome: CompiledResult) -> bytes:
    return outcome.reasoned or outcome.make_reasoned()


def _join_plain(outcomes: Iterable[CompiledResult]) -> bytes:
    return b",".join([each.plain or each.make_plain() for each in outcomes])


def _join_reasoned(outcomes: Iterable[CompiledResult]) -> bytes:
    return b",".join([each.reasoned or each.make_reasoned() for each in outcomes])
