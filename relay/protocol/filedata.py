"""File-data format of the SDKs: `flags`, `flagValues` and `segments`, in JSON or YAML.

Files are written by hand, so members that SDKs require get default values (sdk-behaviour 11.3), and
versions are assigned automatically.
"""

from __future__ import annotations

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

import orjson
import yaml
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from relay.errors import InvalidData
from relay.model.item import Item, Kind, parse

Members = dict[str, Any]
Contents = dict[tuple[Kind, str], Members]

_SECTIONS = ("flags", "flagValues", "segments")

_IGNORED = ("deleted",)
"""Members of published documents that are nothing to readers of a file."""


def read(text: bytes, name: str) -> Contents:
    """Parse a file; return its items with all members that SDKs require.

    Args:
        text: content of the file.
        name: name of the file, for messages; `.json` excludes YAML.

    Raises:
        InvalidData: the file is unusable; the message names file, key and, if known, the line.
    """
    sections = _parse_file(text, name)
    contents: Contents = {}
    for key, members in _entries(sections, "flags", name):
        contents[Kind.FLAG, key] = _flag(key, _object(members, f'flag "{key}"', name))
    for key, value in _entries(sections, "flagValues", name):
        if (Kind.FLAG, key) in contents:
            raise InvalidData(name, f'flag "{key}" is both in flags and in flagValues')
        contents[Kind.FLAG, key] = _flag_of_value(key, value)
    for key, members in _entries(sections, "segments", name):
        segment = _object(members, f'segment "{key}"', name)
        contents[Kind.SEGMENT, key] = _segment(key, segment)
    return contents


def numbered(
    contents: Contents, before: Mapping[tuple[Kind, str], Item], floor: int, name: str
) -> tuple[Item, ...]:
    """Return the items with version numbers, greater than in `before` for changed items.

    SDKs accept only greater versions, but files have none or outdated ones. With the modification
    time of the file as `floor`, versions also grow across restarts of the relay. The time is in
    seconds, because some SDKs store versions in 32 bits.

    Raises:
        InvalidData: a member of an item has a wrong type.
    """
    try:
        return tuple(
            _number_item(kind, key, members, before.get((kind, key)), floor)
            for (kind, key), members in contents.items()
        )
    except InvalidData as e:
        raise InvalidData(name, str(e)) from e


def _number_item(kind: Kind, key: str, members: Members, before: Item | None, floor: int) -> Item:
    own_version = parse(kind, key, _json(kind, key, members)).version
    if before is None:
        return _item(kind, key, members, max(own_version, floor))
    unchanged = _item(kind, key, members, before.version)
    if unchanged == before and own_version <= before.version:
        return before
    return _item(kind, key, members, max(own_version, floor, before.version + 1))


def _item(kind: Kind, key: str, members: Members, version: int) -> Item:
    return parse(kind, key, _json(kind, key, {**members, "version": version}))


def _json(kind: Kind, key: str, members: Members) -> bytes:
    try:
        return orjson.dumps(members)
    except TypeError as e:
        hint = ' (in YAML, names such as "on" need quotes)' if "key" in str(e) else ""
        raise InvalidData(f'{kind.noun} "{key}"', f"{e}{hint}") from e


class _Loader(yaml.SafeLoader):
    """YAML loader restricted to values that JSON can represent."""

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """Return a number; reject `.inf` and `.nan`, which would become null in JSON."""
        number: float = self.construct_yaml_float(node)
        if not isfinite(number):
            text = f"{node.value} is not a number that flags can have"
            raise ConstructorError(None, None, text, node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def _parse_file(content: bytes, name: str) -> Members:
    text = _decode_text(content, name)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as e:
        if name.endswith(".json"):
            raise InvalidData(name, f"{_position(e.doc, e.pos)}{e.msg}") from e
        value = _yaml(text, name)
    return _object(value, "the file", name)


def _decode_text(content: bytes, name: str) -> str:
    """Decode a file; drop the byte order mark that some editors write."""
    try:
        if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        # The bytes before the error are valid.
        position = _position(e.object[: e.start].decode(e.encoding, "replace"), -1)
        raise InvalidData(name, f"{position}not {e.encoding.upper()}") from e


def _position(text: str, index: int) -> str:
    """Return the prefix of a message about a character; index -1 means the end of the text."""
    before = text if index < 0 else text[:index]
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    return f"line {line}, column {column}: "


def _yaml(text: str, name: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InvalidData(name, f"{position}{e.problem}") from e
    except ReaderError as e:
        character = f"U+{e.character:04X} is not allowed"
        raise InvalidData(name, f"{_position(text, e.position)}{character}") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise InvalidData(name, str(e)) from e


def _entries(sections: Members, section: str, name: str) -> Iterable[tuple[str, Any]]:
    unknown = [key for key in sections if key not in _SECTIONS + _IGNORED]
    if unknown:
        raise InvalidData(name, f'unknown section "{unknown[0]}"; there are {", ".join(_SECTIONS)}')
    entries = _object(sections.get(section) or {}, section, name)
    for key in entries:
        if not isinstance(key, str):
            raise InvalidData(name, f"{section}: the key {key!r} is not a text; put it in quotes")
    return entries.items()


def _object(value: Any, subject: str, name: str) -> Members:
    if not isinstance(value, dict):
        raise InvalidData(name, f"{subject} must be an object")
    return value


def _flag_of_value(key: str, value: Any) -> Members:
    """Return the flag for an entry of `flagValues`: the same value for every context."""
    return {
        **_flag(key, {"on": True, "variations": [value], "fallthrough": {"variation": 0}}),
        "clientSideAvailability": {"usingMobileKey": True, "usingEnvironmentId": True},
        "clientSide": True,
    }


def _flag(key: str, members: Members) -> Members:
    defaults = {"key": key, "version": 0, "on": False, "salt": key}
    lists: Members = {"variations": [], "targets": [], "rules": [], "prerequisites": []}
    flag = {**defaults, **lists, "fallthrough": {}, **members}
    flag["rules"] = _rules(flag["rules"])
    flag["targets"] = _with_defaults({"values": []}, flag["targets"])
    return flag


def _segment(key: str, members: Members) -> Members:
    lists: Members = {"included": [], "excluded": [], "rules": []}
    segment = {"key": key, "version": 0, "salt": key, **lists, **members}
    segment["rules"] = _rules(segment["rules"])
    return segment


def _rules(rules: Any) -> Any:
    return [_rule(rule) for rule in rules] if isinstance(rules, list) else rules


def _rule(rule: Any) -> Any:
    if not isinstance(rule, dict):
        return rule
    defaults: Members = {"attribute": "", "op": "", "values": []}
    return {**rule, "clauses": _with_defaults(defaults, rule.get("clauses") or [])}


def _with_defaults(defaults: Members, value: Any) -> Any:
    """Add defaults to the objects of a list; wrong types are left to the type check."""
    if not isinstance(value, list):
        return value
    return [{**defaults, **entry} if isinstance(entry, dict) else entry for entry in value]
