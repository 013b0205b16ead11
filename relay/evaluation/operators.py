"""Clause operators (evaluation 6.6): match a context's value against a clause's value.

Values are decoded JSON: `None`, `bool`, `int`, `float`, `str`, `list` and `dict`; numbers are
compared exactly. Operands of a type that an operator does not support never match.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import re2

Operator = Callable[[Any, Any], bool]
"""Called with the context's value and the clause's value."""

MAX_PATTERNS = 500
"""Compiled regular expressions to cache: more than the clauses of a large environment use."""

_REGEX_OPTIONS = re2.Options()
_REGEX_OPTIONS.log_errors = False  # it would write to stderr
_REGEX_OPTIONS.never_capture = True


def equal(value: object, operand: object) -> bool:
    """Return whether both are the same string, boolean or number; `1` equals `1.0`."""
    if isinstance(value, str):
        return isinstance(operand, str) and value == operand
    if isinstance(value, bool) or isinstance(operand, bool):
        return value is operand
    return is_number(value) and is_number(operand) and value == operand


def is_number(value: object) -> bool:
    """Return whether a value is a JSON number; Python's booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _strings(matches: Callable[[str, str], bool]) -> Operator:
    def compare(value: object, operand: object) -> bool:
        return isinstance(value, str) and isinstance(operand, str) and matches(value, operand)

    return compare


def _numbers(matches: Callable[[Any, Any], bool]) -> Operator:
    def compare(value: object, operand: object) -> bool:
        return is_number(value) and is_number(operand) and matches(value, operand)

    return compare


def _dates(matches: Callable[[int, int], bool]) -> Operator:
    def compare(value: object, operand: object) -> bool:
        time, other = timestamp(value), timestamp(operand)
        if time is None or other is None or other == ZERO_TIME:
            return False
        return matches(time, other)

    return compare


def _versions(matches: Callable[[Any, Any], bool]) -> Operator:
    def compare(value: object, operand: object) -> bool:
        version, other = semantic_version(value), semantic_version(operand)
        return version is not None and other is not None and matches(version, other)

    return compare


@lru_cache(MAX_PATTERNS)
def regex(pattern: str) -> Callable[[bytes], object] | None:
    """Return a linear-time search for a pattern in UTF-8; None if the pattern is invalid."""
    try:
        search: Callable[[bytes], object] = re2.compile(pattern, _REGEX_OPTIONS).search
    except re2.error:
        return None
    return search


def _search(text: str, pattern: str) -> bool:
    search = regex(pattern)
    return search is not None and search(text.encode()) is not None


_SECOND = 1_000_000_000
_MILLISECOND = 1_000_000
_DAYS_TO_1970 = 719_468
ZERO_TIME = -62_135_596_800 * _SECOND
"""The start of the year 1, Go's zero time: ld-relay takes it for "no date" in clauses."""

_RFC_3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt](\d{1,2}):(\d\d):(\d\d)(?:\.(\d{1,9}))?"
    r"(?:[Zz]|([+-])(\d\d):(\d\d)\Z)",
    re.ASCII,
)


def timestamp(value: object) -> int | None:
    """Return a date, in milliseconds or as RFC 3339, as nanoseconds since 1970; None if neither."""
    if isinstance(value, str):
        return _rfc_3339(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _wrap_int64(int(value) * _MILLISECOND)
    return None


def _wrap_int64(nanoseconds: int) -> int:
    """Wrap a number like a signed 64-bit integer on overflow."""
    return (nanoseconds + 2**63) % 2**64 - 2**63


def _rfc_3339(text: str) -> int | None:
    match = _RFC_3339.match(text)
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(match[group]) for group in range(1, 7))
    in_range = 1 <= month <= 12 and 1 <= day <= 31 and hour <= 23 and minute <= 59 and second <= 60  # noqa: PLR2004
    sign, offset_hours, offset_minutes = match[8], int(match[9] or 0), int(match[10] or 0)
    if not in_range or offset_minutes > 59:  # noqa: PLR2004
        return None
    offset = (offset_hours * 60 + offset_minutes) * (-60 if sign == "-" else 60)
    seconds = _days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - offset
    return seconds * _SECOND + int((match[7] or "").ljust(9, "0"))


def _days(year: int, month: int, day: int) -> int:
    """Return the days since 1970 in the Gregorian calendar; 30 February is 1 or 2 March."""
    # Counting years from March puts the leap day at the end.
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)  # noqa: PLR2004
    leap_days = year // 4 - year // 100 + year // 400
    return year * 365 + leap_days + (month * 153 + 2) // 5 + day - 1 - _DAYS_TO_1970


_NUMERIC = r"(0|[1-9][0-9]*)"
_PRERELEASE = r"(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_BUILD = r"[0-9A-Za-z-]+"
_VERSION = re.compile(
    rf"{_NUMERIC}(?:\.{_NUMERIC}(?:\.{_NUMERIC})?)?"
    rf"(?:-({_PRERELEASE}(?:\.{_PRERELEASE})*))?(?:\+{_BUILD}(?:\.{_BUILD})*)?"
)

_Field = tuple[int, int, str]
"""Sorts like a field of a version. Numbers stay text because they may have any length."""


def semantic_version(value: object) -> tuple[Any, ...] | None:
    """Return a sort key for a semantic version; None if the value is not one."""
    match = _VERSION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    major, minor, patch, prerelease = match.groups()
    numbers = (_field(major), _field(minor or "0"), _field(patch or "0"))
    if prerelease is None:
        return (*numbers, 1)  # a release sorts after its pre-releases
    return (*numbers, 0, tuple(map(_field, prerelease.split("."))))


def _field(text: str) -> _Field:
    return (0, len(text), text) if text.isdecimal() else (1, 0, text)


OPERATORS: dict[str, Operator] = {
    "in": equal,
    "startsWith": _strings(str.startswith),
    "endsWith": _strings(str.endswith),
    "contains": _strings(operator.contains),
    "matches": _strings(_search),
    "lessThan": _numbers(operator.lt),
    "lessThanOrEqual": _numbers(operator.le),
    "greaterThan": _numbers(operator.gt),
    "greaterThanOrEqual": _numbers(operator.ge),
    "before": _dates(operator.lt),
    "after": _dates(operator.gt),
    "semVerEqual": _versions(operator.eq),
    "semVerLessThan": _versions(operator.lt),
    "semVerGreaterThan": _versions(operator.gt),
}
"""All operators but `segmentMatch`, which needs more than values. Unknown operators never match."""
