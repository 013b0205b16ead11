"""Analytics events: joining the arrays of several payloads, and summaries for old schemas.

Events of a current schema are never parsed, only checked to be well-formed. SDKs of schemas 1 and 2
report each evaluation and rely on a relay to count them (events 5.5); their values are copied as
raw JSON, so that numbers and unknown members stay exact.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Raw, Struct

from relay.errors import InvalidData
from relay.lru import LRUMap
from relay.model.item import Item

SUMMARY_SCHEMA = 4
"""Schema of the events that `summarise` returns."""

MAX_CONTEXTS = 1000
"""Maximum number of remembered contexts; as in ld-relay."""

FORGET_AFTER = 300.0
"""Seconds after which contexts are introduced again; as in ld-relay."""

_skip = msgspec.json.Decoder(Raw).decode
"""Fastest known syntax check: 5 µs for the 7 KB of forty events."""

_WHITESPACE = b" \t\n\r"
_EMPTY = re.compile(rb"[ \t\n\r]*\[[ \t\n\r]*\][ \t\n\r]*")
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)"
)


def is_array(body: bytes) -> bool:
    """Return whether a text begins and ends like a JSON array; the rest is not read."""
    text = body.strip(_WHITESPACE)
    return len(text) > 1 and text[:1] == b"[" and text[-1:] == b"]"


def is_empty(body: bytes) -> bool:
    """Return whether a text is a JSON array without elements."""
    return _EMPTY.fullmatch(body) is not None


def is_well_formed(body: bytes) -> bool | None:
    """Return whether a text is JSON in UTF-8 (RFC 8259); None if it is nested too deeply to tell.

    Lone surrogates, written as escapes, are well-formed: SDKs write them for a text that was cut
    within an emoji.
    """
    try:
        if not body.isascii():
            body.decode()  # the decoder does not check UTF-8 in values that it skips
        _skip(body)
    except RecursionError:
        return None
    except UnicodeDecodeError:
        return False
    except msgspec.DecodeError:
        replaced = _replace_lone_surrogates(body)
        return is_well_formed(replaced) if replaced != body else False
    return True


def _replace_lone_surrogates(body: bytes) -> bytes:
    """Return a text with U+FFFD in place of each escaped lone surrogate."""
    return _ESCAPE.sub(lambda m: b"\\ufffd" if m["lone"] else m[0], body)


def join_arrays(bodies: Iterable[bytes]) -> bytes:
    """Return one array of the elements of several, in order, with their bytes unchanged.

    Args:
        bodies: texts for which `is_array` is true.
    """
    texts = [body.strip(_WHITESPACE) for body in bodies if not is_empty(body)]
    if len(texts) < 2:  # noqa: PLR2004 - nothing to join
        return texts[0] if texts else b"[]"
    # The outer brackets are those of the first and last array, which saves a copy of the result.
    first, last = memoryview(texts[0])[:-1], memoryview(texts[-1])[1:]
    return b",".join([first, *(memoryview(text)[1:-1] for text in texts[1:-1]), last])


class Contexts:
    """Contexts of a partition that were introduced upstream by a recent index event."""

    def __init__(self) -> None:
        self._known: LRUMap[bytes, None] = LRUMap(MAX_CONTEXTS)
        """Digests of kinds and keys."""
        self._since: float | None = None

    def forget_old(self, now: float) -> None:
        """Forget all contexts, `FORGET_AFTER` seconds after the first.

        Args:
            now: seconds of a clock that is never set.
        """
        if self._since is None or now - self._since >= FORGET_AFTER:
            self._known.clear()
            self._since = now

    def introduce(self, keys: Iterable[tuple[str, str]]) -> bool:
        """Remember a context; return whether it was unknown.

        Args:
            keys: its kinds and keys, sorted by kind.
        """
        digest = blake2b(msgspec.json.encode(keys), digest_size=16).digest()
        known = digest in self._known
        self._known.put(digest, None)
        return not known

    def forget(self) -> None:
        """Forget all contexts, because the index events that introduced them are lost."""
        self._known.clear()


Flags = Callable[[str], Item | None]
"""Function that returns a flag by its key; None if there is none."""


class Summary(NamedTuple):
    """Result of summarising a payload.

    Args:
        body: array of events of `SUMMARY_SCHEMA`; None if there is nothing to send.
        dropped: numbers of dropped events by reason.
    """

    body: bytes | None
    dropped: Mapping[str, int]


def summarise(
    body: bytes,
    schema: int,
    flags: Flags,
    contexts: Contexts,
    *,
    now: int,
    server_time: int,
) -> Summary:
    """Convert the events of a payload to the current schema, and count its evaluations.

    Args:
        body: text of a JSON array.
        schema: schema of its events.
        flags: look-up of flags, for evaluations that lack the flag's tracking options.
        contexts: known contexts of the partition.
        now: our clock in Unix milliseconds.
        server_time: upstream's clock at its last response, in Unix milliseconds. Debug events end
            by the later one of both clocks.
    """
    summariser = _Summariser(schema, flags, contexts, now=now, debug_now=max(now, server_time))
    try:
        events = _elements(body)
    except InvalidData as e:
        return Summary(None, {e.reason: 1})
    for event in events:
        try:
            summariser.add(event)
        except InvalidData as e:
            summariser.dropped[e.reason] += 1
        except (msgspec.MsgspecError, ValueError) as e:
            summariser.dropped[f"invalid event: {e}"] += 1
        except RecursionError:
            summariser.dropped["nested too deeply"] += 1
    output = summariser.output()
    return Summary(msgspec.json.encode(output) if output else None, summariser.dropped)


def _elements(body: bytes) -> list[Raw]:
    """Return the elements of an array, verbatim but for lone surrogates.

    Raises:
        InvalidData: it is not an array.
    """
    try:
        body.decode()  # elements are copied undecoded, so nothing else checks UTF-8
        try:
            return msgspec.json.decode(body, type=list[Raw])
        except msgspec.DecodeError:
            return msgspec.json.decode(_replace_lone_surrogates(body), type=list[Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise InvalidData("events", f"no JSON array: {e}") from e
    except RecursionError as e:
        raise InvalidData("events", "nested too deeply") from e


# Members of events that are read; members that are only copied stay `Raw`.

_Integer = Annotated[float, Meta(ge=-(2**53), le=2**53)]
"""Number that means an integer; a fraction is truncated, as in ld-relay."""

_NULL = Raw(b"null")


class _Kind(Struct):
    kind: str


class _Event(Struct, rename="camel"):
    creation_date: _Integer | None = None
    key: str | None = None
    context: Raw = _NULL
    user: Raw = _NULL
    user_key: str | None = None
    sampling_ratio: _Integer | None = None


class _Evaluation(_Event, rename="camel"):
    version: _Integer | None = None
    variation: _Integer | None = None
    value: Raw = _NULL
    default: Raw = _NULL
    reason: Raw = _NULL
    prereq_of: str | None = None
    track_events: bool | None = None
    debug_events_until_date: _Integer | None = None
    exclude_from_summaries: bool | None = None


class _Custom(_Event, rename="camel"):
    data: Raw = _NULL
    metric_value: Raw = _NULL


class _KindAndKey(Struct):
    kind: str | None = None
    key: str | None = None


class _Tracking(Struct, rename="camel"):
    """Tracking options of a flag, and its variations."""

    track_events: bool = False
    debug_events_until_date: float | None = None
    variations: Raw = _NULL


_kind = msgspec.json.Decoder(_Kind)
_event = msgspec.json.Decoder(_Event)
_evaluation = msgspec.json.Decoder(_Evaluation)
_custom = msgspec.json.Decoder(_Custom)
_kind_and_key = msgspec.json.Decoder(_KindAndKey)
_members = msgspec.json.Decoder(dict[str, Raw])
_number = msgspec.json.Decoder(float)
_tracking = msgspec.json.Decoder(_Tracking)

_CONTEXT_KIND = re.compile("[A-Za-z0-9._-]+")


class _Context(NamedTuple):
    keys: tuple[tuple[str, str], ...]
    """Kinds and keys, sorted by kind."""
    json: Raw | None
    """None if the event has only a user's key."""


