"""Bodies of evaluation responses, assembled from fragments that many contexts share.

Flags that are the same for every context are joined once. Flags that rules and targets decide are
evaluated only if the context has an unusual feature that they depend on, and are joined once for
all contexts with the same features. Only rollouts are evaluated for every context.
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
"""Bytes of a body's digest: enough to make collisions practically impossible."""

MAX_GROUPS = 2 * 1024 * 1024
"""Bytes of cached fragments, for all groups of contexts of one template."""

RETRY_AFTER = 2000
"""Contexts after which caching that did not pay is tried again: those who came may not be those who
come."""

MIN_GROUPED = 8
"""Flags from which looking up a group pays. Fewer are evaluated just as fast."""

GROUP_SIZE = 1024
"""Estimated bytes of a cached group beside its members and features."""

FEATURE_SIZE = 128
"""Estimated bytes of an unusual feature in the key of a group."""


class Form(Struct, frozen=True, eq=False):
    """Form of a body: how the results of flags become a text.

    Args:
        with_reasons: include reasons.
        member: returns the text of one result.
        frame: joins the texts of a group of results.
        join: the same as to `frame` each `member`, of any number of results.
        between: stands between two groups, none of which is empty.
        opening: begins a body.
        closing: ends a body.
    """

    with_reasons: bool
    member: Callable[[CompiledResult], bytes]
    frame: Callable[[Sequence[bytes]], bytes]
    join: Callable[[Iterable[CompiledResult]], bytes]
    between: bytes = b""
    opening: bytes = b""
    closing: bytes = b""


class EvalBody(Struct, frozen=True):
    """The body of an evaluation response.

    Args:
        pieces: the parts of the body; the first belongs to the context.
        shared: the parts after the first, the same objects for many contexts.
        digest: identifies the body; the same in all replicas that have the same flags. Empty if it
            is of use to one client only.
        tail: the last part, after those that are shared, if it belongs to the context, too.
    """

    pieces: tuple[bytes, ...]
    shared: tuple[Fragment, ...] = ()
    digest: bytes = b""
    tail: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of the whole body."""
        return sum(map(len, self.pieces))


class ResponseTemplate:
    """Template of the response bodies of a program.

    Args:
        flags: all flags of the program.
        index: the index of their features.
        form: of the bodies.
    """

    def __init__(self, flags: Iterable[CompiledFlag], index: Index, form: Form) -> None:
        with_reasons, between = form.with_reasons, form.between
        constant: list[CompiledResult] = []
        grouped: list[CompiledFlag] = []
        varying: list[Choose] = []
        for flag in flags:
            result = flag.constant_result(with_reasons=with_reasons)
            if result is not None:
                constant.append(result)
            elif flag.features is not None:
                grouped.append(flag)
            else:
                varying.append(flag.choose if with_reasons else flag.choose_plain)
        if len(grouped) < MIN_GROUPED:
            varying += [flag.choose for flag in grouped]
            grouped = []
        self._opening, self._join = form.opening, form.join
        self._varying = tuple(varying)
        start = between if varying else b""
        self._groups = _Groups(grouped, index, start, form) if grouped else None
        start = between if constant and (varying or grouped) else b""
        self._end = Fragment(start + form.join(constant) + form.closing)

    def body(self, context: EvalContext) -> EvalBody:
        """Fill the template for a context."""
        head = self._opening + self._join([choose(context) for choose in self._varying])
        end = self._end
        if self._groups is None:
            digest = sha256(head + end.digest).digest()[:DIGEST_SIZE]
            return EvalBody((head, end.text), (end,), digest)
        group = self._groups.fragment(context)
        digest = sha256(head + group.digest + end.digest).digest()[:DIGEST_SIZE]
        return EvalBody((head, group.text, end.text), (group, end), digest)


class Fragment:
    """A part of a body that many contexts share.

    Args:
        text: members of the body, joined by commas.
        digest: identifies the text among those that can be in its place.
    """

    __slots__ = ("__weakref__", "digest", "text")

    def __init__(self, text: bytes, digest: bytes = b"") -> None:
        self.text = text
        self.digest = digest or sha256(text).digest()


class _Groups:
    """Cache of the flags that only features decide, by the unusual features of a context.

    If most contexts turn out to be in a new group, caching stops for a while.
    """

    def __init__(
        self, flags: Sequence[CompiledFlag], index: Index, start: bytes, form: Form
    ) -> None:
        self._index = index
        self._flags = tuple(flag.choose for flag in flags)
        self._positions: dict[Feature[Any], list[int]] = {}
        """Positions of the flags that depend on a feature."""
        for position, flag in enumerate(flags):
            for feature in flag.features or ():
                self._positions.setdefault(feature, []).append(position)
        self._uses_all_features = len(self._positions) == index.size
        self._member, self._frame = form.member, form.frame
        self._start = start
        self._usual_members = [form.member(flag.usual) for flag in flags if flag.usual is not None]
        """The usual member of each flag."""
        self._usual = Fragment(start + form.frame(self._usual_members))
        self._cache: dict[frozenset[tuple[Feature[Any], Any]], Fragment] = {}
        self._size = 0
        self._hits = 0
        self._worthwhile = True
        self._skipped = 0
        """Contexts since caching has stopped."""

    def fragment(self, context: EvalContext) -> Fragment:
        """Return the members of all flags for a context."""
        unusual = self._index.unusual(context)
        if not self._uses_all_features:
            positions = self._positions
            unusual = {each: value for each, value in unusual.items() if each in positions}
        if not self._worthwhile:
            self._skipped += 1
            self._worthwhile = self._skipped >= RETRY_AFTER
            return self._join_members(context, unusual)
        features = frozenset(unusual.items())
        fragment = self._cache.get(features)
        if fragment is not None:
            self._hits += 1
            return fragment
        fragment = self._join_members(context, unusual)
        self._store(features, fragment)
        return fragment

    def _join_members(self, context: EvalContext, unusual: Iterable[Feature[Any]]) -> Fragment:
        """Join the usual members and those that differ; only the latter enter the digest."""
        members, differing = self._usual_members.copy(), []
        for position in sorted(
            {position for feature in unusual for position in self._positions[feature]}
        ):
            member = self._member(self._flags[position](context))
            if member != members[position]:
                members[position] = member
                differing.append(member)
        if not differing:
            return self._usual
        digest = sha256(self._usual.digest + b",".join(differing)).digest()
        return Fragment(self._start + self._frame(members), digest)

    def _store(self, features: frozenset[tuple[Feature[Any], Any]], fragment: Fragment) -> None:
        self._size += GROUP_SIZE + FEATURE_SIZE * len(features) + len(fragment.text)
        if self._size > MAX_GROUPS:
            self._worthwhile = self._hits > len(self._cache)
            self._cache.clear()
            self._size = self._hits = self._skipped = 0
        else:
            self._cache[features] = fragment


def _plain(result: CompiledResult) -> bytes:
    return result.plain or result.make_plain()


def _reasoned(result: CompiledResult) -> bytes:
    return result.reasoned or result.make_reasoned()


def _join_plain(results: Iterable[CompiledResult]) -> bytes:
    return b",".join([each.plain or each.make_plain() for each in results])


def _join_reasoned(results: Iterable[CompiledResult]) -> bytes:
    return b",".join([each.reasoned or each.make_reasoned() for each in results])


EVALX = Form(False, _plain, b",".join, _join_plain, b",", b"{", b"}")
"""Body of an evalx response."""

EVALX_REASONED = Form(True, _reasoned, b",".join, _join_reasoned, b",", b"{", b"}")
"""Body of an evalx response with reasons."""
