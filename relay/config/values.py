"""The types of option (config 3.4): how each is written, and what is said when it is not. Pure.

`parse` gives a value or raises `ValueError` with the sentence that the operator reads. Empty text
has been dealt with before: it means "not set".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

from relay.model.credential import Secret

_DURATION_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_NANOSECONDS = {
    "h": 3600 * 10**9,
    "m": 60 * 10**9,
    "s": 10**9,
    "ms": 10**6,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ns": 1,
}
_SIZE_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([KMGTPE]i?B|B)", re.IGNORECASE)
_SIZE_UNITS = "BKMGTPE"
_LARGEST = 2**63 - 1
"""Of integers, sizes and nanoseconds, as in the reference."""
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")
LOG_LEVELS = ("debug", "info", "warn", "error", "none")
TLS_VERSIONS = ("1.0", "1.1", "1.2", "1.3")


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of option.

    Args:
        name: for people.
        parse: text to value.
        show: value to text, as it would be written.
    """

    name: str
    parse: Callable[[str], Any]
    show: Callable[[Any], str] = str


def _boolean(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError("not a valid boolean value (must be true/false, yes/no, or 0/1)")


def file_boolean(text: str) -> bool:
    """Return a boolean as files may write it, which know `on` and `off` beside the others."""
    aliases = {"on": "true", "off": "false"}
    try:
        return _boolean(aliases.get(text.lower(), text))
    except ValueError:
        raise ValueError(f"failed to parse bool `{text}`") from None


def _number(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,99}", text) or abs(int(text)) > _LARGEST:
        raise ValueError("not a valid integer")
    return int(text)


def _integer(text: str) -> int:
    number = _number(text)
    if number <= 0:
        raise ValueError("value must be greater than zero")
    return number


def _count(text: str) -> int:
    number = _number(text)
    if number < 0:
        raise ValueError("value must not be negative")
    return number


def _signed(text: str) -> tuple[int, str]:
    return (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))


def _duration(text: str) -> float:
    sign, rest = _signed(text)
    if rest == "0":
        return 0.0
    parts = _DURATION_PART.findall(rest)
    nanoseconds = sum(int(Decimal(number) * _NANOSECONDS[unit]) for number, unit in parts)
    whole = "".join(number + unit for number, unit in parts) == rest
    if not parts or not whole or nanoseconds > _LARGEST:
        raise ValueError('not a valid duration (must use format "1ms", "1s", "1m", etc.)')
    return sign * nanoseconds / 1e9


def _show_duration(seconds: float) -> str:
    nanoseconds = round(seconds * 1e9)
    for unit, size in _NANOSECONDS.items():
        if nanoseconds and nanoseconds % size == 0:
            return f"{nanoseconds // size}{unit}"
    return "0s"


def _size(text: str) -> int:
    sign, rest = _signed(text.replace(" ", ""))
    if rest == "0":
        return 0
    parts = _SIZE_PART.findall(rest)
    size = sum(float(n) * 1024 ** _SIZE_UNITS.index(unit[0].upper()) for n, unit in parts)
    whole = "".join(number + unit for number, unit in parts) == rest
    if not parts or not whole or size > _LARGEST:
        raise ValueError("not a valid base-2 byte size")
    return sign * int(size)


def _show_size(size: int) -> str:
    for power in range(len(_SIZE_UNITS) - 1, 0, -1):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{_SIZE_UNITS[power]}iB"
    return f"{size}B"


def _uri(text: str) -> str:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        raise ValueError("not a valid URL/URI") from None
    if re.search(r"[\x00-\x20\x7f]", text):
        raise ValueError("not a valid URL/URI")
    if not parts.scheme:
        raise ValueError("must be an absolute URL/URI")
    return text


def _http_uri(text: str) -> str:
    parts = urlsplit(_uri(text))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL that begins with http:// or https:// and names a host")
    return text


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def one_of(*allowed: str, what: str = "") -> Kind:
    """Return the type of which only these words are values, whatever their case."""
    noun = what or "value"

    def parse(text: str) -> str:
        if text.lower() not in allowed:
            names = "" if what else f" (must be {' or '.join(allowed)})"
            raise ValueError(f'"{text}" is not a valid {noun}{names}')
        return text.lower()

    *most, last = (f"`{word}`" for word in allowed)
    return Kind(f"{', '.join(most)} or {last}", parse)


BOOLEAN = Kind("boolean", _boolean, lambda value: "true" if value else "false")
INTEGER = Kind("integer above 0", _integer)
COUNT = Kind("integer", _count)
DURATION = Kind("duration", _duration, _show_duration)
SIZE = Kind("size", _size, _show_size)
URI = Kind("URL", _uri)
HTTP_URI = Kind("URL", _http_uri)
STRING = Kind("text", str)
PATH = Kind("path", str)
SECRET = Kind("secret", Secret, lambda _: "********")
LIST = Kind("list", _list, ",".join)
LOG_LEVEL = one_of(*LOG_LEVELS, what="log level")
TLS_VERSION = one_of(*TLS_VERSIONS, what="TLS version")
