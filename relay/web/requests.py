"""Headers and query parameters of requests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import unquote_plus

from starlette.requests import Request

from relay.model.journal import UNRELIABLE

MAX_BASIS = 512
"""Characters of a state that can be one of ours or of LaunchDarkly's: several times as many."""

MAX_VALUE = 1024
"""Bytes of a value that is decoded: more than any key, hash or state has, and soon done."""


def parameter(request: Request, name: str) -> str:
    """Return the first value of a query parameter of a request; empty without one."""
    query = request.scope["query_string"]
    return parameter_in(query, name, len(query))


def parameter_in(query: bytes, name: str, limit: int = MAX_VALUE) -> str:
    """Return the first value of a parameter in a query; empty without one.

    Without looking at the others: a query may have thousands.

    Args:
        query: as received.
        name: of letters.
        limit: bytes of a value that is decoded; a longer one is returned as it is.
    """
    if not query:
        return ""
    found = _pattern(name).search(query)
    value = (found and found[1]) or b""
    text = value.decode("latin-1")
    return unquote_plus(text) if len(value) <= limit else text


def basis_in(query: bytes) -> str:
    """Return the state that a client names in a query (fdv2 13.2.5); empty without one.

    One that is too long is kept nowhere.
    """
    basis = parameter_in(query, "basis")
    return basis if len(basis) <= MAX_BASIS else UNRELIABLE


@lru_cache
def _pattern(name: str) -> re.Pattern[bytes]:
    """Return the pattern of a parameter, each letter of whose name may be escaped."""
    letters = (f"(?:{letter}|%{ord(letter):x}|%{ord(letter):X})" for letter in name)
    return re.compile(f"(?:^|&){''.join(letters)}(?:=([^&]*))?(?=&|\\Z)".encode())


def header(request: Request, name: str) -> bytes:
    """Return the first value of a header; empty without one.

    Args:
        request: to read.
        name: in lower case.
    """
    wanted = name.encode()
    for field, value in request.scope["headers"]:
        if field == wanted:
            return bytes(value)
    return b""


def first_values(request: Request) -> Mapping[bytes, bytes]:
    """Return the headers of a request by name in lower case, each with its first value."""
    return dict(reversed(request.scope["headers"]))
