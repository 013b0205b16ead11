"""Types of options (config 3.4): parsing, formatting, error messages. Pure.

`OptionType.parse` converts text from a file, a variable or the command line. It returns a value or
raises `ValueError` with a message for the operator. The caller handles empty text, which means
"not set".

Kubernetes secrets, YAML blocks and editors add line ends, blanks, byte order marks and quotation
marks. These are stripped from around a value; the rest is validated by type. No message repeats a
credential.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

from relay.model.credential import Secret
from relay.model.text import is_utf8, one_line
from relay.protocol.redisurl import host_and_port, redis_urls

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
_MAX_INT = 2**63 - 1
"""Maximum of integers, sizes and durations in nanoseconds, as in ld-relay."""
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")
_STRIPPED = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
    + "".join(map(chr, range(0x2000, 0x2010)))
)
"""Blanks and line ends of all kinds, and invisible characters."""
_QUOTED = re.compile(r"""(["'])((?:(?!\1).)*)\1""", re.DOTALL)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NOT_IN_KEY = re.compile("[^!-~]|[\"']")
_NOT_IN_ID = re.compile(r"""[^!-~]|["'/\\?#%]""")
_CHARACTER_NAMES = {
    " ": "a blank", "\t": "a tabulator", "\n": "a line end", "\r": "a carriage return",
    '"': "a quotation mark", "'": "a quotation mark", "/": "a slash", "\u00a0": "a no-break space",
    "\ufeff": "a byte order mark",
}  # fmt: skip
_ORIGIN = re.compile(
    r"([a-z][a-z0-9+.-]*)://([a-z0-9._~-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?/?", re.IGNORECASE
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_PORT = 65535
_HEADER_NAME = re.compile("[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONSUL_PORT = 8500
AUTOMATIC = "auto"
"""Number of workers that is that of the processor cores; 0 as a value."""
LOG_LEVELS = ("debug", "info", "warn", "error", "none")
TLS_VERSIONS = ("1.0", "1.1", "1.2", "1.3")


class OptionType(Struct, frozen=True):
    """Type of an option.

    Args:
        name: name for the documentation.
        convert: parses clean text; raises `ValueError`.
        show: formats a value as it would be written.
        is_text: empty text is a value, too, and replaces an earlier one.
        is_list: values of several sources are combined.
        quotable: quotation marks around a value belong to it. Otherwise they are stripped: Docker's
            env files, for example, keep them.
        by_reference: the value may be secret, so that a file may hold it; see `references`.
    """

    name: str
    convert: Callable[[str], Any]
    show: Callable[[Any], str] = str
    is_text: bool = False
    is_list: bool = False
    quotable: bool = False
    by_reference: bool = False

    def clean(self, text: str) -> str:
        """Return the text without the blanks, line ends and quotation marks around it."""
        text = stripped(text)
        quoted = None if self.quotable else _QUOTED.fullmatch(text)
        return stripped(quoted[2]) if quoted else text

    def parse(self, text: str) -> Any:
        """Return the value of a text.

        Raises:
            ValueError: the text is invalid; the message is for the operator.
        """
        if not is_utf8(text):
            raise ValueError("not UTF-8")
        return self.convert(self.clean(text))


def stripped(text: str) -> str:
    """Return the text without the blanks, line ends and invisible characters around it."""
    return text.strip(_STRIPPED)


def _without(pattern: re.Pattern[str], text: str, rule: str) -> str:
    """Return the text, or raise `ValueError` if it matches the pattern; never repeats the text."""
    if odd := pattern.search(text):
        name = _CHARACTER_NAMES.get(odd[0], f"U+{ord(odd[0]):04X}")
        raise ValueError(f"{rule}, but character {odd.start() + 1} is {name}")
    return text


def _text(text: str) -> str:
    return _without(_CONTROL, text, "must not contain control characters")


def _key(text: str) -> Secret:
    rule = "a key has ASCII characters only, no blanks and no quotation marks"
    return Secret(_without(_NOT_IN_KEY, text, rule))


def _environment_id(text: str) -> str:
    # The ID becomes a segment of URL paths, here and at LaunchDarkly.
    rule = "a client-side ID has ASCII characters only, no blanks, and none of \"'/\\?#%"
    return _without(_NOT_IN_ID, text, rule)


def _origin(text: str) -> str:
    """Return an origin as browsers send it, so that both can be compared."""
    if text == "*" or text.lower() == "null":
        return text.lower()
    if text.lower() in {"file://", "file:///"}:
        return "file://"
    match = _ORIGIN.fullmatch(text)
    if match is None or int(match[3] or 0) > _MAX_PORT:
        raise ValueError(
            f'no browser has the origin "{one_line(text)}"; one looks like https://shop.example.com'
            " or http://localhost:3000, and * means all"
        )
    scheme, host = match[1].lower(), match[2]
    # Only host names are case-insensitive; other schemes, such as those of apps, keep their case.
    host = host.lower() if scheme in _DEFAULT_PORTS else host
    port = int(match[3]) if match[3] else _DEFAULT_PORTS.get(scheme)
    suffix = "" if port in (None, _DEFAULT_PORTS.get(scheme)) else f":{port}"
    return f"{scheme}://{host}{suffix}"


def _header_name(text: str) -> str:
    if not _HEADER_NAME.fullmatch(text):
        raise ValueError(f'"{one_line(text)}" is not the name of a header')
    return text


def _boolean(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError("not a valid boolean value (must be true/false, yes/no, or 0/1)")


def file_boolean(text: str) -> bool:
    """Return a boolean as written in a file, where `on` and `off` are valid, too."""
    aliases = {"on": "true", "off": "false"}
    try:
        return _boolean(aliases.get(text.lower(), text))
    except ValueError:
        raise ValueError(f"failed to parse bool `{text}`") from None


def _number(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,99}", text) or abs(int(text)) > _MAX_INT:
        raise ValueError("not a valid integer")
    return int(text)


def _integer(text: str) -> int:
    number = _number(text)
    if number <= 0:
        raise ValueError("value must be greater than zero")
    return number


def _workers(text: str) -> int:
    return 0 if text.lower() == AUTOMATIC else _integer(text)


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
    if not parts or not whole or nanoseconds > _MAX_INT:
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
    if not parts or not whole or size > _MAX_INT:
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
    if re.search(r"[\s\x00-\x20\x7f-\x9f]", text):
        raise ValueError("not a valid URL/URI")
    if not parts.scheme:
        raise ValueError("must be an absolute URL/URI")
    return text


def _http_uri(text: str) -> str:
    parts = urlsplit(_uri(text))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL that begins with http:// or https:// and names a host")
    return text


def consul_url(address: str) -> str:
    """Return the base URL of Consul's HTTP API (datastore 4.5).

    Args:
        address: host, optionally with port and path, by default with the port on which Consul
            listens; a URL, by default with the port of its scheme; or the path of a Unix socket.

    Raises:
        ValueError: the address is invalid; the message does not repeat it.
    """
    scheme, _, rest = address.rpartition("://")
    if scheme == "unix" and rest:
        return address
    if scheme not in ("", "http", "https"):
        raise ValueError("must begin with http://, https:// or unix://, or with the host")
    parts = urlsplit(_uri(f"{scheme or 'http'}://{rest}"))
    if not parts.hostname or parts.query or parts.fragment:
        raise ValueError("must be a host, or a URL that names one, without ? and #")
    if parts.username is not None:
        raise ValueError("must not contain a user or a password; Consul knows tokens only")
    if not scheme and not parts.port:
        parts = parts._replace(netloc=f"{parts.netloc.rstrip(':')}:{_CONSUL_PORT}")
    return parts.geturl()


def _consul_address(text: str) -> str:
    if text:
        consul_url(text)
    return text


def _redis_uris(text: str) -> str:
    """Return one or several URLs of Redis servers as they are."""
    for url in redis_urls(text):
        _uri(url)
    return text


def _server_address(text: str) -> str:
    """Return an address such as `host:port` as it is."""
    try:
        host_and_port(_text(text), 0)
    except ValueError as e:
        raise ValueError("a server is written host or host:port") from e
    return text


def _document_uri(text: str) -> str:
    """Return the URL of a place for documents; see `stores.documents.location`."""
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    if scheme in ("http", "https"):
        return _http_uri(text)
    parts = urlsplit(_uri(text))
    if parts.query or parts.fragment:
        raise ValueError("a file or an object has no query; ? and # are written %3F and %23")
    if scheme == "file" and rest and parts.netloc in ("", "localhost") and parts.path != "/":
        return text
    if scheme == "s3" and parts.netloc:
        return text
    raise ValueError(
        "must be a URL of the form file:///FOLDER, s3://BUCKET/PREFIX, or https:// with the key as"
        " {key}"
    )


def _list_of(member: OptionType, *, keeps_empty: bool = False) -> OptionType:
    """Return the type of a comma-separated list.

    Args:
        member: type of each value.
        keeps_empty: keep empty values, which are validated elsewhere.
    """

    def convert(text: str) -> tuple[Any, ...]:
        parts = [member.clean(part) for part in text.split(",")]
        values = tuple(member.convert(part) for part in parts if part or keeps_empty)
        if not values:
            # An empty list may mean that all are allowed, and commas alone never mean that.
            raise ValueError("the list has commas only")
        return values

    return OptionType("list", convert, ",".join, is_list=True, by_reference=member.by_reference)


def one_of(*allowed: str, noun: str = "") -> OptionType:
    """Return the type of a case-insensitive choice between words; errors call it `noun`."""

    def parse(text: str) -> str:
        if text.lower() not in allowed:
            names = "" if noun else f" (must be {' or '.join(allowed)})"
            raise ValueError(f'"{text}" is not a valid {noun or "value"}{names}')
        return text.lower()

    *most, last = (f"`{word}`" for word in allowed)
    return OptionType(f"{', '.join(most)} or {last}", parse)


BOOLEAN = OptionType("boolean", _boolean, lambda value: "true" if value else "false")
INTEGER = OptionType("integer above 0", _integer)
WORKERS = OptionType(
    "integer above 0 or `auto`", _workers, lambda number: str(number) if number else AUTOMATIC
)
COUNT = OptionType("integer", _count)
DURATION = OptionType("duration", _duration, _show_duration)
SIZE = OptionType("size", _size, _show_size)
URI = OptionType("URL", _uri, by_reference=True)
REDIS_URIS = OptionType("URL", _redis_uris, by_reference=True)
HTTP_URI = OptionType("URL", _http_uri, by_reference=True)
CONSUL_ADDRESS = OptionType("address", _consul_address, is_text=True)


DOCUMENT_URI = OptionType("URL", _document_uri, by_reference=True)
STRING = OptionType("text", _text, is_text=True, quotable=True)
PATH = OptionType("path", _text, is_text=True)
SECRET = OptionType(
    "secret", Secret, lambda _: "********", is_text=True, quotable=True, by_reference=True
)
KEY = OptionType("key", _key, lambda _: "********", is_text=True, by_reference=True)
ENVIRONMENT_ID = OptionType("ID", _environment_id, is_text=True)
LIST = _list_of(STRING, keeps_empty=True)
PATHS = _list_of(PATH)
ADDRESSES = _list_of(OptionType("address", _server_address))
ORIGINS = _list_of(OptionType("origin", _origin))
HEADER_NAMES = _list_of(OptionType("name", _header_name))
DOCUMENT_URIS = _list_of(DOCUMENT_URI)
LOG_LEVEL = one_of(*LOG_LEVELS, noun="log level")
TLS_VERSION = one_of(*TLS_VERSIONS, noun="TLS version")
