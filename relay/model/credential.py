"""Credentials of an environment (SDK key, mobile key, client-side ID), and secrets.

Keys are masked in two ways for two readers: logs show the last four characters (`...abcd`);
`/status` keeps the shape of the key (status 8.1), so that an operator can compare it with the
dashboard.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar
from urllib.parse import urlsplit

_HEX = re.compile("[0-9a-fA-F]")
_KIND_PREFIX = re.compile("[a-z]{3}-")
_PLAIN_TAIL = 5


def obscured(key: str) -> str:
    """Mask `key` for `/status`: hexadecimal digits before the last five characters become `*`."""
    if _KIND_PREFIX.match(key):
        return key[:4] + obscured(key[4:])
    if len(key) <= _PLAIN_TAIL - 1:
        return key
    return _HEX.sub("*", key[:-_PLAIN_TAIL]) + key[-_PLAIN_TAIL:]


def masked(key: str) -> str:
    """Mask `key` for log lines: three dots and the last four characters."""
    return "..." + key[-4:]


def masked_url(url: str, mask: str) -> str:
    """Mask the password and the query values of `url`.

    Userinfo without a colon is masked as well, because Redis takes it for a password.
    """
    parts = urlsplit(url)
    if "@" in parts.path + parts.query + parts.fragment:
        # Perhaps an unescaped `/`, `?` or `#` in a password, which may start anywhere.
        return f"{parts.scheme}://{mask}"
    userinfo, at, server = parts.netloc.rpartition("@")
    name, colon, _ = userinfo.partition(":")
    shown = f"{name}:{mask}" if colon else mask if name else ""
    query = re.sub("=[^&]*", f"={mask}", parts.query)
    return parts._replace(netloc=f"{shown}{at}{server}", query=query).geturl()


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """A text that is never printed, such as a password or a webhook secret."""

    _value: str

    def reveal(self) -> str:
        """Return the text itself, for the place that sends it."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Secret(...)"

    __str__ = __repr__


class CredentialKind(Enum):
    """The three kinds of credentials; one kind is never accepted in place of another."""

    SDK_KEY = "SDK key"
    MOBILE_KEY = "mobile key"
    ENVIRONMENT_ID = "client-side ID"

    __hash__ = object.__hash__  # the enum's own is a Python function, and look-ups hash it


@dataclass(frozen=True, slots=True, repr=False)
class Credential:
    """Base of the credentials, which are equal if kind and text are."""

    value: str
    kind: ClassVar[CredentialKind]

    @property
    def masked(self) -> str:
        """The credential for log lines."""
        return masked(self.value)

    @property
    def obscured(self) -> str:
        """The credential for `/status`."""
        return obscured(self.value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.masked})"

    __str__ = __repr__


class SDKKey(Credential):
    """The key of server-side SDKs, sent in `Authorization`."""

    __slots__ = ()
    kind = CredentialKind.SDK_KEY


class MobileKey(Credential):
    """The key of mobile SDKs, sent in `Authorization`."""

    __slots__ = ()
    kind = CredentialKind.MOBILE_KEY


class EnvironmentID(Credential):
    """The client-side ID: public, part of the paths of client-side endpoints."""

    __slots__ = ()
    kind = CredentialKind.ENVIRONMENT_ID

    def __repr__(self) -> str:
        return f"EnvironmentID({self.value})"

    __str__ = __repr__


class AutoConfigKey(Credential):
    """The key with which this relay asks for its list of environments; it opens none."""

    __slots__ = ()
