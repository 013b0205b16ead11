"""What opens an environment: SDK key, mobile key, client-side ID. And secrets, which print masked.

Two masks exist because two readers exist: logs show the last four characters (`...abcd`), `/status`
keeps the shape of the key (status 8.1), so that an operator can compare it with the dashboard.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

_HEX = re.compile("[0-9a-fA-F]")
_KIND_PREFIX = re.compile("[a-z]{3}-")
_PLAIN_TAIL = 5


def obscured(key: str) -> str:
    """Return `key` as `/status` shows it: hexadecimal digits but the last five become `*`."""
    if _KIND_PREFIX.match(key):
        return key[:4] + obscured(key[4:])
    if len(key) <= _PLAIN_TAIL - 1:
        return key
    return _HEX.sub("*", key[:-_PLAIN_TAIL]) + key[-_PLAIN_TAIL:]


def masked(key: str) -> str:
    """Return `key` as log lines show it: three dots and the last four characters."""
    return "..." + key[-4:]


def masked_url(url: str, mask: str) -> str:
    """Return `url` without what its userinfo and its query could tell.

    What stands alone before the `@` is masked as well: to Redis it is a password.
    """
    parts = urlsplit(url)
    if "@" in parts.path + parts.query + parts.fragment:
        return f"{parts.scheme}://{mask}"  # a `/` in a password, perhaps: it begins anywhere
    userinfo, at, server = parts.netloc.rpartition("@")
    name, colon, _ = userinfo.partition(":")
    shown = f"{name}:{mask}" if colon else mask if name else ""
    query = re.sub("=[^&]*", f"={mask}", parts.query)
    return parts._replace(netloc=f"{shown}{at}{server}", query=query).geturl()


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """A text that never prints itself, such as a password or a webhook secret."""

    _value: str

    def reveal(self) -> str:
        """Return the text itself, for the one place that must send it."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Secret(...)"

    __str__ = __repr__


@dataclass(frozen=True, slots=True, repr=False)
class SDKKey:
    """The key of server-side SDKs, sent in `Authorization`."""

    value: str

    @property
    def masked(self) -> str:
        """The key for log lines."""
        return masked(self.value)

    @property
    def obscured(self) -> str:
        """The key for `/status`."""
        return obscured(self.value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.masked})"

    __str__ = __repr__


@dataclass(frozen=True, slots=True, repr=False)
class MobileKey(SDKKey):
    """The key of mobile SDKs, sent in `Authorization`. Never accepted where an SDK key is due."""


@dataclass(frozen=True, slots=True)
class EnvironmentID:
    """The client-side ID: public, part of the path of client-side endpoints."""

    value: str


Credential = SDKKey | MobileKey | EnvironmentID
