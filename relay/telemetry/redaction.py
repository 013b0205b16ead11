"""Keeps keys, contexts and queries out of log lines."""

from __future__ import annotations

import re

MASK_TAIL = 5
"""Characters of a credential that a line shows (status 8.3)."""


_CREDENTIAL = re.compile(r"\b(?:sdk|mob|rel|api)-[0-9A-Za-z-]+")


def redact_url(target: str, *, has_context: bool = False) -> str:
    """Return a request's target for a line: without keys and contexts, and of a query the place.

    People's data are in all kinds of queries, also where none belongs.

    Args:
        target: not decoded.
        has_context: whether the last segment of the path is a context.
    """
    path, mark, _ = target.partition("?")
    if has_context:
        path = path.rpartition("/")[0] + "/{context}"
    path = _CREDENTIAL.sub(lambda match: _masked(match[0]), path)
    return path + "?{query}" if mark else path


def _masked(credential: str) -> str:
    return "*" + credential[-MASK_TAIL:]
