"""Expectations of `/status`: `?expect=PATH=VALUE` (newer-versions 10.3); pure.

Probes and deployment scripts ask for one fact and get it as a status code, without a JSON parser:
`/status?expect=environments.main.status=connected`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

import orjson

from relay.web.responses import PreparedResponse, json

Schema = Mapping[str, "Schema | None"]
"""Members that a page may have: None for a single value, `*` for any name, `[]` for elements."""

_KEYS: Schema = {"[]": {"key": None, "value": None, "expiry": None}}
_ERROR: Schema = {"kind": None, "statusCode": None, "time": None}
_INVALID: Schema = {"invalidItemCount": None, "invalidItems": {"*": None}}
_DATABASE: Schema = {
    **dict.fromkeys(("state", "stateSince", "database", "dbServer", "dbPrefix", "dbTable")),
    **_INVALID,
}

ENVIRONMENT: Schema = {
    **dict.fromkeys(("sdkKey", "envId", "envKey", "envName", "projKey", "projName", "mobileKey")),
    **dict.fromkeys(("expiringSdkKey", "status", "dataAge", "items", "rejected", "streams")),
    **dict.fromkeys(("requests", "newStreams", "unusable")),
    "sdkKeys": _KEYS,
    "mobileKeys": _KEYS,
    "connectionStatus": {"state": None, "stateSince": None, "lastError": _ERROR},
    "dataStoreStatus": _DATABASE,
    "dataStores": {"[]": _DATABASE},
    "bigSegmentStatus": dict.fromkeys(("available", "potentiallyStale", "lastSynchronizedOn")),
    "published": {"[]": dict.fromkeys(("state", "stateSince", "document", "url"))},
    "events": {"*": None},
    "fdv2": {
        "answers": {"*": {"*": None}},
        **dict.fromkeys(("bytesSaved", "states", "barriers")),
    },
    **_INVALID,
}
"""Members of one environment."""

OVERVIEW: Schema = {
    "environments": {"*": ENVIRONMENT},
    "status": None,
    "version": None,
    "clientVersion": None,
    "autoConfigStatus": {
        **dict.fromkeys(("state", "stateSince", "dataAge", "lastConfirmed", "stored")),
        "lastError": _ERROR,
        "invalidEntryCount": None,
        "invalidEntries": {"*": None},
    },
    "archiveStatus": {"unusable": None, "time": None},
    "workers": {"[]": dict.fromkeys(("number", "state", "pid", "since", "restarts", "streams"))},
}
"""Members of `/status`."""

_STEP = re.compile(
    r"""\.?(?P<key>[^.\[\]=!<>~"']+)"""
    r"""|\[(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)')\]"""
    r"""|\[(?P<index>\d+)\]"""
    r"""|\[(?P<field>[^=\[\]]+)=(?P<value>[^\[\]]*)\]"""
)
_OPERATOR = re.compile(r"[!=<>]=|[!=]~|[=!<>~]")
_UNDECODABLE = re.compile(rb"%(?![0-9A-Fa-f]{2})|;")

_UNPARSABLE, _UNKNOWN, _UNSATISFIED, _SATISFIED = 400, 422, 412, 200
_SEVERITY = (_UNPARSABLE, _UNKNOWN, _UNSATISFIED, _SATISFIED)


class _Filter(NamedTuple):
    """Chooses the element of an array whose field has a value."""

    field: str
    value: str


_Path = Sequence["str | int | _Filter"]


def expectations_in(query: bytes) -> list[str] | None:
    """Return the values of `expect` in a query; None if the query cannot be decoded."""
    if _UNDECODABLE.search(query):
        return None
    try:
        pairs = [
            [unquote_to_bytes(part.replace(b"+", b" ")).decode() for part in pair.split(b"=", 1)]
            for pair in query.split(b"&")
        ]
    except UnicodeDecodeError:
        return None
    return [rest[0] if rest else "" for name, *rest in pairs if name == "expect"]


def check(response: PreparedResponse, query: bytes, schema: Schema) -> PreparedResponse:
    """Return the answer to the expectations of a query, or the response if there are none.

    Args:
        response: page of `/status`; an error comes before any expectation.
        query: of the request.
        schema: members that the page may have.
    """
    if response.status != _SATISFIED or not query:
        return response
    expressions = expectations_in(query)
    if expressions is None:
        error = "could not parse the query string"
        return json(_UNPARSABLE, {"satisfied": False, "error": error})
    if not expressions:
        return response
    page = orjson.loads(response.body)
    checked = [_check(page, expression, schema) for expression in expressions]
    code = min((code for code, _ in checked), key=_SEVERITY.index)
    results = [result for _, result in checked]
    return json(code, {"satisfied": code == _SATISFIED, "results": results})


def _check(page: object, expression: str, schema: Schema) -> tuple[int, Mapping[str, object]]:
    """Return the status code and the result of one expectation."""
    result: dict[str, object] = {"expr": expression}
    parsed = _parse(expression)
    if parsed is None:
        return _UNPARSABLE, {**result, "problem": "it is not PATH=VALUE", "ok": False}
    path, operator, expected = parsed
    result["expected"] = expected
    if operator not in ("=", "!="):
        problem = f'there is no operator "{operator}"; = and != are known'
        return _UNKNOWN, {**result, "problem": problem, "ok": False}
    if unknown := _problem_with(path, schema):
        return _UNKNOWN, {**result, "problem": unknown, "ok": False}
    actual = _find(page, path)
    if actual is None:
        return _UNSATISFIED, {**result, "problem": "there is no such value now", "ok": False}
    result["actual"] = actual
    ok = (actual == expected) is (operator == "=")
    return _SATISFIED if ok else _UNSATISFIED, {**result, "ok": ok}


def _parse(expression: str) -> tuple[_Path, str, str] | None:
    """Return path, operator and value of an expectation; None if it has no such form."""
    path: list[str | int | _Filter] = []
    at = 0
    while found := _STEP.match(expression, at):
        at = found.end()
        match found.lastgroup:
            case "index":
                path.append(int(found["index"]))
            case "value":
                path.append(_Filter(found["field"], found["value"].strip("\"'")))
            case group:
                path.append(found[group or 0])
    operator = _OPERATOR.match(expression, at)
    if not path or operator is None:
        return None
    return path, operator[0], expression[operator.end() :]


def _problem_with(path: _Path, schema: Schema) -> str | None:
    """Return why a path cannot lead to a value; None if it can."""
    members: Schema | None = schema
    for step in path:
        if members is None:
            return f'"{_named(step)}" is looked for in a single value'
        of_list = isinstance(step, (int, _Filter))
        if of_list is not ("[]" in members):
            return f'"{_named(step)}" is looked for in {"an object" if of_list else "a list"}'
        name = "[]" if of_list else str(step)
        if name not in members and "*" not in members:
            return f'there is no member "{name}"'
        members = members.get(name, members.get("*"))
        if isinstance(step, _Filter) and step.field not in (members or ()):
            return f'there is no member "{step.field}"'
    return None if members is None else "it is not a single value"


def _named(step: str | int | _Filter) -> str:
    return f"{step.field}={step.value}" if isinstance(step, _Filter) else str(step)


def _find(page: object, path: _Path) -> str | None:
    """Return the value of a path as text; None if it is absent."""
    value = page
    for step in path:
        match step, value:
            case str(), dict():
                value = value.get(step)
            case int(), list():
                value = value[step] if step < len(value) else None
            case _Filter(field, wanted), list():
                value = next(iter(_with_field(value, field, wanted)), None)
            case _:
                return None
    if value is None or isinstance(value, (dict, list)):
        return None
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _with_field(elements: Iterable[object], field: str, wanted: str) -> Iterable[object]:
    return (each for each in elements if _find(each, [field]) == wanted)
