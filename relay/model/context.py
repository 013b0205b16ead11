"""Evaluation contexts: who asks for flags, read from JSON, and how attributes of them are named.

The three forms of JSON (single-kind, multi-kind, legacy user: evaluation 6.2) become one shape.
What a context says is its user's business: no message of this module repeats any of it.
"""

from __future__ import annotations

import json as stdlib_json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from relay.errors import InvalidData

DEFAULT_KIND = "user"
"""The kind of legacy users, and the one that rules mean when they name none."""

MAX_KINDS = 100
"""More kinds than any context has; bounds what one request can make us keep and sort."""

_KIND = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
_RESERVED_KINDS = frozenset({"kind", "multi"})
_BAD_ESCAPE = re.compile(r"~(?![01])")
_ESCAPES = re.compile(
    rb"(\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u(?![dD][89a-fA-F])|\\[^u])|\\u....", re.DOTALL
)
"""Each escape in JSON; those that are half a pair of surrogates are not in the group."""
_DECODER = msgspec.json.Decoder()

_USER_STRINGS = frozenset({"firstName", "lastName", "email", "country", "avatar", "ip"})
"""Top-level attributes of legacy users, beside `name`. Others are ignored."""

_NOT_CUSTOM = frozenset({"kind", "key", "name", "anonymous", "_meta"})
"""What `custom` of a legacy user cannot set."""


class Individual(msgspec.Struct, frozen=True):
    """The part of a context that is of one kind.

    Args:
        kind: such as `user` or `device`.
        key: identifies it among its kind; empty only for a legacy user.
        attributes: all that can be addressed by name, `kind`, `key`, `name` (if set) and
            `anonymous` included; none is None.
        secondary: the secondary key of a legacy user; not addressable.
    """

    kind: str
    key: str
    attributes: Mapping[str, Any]
    secondary: str | None = None


class Context(msgspec.Struct, frozen=True):
    """Who asks for flags: at least one individual, each of another kind."""

    individuals: Mapping[str, Individual]

    def get(self, kind: str) -> Individual | None:
        """Return the individual of a kind; an empty kind means `user`."""
        return self.individuals.get(kind or DEFAULT_KIND)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds, in the order in which they were given."""
        return tuple(self.individuals)

    @property
    def is_multi(self) -> bool:
        """Whether there is more than one individual."""
        return len(self.individuals) > 1

    @property
    def has_empty_key(self) -> bool:
        """Whether this is a legacy user with the key "", for whom nothing can be evaluated."""
        user = self.individuals.get(DEFAULT_KIND)
        return user is not None and not user.key and not self.is_multi

    @property
    def fully_qualified_key(self) -> str:
        """The text that secure mode signs (endpoints 1.4)."""
        if not self.is_multi:
            (only,) = self.individuals.values()
            return only.key if only.kind == DEFAULT_KIND else _qualified(only)
        return ":".join(_qualified(self.individuals[kind]) for kind in sorted(self.individuals))


def _qualified(individual: Individual) -> str:
    escaped = individual.key.replace("%", "%25").replace(":", "%3A")
    return f"{individual.kind}:{escaped}"


def parse_context(json: bytes) -> Context:
    """Return the context that JSON describes. What is no Unicode in its strings becomes U+FFFD.

    Raises:
        InvalidData: not JSON, nested too deeply, or no valid context.
    """
    value = _json(json)
    if not isinstance(value, dict):
        raise _invalid("must be an object")
    if "kind" not in value:
        return _only(_legacy_user(value))
    kind = value["kind"]
    if not isinstance(kind, str):
        raise _invalid('"kind" must be a string')
    if kind == "multi":
        return _multi(value, json)
    return _only(_individual(kind, value))


def _json(json: bytes) -> Any:
    try:
        return _DECODER.decode(json)
    except RecursionError as e:
        raise _invalid("nested too deeply") from e
    except (msgspec.DecodeError, ValueError) as e:
        mended = _mended(json)
        if mended != json:
            return _json(mended)
        # The decoder tells places, never content.
        raise _invalid(str(e)) from None


def _mended(json: bytes) -> bytes:
    """Return JSON whose strings are Unicode."""
    whole = _ESCAPES.sub(lambda escape: escape[1] or rb"\ufffd", json)
    return whole.decode(errors="replace").encode()


def _invalid(reason: str) -> InvalidData:
    return InvalidData("context", reason)


def _only(individual: Individual) -> Context:
    return Context({individual.kind: individual})


def _multi(members: dict[str, Any], json: bytes) -> Context:
    if len(members) == 1:
        raise _invalid("a multi-kind context must have at least one kind")
    if len(members) > MAX_KINDS:
        raise _invalid(f"more than {MAX_KINDS} kinds")
    if _size(json) != len(members):
        raise _invalid("a multi-kind context must not have a kind twice")
    individuals = {}
    for kind, nested in members.items():
        if kind == "kind":
            continue
        if not isinstance(nested, dict):
            raise _invalid("each kind of a multi-kind context must be an object")
        individuals[kind] = _individual(kind, nested)
    return Context(individuals)


def _size(json: bytes) -> int:
    """Return the number of members of an object, counting those that are there twice."""
    text = json.decode(errors="replace")
    try:
        # The outermost object is the last that is complete; numbers do not matter.
        size: int = stdlib_json.loads(text, object_pairs_hook=len, parse_int=len)
    except RecursionError as e:
        raise _invalid("nested too deeply") from e
    return size


def _individual(kind: str, members: dict[str, Any]) -> Individual:
    """Return a context of one kind, which `members` become part of (evaluation 6.2)."""
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
    """Return a context in the form of the time before kinds. Members count in their order."""
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
            attributes |= {inner: given for inner, given in custom if inner not in _NOT_CUSTOM}
        elif name in _USER_STRINGS or name == "name":
            attributes[name] = value
    attributes["anonymous"] = bool(members.get("anonymous"))
    attributes = {name: value for name, value in attributes.items() if value is not None}
    return Individual(DEFAULT_KIND, key, attributes, members.get("secondary"))


def _check(name: str, value: object, wanted: type) -> None:
    if value is not None and not isinstance(value, wanted):
        raise _invalid(f'"{name}" has a wrong type')


def _check_strings(name: str, value: object) -> None:
    _check(name, value, list)
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise _invalid(f'"{name}" must hold strings')


Reference = tuple[str, ...]
"""The path to an attribute: its name, then names of members within its value."""


def parse_reference(text: str, *, literal: bool) -> Reference | None:
    """Return the path that an attribute reference means (evaluation 6.1); None if it is invalid.

    Args:
        text: as the flag or segment has it.
        literal: where no context kind is named, the text is the name of a top-level attribute,
            even if it begins with a slash.
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
    """Return the value at a path; None if there is none, or if it is null."""
    value = individual.attributes.get(path[0])
    for name in path[1:]:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value
