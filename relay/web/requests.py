"""Headers and query parameters of requests."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl

from starlette.requests import Request


def parameter(request: Request, name: str) -> str:
    """Return the first value of a query parameter of a request; empty without one."""
    return parameter_in(request.scope["query_string"], name)


def parameter_in(query: bytes, name: str) -> str:
    """Return the first value of a parameter in a query; empty without one."""
    return parameters_in(query).get(name, "") if query else ""


def parameters_in(query: bytes) -> Mapping[str, str]:
    """Return the parameters in a query by name, each with its first value."""
    return dict(reversed(parse_qsl(query.decode("latin-1"), keep_blank_values=True)))


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
