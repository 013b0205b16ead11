"""Redaction of keys, contexts and queries in log lines."""

from __future__ import annotations

import re

MASK_TAIL = 5
"""Number of a credential's last characters that a line shows (status 8.3)."""


CREDENTIAL = re.compile(r"\b(?:sdk|mob|rel|api)-[0-9A-Za-z-]+")


def redact_url(target: str, *, has_context: bool = False) -> str:
    """Return a request target with placeholders for its context and query, and masked keys.

    Any query is replaced: clients send personal data even to routes that take none.

    Args:
        target: request target, not decoded.
        has_context: True if the last segment of the path is a context.
    """
    path, separator, _ = target.partition("?")
    if has_context:
        path = path.rpartition("/")[0] + "/{context}"
    path = CREDENTIAL.sub(lambda match: mask_credential(match[0]), path)
    return path + "?{query}" if separator else path


def mask_credential(credential: str) -> str:
    """Return a credential for a log line: only its end."""
    return "*" + credential[-MASK_TAIL:]