def _context(event: _Event) -> _Context:
    """Return the context of an event.

    Raises:
        InvalidData: it has none.
    """
    raw = event.context if _is_present(event.context) else event.user
    if _is_present(raw):
        return _Context(tuple(sorted(_keys_of(raw))), raw)
    if event.user_key is None:
        raise InvalidData("event", "neither context nor user")
    return _Context((("user", event.user_key),), None)


def _keys_of(raw: Raw) -> list[tuple[str, str]]:
    context = _kind_and_key.decode(raw)
    if context.kind is None:  # a legacy user, the only one whose key may be empty
        if context.key is None:
            raise InvalidData("event", "user without key")
        return [("user", context.key)]
    if context.kind != "multi":
        return [_checked_key(context.kind, context.key)]
    parts = _members.decode(raw)
    del parts["kind"]
    if not parts:
        raise InvalidData("event", "context of no kind")
    return [_checked_key(kind, _kind_and_key.decode(part).key) for kind, part in parts.items()]


def _checked_key(kind: str, key: str | None) -> tuple[str, str]:
    if kind in ("kind", "multi") or not _CONTEXT_KIND.fullmatch(kind):
        raise InvalidData("event", "context of invalid kind")
    if not key:
        raise InvalidData("event", "context without key")
    return kind, key


