"""Evaluation contexts parsed from JSON, and references to their attributes.

The three forms of JSON (single-kind, multi-kind, legacy user: evaluation 6.2) become one shape.
Contexts hold personal data, so no message of this module quotes any of it.
"""

from __future__ import annotations

import json as stdlib_json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from relay.errors import InvalidData

DEFAULT_KIND = "user"
"""The kind of legacy users, and the default of rules that name no kind."""

MAX_KINDS = 100
"""More kinds than any real context has; bounds the memory and the sorting that a request costs."""

_KIND = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
_RESERVED_KINDS = frozenset({"kind", "multi"})
_BAD_ESCAPE = re.compile(r"~(?![01])")
_ESCAPES = re.compile(
    rb"(\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u(?![dD][89a-fA-F])|\\[^u])|\\u....", re.DOTALL
)
"""Matches every escape in JSON; the group captures all but unpaired surrogates."""
_DECODER = msgspec.json.Decoder()

_USER_STRINGS = frozenset({"firstName", "lastName", "email", "country", "avatar", "ip"})
"""Top-level attributes of legacy users, beside `name`. Others are ignored."""

_NOT_CUSTOM = frozenset({"kind", "key", "name", "anonymous", "_meta"})
"""Attributes that `custom` of a legacy user cannot set."""


class Individual(msgspec.Struct, frozen=True):
    """The part of a context that belongs to one kind.

    Args:
        kind: the context kind, such as `user` or `device`.
        key: unique within its kind; empty only for a legacy user.
        attributes: all addressable attributes by name, including `kind`, `key`, `name` (if set)
            and `anonymous`; no value is None.
        secondary: the secondary key of a legacy user; not addressable.
    """

    kind: str
    key: str
    attributes: Mapping[str, Any]
    secondary: str | None = None


