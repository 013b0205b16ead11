"""The file-data format of the SDKs: `flags`, `flagValues` and `segments`, in JSON or YAML.

A file is written by hand, so what SDKs insist on is filled in (sdk-behaviour 11.3), and versions,
which nobody counts by hand, are counted here.
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


def read(text: bytes, name: str) -> Contents:
    """Return what a file describes, each item with all members that SDKs insist on.

    Args:
        text: the bytes of the file.
        name: of the file, for messages; `.json` excludes YAML.

    Raises:
        InvalidData: the file cannot be used; the message names file, key and, where known, line.
    """
    sections = _loaded(text, name)
    contents: Contents = {}
    for key, members in _entries(sections, "flags", name):
        contents[Kind.FLAG, key] = _flag(key, _object(members, f'flag "{key}"', name))
    for key, value in _entries(sections, "flagValues", name):
        if (Kind.FLAG, key) in contents:
            raise InvalidData(name, f'flag "{key}" is both in flags and in flagValues')
        contents[Kind.FLAG, key] = _simple_flag(key, value)
    for key, members in _entries(sections, "segments", name):
        given = _object(members, f'segment "{key}"', name)
        contents[Kind.SEGMENT, key] = _segment(key, given)
    return contents


def numbered(
    contents: Contents, before: Mapping[tuple[Kind, str], Item], floor: int, name: str
) -> tuple[Item, ...]:
    """Return the items, each with a greater version than `before` if it differs.

    SDKs take only greater versions, and a file has none or stale ones. With the time of the file's
    last change as `floor`, a changed file has greater versions also after a restart of the relay.
    That time is in seconds, because some SDKs keep versions in 32 bits.

    Raises:
        InvalidData: an item has a member of a wrong type.
    """
    try:
        return tuple(
            _numbered(kind, key, members, before.get((kind, key)), floor)
            for (kind, key), members in contents.items()
        )
    except InvalidData as e:
        raise InvalidData(name, str(e)) from e


def _numbered(kind: Kind, key: str, members: Members, before: Item | None, floor: int) -> Item:
    own = parse(kind, key, _json(kind, key, members)).version
    if before is None:
        return _item(kind, key, members, max(own, floor))
    same = _item(kind, key, members, before.version)
    if same == before and own <= before.version:
        return before
    return _item(kind, key, members, max(own, floor, before.version + 1))


def _item(kind: Kind, key: str, members: Members, version: int) -> Item:
    return parse(kind, key, _json(kind, key, {**members, "version": version}))


def _json(kind: Kind, key: str, members: Members) -> bytes:
    try:
        return orjson.dumps(members)
    except TypeError as e:
        hint = ' (in YAML, names such as "on" need quotes)' if "key" in str(e) else ""
        raise InvalidData(f'{kind.noun} "{key}"', f"{e}{hint}") from e


class _Loader(yaml.SafeLoader):
    """Reads what JSON can say as well."""

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """Return a number; JSON knows neither `.inf` nor `.nan`, which would become null."""
        number: float = self.construct_yaml_float(node)
        if not isfinite(number):
            text = f"{node.value} is not a number that flags can have"
            raise ConstructorError(None, None, text, node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def _loaded(content: bytes, name: str) -> Members:
    text = _decoded(content, name)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as e:
        if name.endswith(".json"):
            raise InvalidData(name, f"{_place(e.doc, e.pos)}{e.msg}") from e
        value = _yaml(text, name)
    return _object(value, "the file", name)


def _decoded(content: bytes, name: str) -> str:
    """Return the text of a file, without the byte order mark that some editors write."""
    try:
        if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        # What came before it could be read.
        place = _place(e.object[: e.start].decode(e.encoding, "replace"), -1)
        raise InvalidData(name, f"{place}not {e.encoding.upper()}") from e


def _place(text: str, at: int) -> str:
    """Return the beginning of a message on a character; -1 stands for the one behind the text."""
    before = text if at < 0 else text[:at]
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    return f"line {line}, column {column}: "


def _yaml(text: str, name: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InvalidData(name, f"{where}{e.problem}") from e
    except ReaderError as e:
        character = f"U+{e.character:04X} is not allowed"
        raise InvalidData(name, f"{_place(text, e.position)}{character}") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise InvalidData(name, str(e)) from e


def _entries(sections: Members, section: str, name: str) -> Iterable[tuple[str, Any]]:
    unknown = [key for key in sections if key not in _SECTIONS]
    if unknown:
        raise InvalidData(name, f'unknown section "{unknown[0]}"; there are {", ".join(_SECTIONS)}')
    entries = _object(sections.get(section) or {}, section, name)
    for key in entries:
        if not isinstance(key, str):
            raise InvalidData(name, f"{section}: the key {key!r} is not a text; put it in quotes")
    return entries.items()


def _object(value: Any, what: str, name: str) -> Members:
    if not isinstance(value, dict):
        raise InvalidData(name, f"{what} must be an object")
    return value


def _simple_flag(key: str, value: Any) -> Members:
    """The whole flag behind a line of `flagValues`: one value for everybody."""
    return {
        **_flag(key, {"on": True, "variations": [value], "fallthrough": {"variation": 0}}),
        "clientSideAvailability": {"usingMobileKey": True, "usingEnvironmentId": True},
        "clientSide": True,
    }


def _flag(key: str, given: Members) -> Members:
    defaults = {"key": key, "version": 0, "on": False, "salt": key}
    lists: Members = {"variations": [], "targets": [], "rules": [], "prerequisites": []}
    flag = {**defaults, **lists, "fallthrough": {}, **given}
    flag["rules"] = _rules(flag["rules"])
    flag["targets"] = _each({"values": []}, flag["targets"])
    return flag


def _segment(key: str, given: Members) -> Members:
    lists: Members = {"included": [], "excluded": [], "rules": []}
    segment = {"key": key, "version": 0, "salt": key, **lists, **given}
    segment["rules"] = _rules(segment["rules"])
    return segment


def _rules(rules: Any) -> Any:
    return [_rule(rule) for rule in rules] if isinstance(rules, list) else rules


def _rule(rule: Any) -> Any:
    if not isinstance(rule, dict):
        return rule
    empty: Members = {"attribute": "", "op": "", "values": []}
    return {**rule, "clauses": _each(empty, rule.get("clauses") or [])}


def _each(defaults: Members, given: Any) -> Any:
    """Add defaults to the objects of a list; other things are left to the check of types."""
    if not isinstance(given, list):
        return given
    return [{**defaults, **one} if isinstance(one, dict) else one for one in given]