def _is_present(raw: Raw) -> bool:
    return bytes(raw) != b"null"


@dataclass(slots=True)
class _Counter:
    value: Raw
    """Value of the first evaluation."""
    count: int = 0


@dataclass(slots=True)
class _FlagCounters:
    """Counters of the evaluations of one flag."""

    default: Raw
    """Default of the first evaluation."""
    kinds: set[str] = field(default_factory=set)
    by_result: dict[tuple[int | None, int | None], _Counter] = field(default_factory=dict)
    """Counters by variation and version."""

    def output(self) -> dict[str, object]:
        counters = [
            _omit_none(
                variation=variation,
                version=version,
                unknown=True if version is None else None,
                value=counter.value,
                count=counter.count,
            )
            for (variation, version), counter in self.by_result.items()
        ]
        return {"default": self.default, "counters": counters, "contextKinds": sorted(self.kinds)}


class _Summariser:
    """Builds the output of `summarise` from the events of one payload.

    Args:
        schema: schema of the payload.
        flags: as in `summarise`.
        contexts: as in `summarise`.
        now: our clock in Unix milliseconds.
        debug_now: the later one of our clock and upstream's, in Unix milliseconds.
    """

    def __init__(
        self,
        schema: int,
        flags: Flags,
        contexts: Contexts,
        *,
        now: int,
        debug_now: int,
    ) -> None:
        self.dropped: Counter[str] = Counter()
        self._schema = schema
        self._flags = flags
        self._contexts = contexts
        self._now = now
        self._debug_now = debug_now
        self._events: list[object] = []
        self._counters: dict[str, _FlagCounters] = {}
        self._dates: list[int] = []
        """First and last date of the counted evaluations; empty before the first."""

    def add(self, raw: Raw) -> None:
        """Add an event.

        Raises:
            InvalidData: a required member is missing or invalid.
            MsgspecError: it is no event.
        """
        kind = _kind.decode(raw).kind
        if not kind:
            raise InvalidData("event", "empty kind")
        if kind == "feature":
            self._add_evaluation(_evaluation.decode(raw))
        elif kind == "custom":
            self._add_custom(_custom.decode(raw))
        elif kind == "identify":
            self._add_identify(_event.decode(raw))
        else:
            self._events.append(raw)

    def output(self) -> list[object]:
        """Return the output events; the summary is the last one."""
        if not self._counters:
            return self._events
        features = {key: counters.output() for key, counters in self._counters.items()}
        start, end = self._dates
        summary = {"kind": "summary", "startDate": start, "endDate": end, "features": features}
        return [*self._events, summary]

    def _add_evaluation(self, event: _Evaluation) -> None:
        context = _context(event)
        tracked, debugged, variation = self._tracking_of(event)
        if not event.exclude_from_summaries:
            self._count(event, context, variation)
        self._introduce(event, context)
        if tracked:
            self._events.append(self._full_event("feature", event, context, variation))
        if debugged > self._debug_now:
            self._events.append(self._full_event("debug", event, context, variation))

    def _tracking_of(self, event: _Evaluation) -> tuple[bool, float, int | None]:
        """Return whether to send the full event, the end of debug events, and the variation."""
        variation = _truncate(event.variation)
        if event.version is None:  # the flag did not exist
            return False, 0, variation
        if event.track_events is not None or event.debug_events_until_date:
            return bool(event.track_events), event.debug_events_until_date or 0, variation
        flag = self._flags(event.key or "")
        if flag is None or flag.json is None:
            return False, 0, variation
        tracking = _tracking.decode(flag.json)
        if variation is None and self._schema == 1:
            variation = _variation_index(event.value, tracking.variations)
        return tracking.track_events, tracking.debug_events_until_date or 0, variation

    def _count(self, event: _Evaluation, context: _Context, variation: int | None) -> None:
        date = self._date(event)
        self._dates = [min([date, *self._dates]), max([date, *self._dates])]
        counters = self._counters.setdefault(event.key or "", _FlagCounters(event.default))
        counters.kinds.update(kind for kind, _ in context.keys)
        result = variation, _truncate(event.version)
        counters.by_result.setdefault(result, _Counter(event.value)).count += 1

    def _introduce(self, event: _Event, context: _Context) -> None:
        # A user's key alone is in the event itself; an index event would add nothing.
        if context.json is None or not self._contexts.introduce(context.keys):
            return
        date = self._date(event)
        self._events.append({"kind": "index", "creationDate": date, "context": context.json})

    def _add_custom(self, event: _Custom) -> None:
        context = _context(event)
        if _is_present(event.metric_value):
            _number.decode(event.metric_value)
        self._introduce(event, context)
        output = _omit_none(
            kind="custom",
            creationDate=self._date(event),
            key=event.key or "",
            data=_none_if_null(event.data),
            contextKeys=dict(context.keys),
            metricValue=_none_if_null(event.metric_value),
            samplingRatio=_sampling_ratio(event),
        )
        self._events.append(output)

    def _add_identify(self, event: _Event) -> None:
        context = _context(event)
        if context.json is None:
            raise InvalidData("event", "neither context nor user")
        self._contexts.introduce(context.keys)
        date, ratio = self._date(event), _sampling_ratio(event)
        output = _omit_none(
            kind="identify", creationDate=date, context=context.json, samplingRatio=ratio
        )
        self._events.append(output)

    def _full_event(
        self, kind: str, event: _Evaluation, context: _Context, variation: int | None
    ) -> dict[str, object]:
        return _omit_none(
            kind=kind,
            creationDate=self._date(event),
            key=event.key or "",
            version=_truncate(event.version),
            context=context.json,
            contextKeys=dict(context.keys) if context.json is None else None,
            variation=variation,
            value=event.value,
            default=event.default,
            reason=_none_if_null(event.reason),
            prereqOf=event.prereq_of,
            samplingRatio=_sampling_ratio(event),
        )

    def _date(self, event: _Event) -> int:
        return self._now if event.creation_date is None else int(event.creation_date)


def _omit_none(**members: object) -> dict[str, object]:
    """Return a JSON object without the members that are None."""
    return {name: value for name, value in members.items() if value is not None}


def _none_if_null(raw: Raw) -> Raw | None:
    return raw if _is_present(raw) else None


def _truncate(number: float | None) -> int | None:
    return None if number is None else int(number)


def _sampling_ratio(event: _Event) -> int | None:
    return None if event.sampling_ratio == 1 else _truncate(event.sampling_ratio)


def _variation_index(value: Raw, variations: Raw) -> int | None:
    """Return the index of the first variation that equals a value; None if none does."""
    # The standard library's parser keeps integers of any size.
    wanted, candidates = json.loads(bytes(value)), json.loads(bytes(variations))
    return next((i for i, each in enumerate(candidates or ()) if _equal(each, wanted)), None)


def _equal(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; in Python, `1 == True`."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)
