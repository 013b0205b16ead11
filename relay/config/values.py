"""The types of option (config 3.4): how each is written, and what is said when it is not. Pure.

`parse` gives a value or raises `ValueError` with the sentence that the operator reads. Empty text
has been dealt with before: it means "not set".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from relay.model.credential import Secret

_DURATION_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_SECONDS = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "μs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_SIZE_PART = re.compile(r"(\d+\.?\d*|\.\d+)([KMGTPE]i?B|B)", re.IGNORECASE)
_SIZE_UNITS = "BKMGTPE"
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


def _integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        raise ValueError("not a valid integer")
    if int(text) <= 0:
        raise ValueError("value must be greater than zero")
    return int(text)


def _count(text: str) -> int:
    if not re.fullmatch(r"\+?\d+", text, re.ASCII):
        raise ValueError("not a valid integer")
    return int(text)


def _duration(text: str) -> float:
    sign, rest = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if rest == "0":
        return 0.0
    parts = _DURATION_PART.findall(rest)
    if not parts or "".join(number + unit for number, unit in parts) != rest:
        raise ValueError('not a valid duration (must use format "1ms", "1s", "1m", etc.)')
    return sign * sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _show_duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s" if seconds == 0 or abs(seconds) >= 1 else f"{seconds * 1000:g}ms"


def _size(text: str) -> int:
    parts = _SIZE_PART.findall(text.replace(" ", ""))
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise ValueError("not a valid base-2 byte size")
    return int(sum(float(n) * 1024 ** _SIZE_UNITS.index(unit[0].upper()) for n, unit in parts))


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
    if not parts.scheme:
        raise ValueError("must be an absolute URL/URI")
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

    return Kind(" or ".join(f"`{word}`" for word in allowed), parse)


BOOLEAN = Kind("boolean", _boolean, lambda value: "true" if value else "false")
INTEGER = Kind("integer above 0", _integer)
COUNT = Kind("integer", _count)
DURATION = Kind("duration", _duration, _show_duration)
SIZE = Kind("size", _size, _show_size)
URI = Kind("URL", _uri)
STRING = Kind("text", str)
PATH = Kind("path", str)
SECRET = Kind("secret", Secret, lambda _: "********")
LIST = Kind("list", _list, ",".join)
LOG_LEVEL = one_of(*LOG_LEVELS, what="log level")
TLS_VERSION = one_of(*TLS_VERSIONS, what="TLS version")