class Context(msgspec.Struct, frozen=True):
    """The subject of an evaluation: at least one individual, each of a different kind."""

    individuals: Mapping[str, Individual]

    def get(self, kind: str) -> Individual | None:
        """Return the individual of a kind; an empty kind means `user`."""
        return self.individuals.get(kind or DEFAULT_KIND)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the individuals, in the order of the JSON."""
        return tuple(self.individuals)

    @property
    def is_multi(self) -> bool:
        """True if there is more than one individual."""
        return len(self.individuals) > 1

    @property
    def has_empty_key(self) -> bool:
        """True for a legacy user with the key "", for whom no flag can be evaluated."""
        user = self.individuals.get(DEFAULT_KIND)
        return user is not None and not user.key and not self.is_multi

    @property
    def fully_qualified_key(self) -> str:
        """The text that secure mode signs (endpoints 1.4)."""
        if not self.is_multi:
            (individual,) = self.individuals.values()
            return individual.key if individual.kind == DEFAULT_KIND else _qualified(individual)
        return ":".join(_qualified(self.individuals[kind]) for kind in sorted(self.individuals))


def _qualified(individual: Individual) -> str:
    escaped = individual.key.replace("%", "%25").replace(":", "%3A")
    return f"{individual.kind}:{escaped}"


def parse_context(json: bytes) -> Context:
    """Parse a context. Whatever is not Unicode in its strings becomes U+FFFD, as in ld-relay.

    Raises:
        InvalidData: not JSON, nested too deeply, or not a valid context.
    """
    value = _decode(json)
    if not isinstance(value, dict):
        raise _invalid("must be an object")
    if "kind" not in value:
        return _single_kind(_legacy_user(value))
    kind = value["kind"]
    if not isinstance(kind, str):
        raise _invalid('"kind" must be a string')
    if kind == "multi":
        return _multi_kind(value, json)
    return _single_kind(_individual(kind, value))


def _decode(json: bytes) -> Any:
    try:
        return _DECODER.decode(json)
    except RecursionError as e:
        raise _invalid("nested too deeply") from e
    except (msgspec.DecodeError, ValueError) as e:
        repaired = _replace_invalid_unicode(json)
        if repaired != json:
            return _decode(repaired)
        # The decoder's messages name positions, never content.
        raise _invalid(str(e)) from None


def _replace_invalid_unicode(json: bytes) -> bytes:
    """Replace invalid UTF-8 and unpaired surrogates in JSON by U+FFFD."""
    repaired = _ESCAPES.sub(lambda escape: escape[1] or rb"\ufffd", json)
    return repaired.decode(errors="replace").encode()


def _invalid(reason: str) -> InvalidData:
    return InvalidData("context", reason)


def _single_kind(individual: Individual) -> Context:
    return Context({individual.kind: individual})


def _multi_kind(members: dict[str, Any], json: bytes) -> Context:
    if len(members) == 1:
        raise _invalid("a multi-kind context must have at least one kind")
    if len(members) > MAX_KINDS:
        raise _invalid(f"more than {MAX_KINDS} kinds")
    if _count_members(json) != len(members):
        raise _invalid("a multi-kind context must not have a kind twice")
    individuals = {}
    for kind, nested in members.items():
        if kind == "kind":
            continue
        if not isinstance(nested, dict):
            raise _invalid("each kind of a multi-kind context must be an object")
        individuals[kind] = _individual(kind, nested)
    return Context(individuals)


def _count_members(json: bytes) -> int:
    """Return the number of members of a JSON object, counting duplicates."""
    text = json.decode(errors="replace")
    try:
        # The hook is called for the outermost object last; `len` makes numbers cheap to parse.
        size: int = stdlib_json.loads(text, object_pairs_hook=len, parse_int=len)
    except RecursionError as e:
        raise _invalid("nested too deeply") from e
    return size


def _individual(kind: str, members: dict[str, Any]) -> Individual:
    """Validate an individual (evaluation 6.2); takes `members` over as its attributes."""
    if kind != DEFAULT_KIND and (kind in _RESERVED_KINDS or _KIND.fullmatch(kind) is None):
        raise _invalid('"kind" is not allowed')
    key = members.get("key")
    if not isinstance(key, str) or not key:
        raise _invalid('"key" must be a string that is not empty')
    if not isinstance(members.setdefault("anonymous", False), bool):
        raise _invalid('"anonymous" must be true or false')
    if None in members.values():
        members = {name: value for name, value in members.items() if value is not None}
    if "name" in members:
        _check("name", members["name"], str)
    if "_meta" in members:
        meta = members.pop("_meta")
        _check("_meta", meta, dict)
        _check_strings("privateAttributes", meta.get("privateAttributes"))
    members["kind"] = kind
    return Individual(kind, key, members)


def _legacy_user(members: dict[str, Any]) -> Individual:
    """Validate a legacy user; of a member and a `custom` attribute, the later one wins."""
    key = members.get("key")
    if not isinstance(key, str):
        raise _invalid('"key" must be a string')
    for name in ("name", "secondary", *_USER_STRINGS):
        _check(name, members.get(name), str)
    _check("anonymous", members.get("anonymous"), bool)
    _check("custom", members.get("custom"), dict)
    _check_strings("privateAttributeNames", members.get("privateAttributeNames"))
    attributes: dict[str, Any] = {"kind": DEFAULT_KIND, "key": key}
    for name, value in members.items():
        if name == "custom":
            custom = (value or {}).items()
            attributes |= {inner: setting for inner, setting in custom if inner not in _NOT_CUSTOM}
        elif name in _USER_STRINGS or name == "name":
            attributes[name] = value
    attributes["anonymous"] = bool(members.get("anonymous"))
    attributes = {name: value for name, value in attributes.items() if value is not None}
    return Individual(DEFAULT_KIND, key, attributes, members.get("secondary"))


def _check(name: str, value: object, expected: type) -> None:
    if value is not None and not isinstance(value, expected):
        raise _invalid(f'"{name}" has a wrong type')


def _check_strings(name: str, value: object) -> None:
    _check(name, value, list)
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise _invalid(f'"{name}" must hold strings')


Reference = tuple[str, ...]
"""Path to an attribute: its name, then the names of nested members."""


def parse_reference(text: str, *, literal: bool) -> Reference | None:
    """Parse an attribute reference (evaluation 6.1); return None if it is invalid.

    Args:
        text: the reference in the flag or segment.
        literal: take the text as the name of a top-level attribute even if it starts with a
            slash; so it is in a clause or rollout that names no context kind.
    """
    if not text:
        return None
    if literal or not text.startswith("/"):
        return (text,)
    if _BAD_ESCAPE.search(text):
        return None
    components = text[1:].split("/")
    if not all(components):
        return None
    return tuple(name.replace("~1", "/").replace("~0", "~") for name in components)


def lookup(individual: Individual, path: Reference) -> Any | None:
    """Return the value at a path; None if it is missing or null."""
    value = individual.attributes.get(path[0])
    for name in path[1:]:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value
