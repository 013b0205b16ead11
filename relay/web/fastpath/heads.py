"""Normalise raw request heads: take out the values that differ between instances of one client.

Cloud functions connect by the thousand with heads that are the same except for these values. The
parser runs once for each template; all heads with the same template mean the same.
"""

from __future__ import annotations

import re

END = b"\r\n\r\n"
"""The blank line that ends a head."""

MAX_HEAD = 4096
"""Maximum bytes of a head that is remembered; SDKs send a few hundred."""

LENGTH = b"content-length"
PAYLOAD_ID = b"x-launchdarkly-payload-id"

_VARIABLE = re.compile(
    rb"\r\n(content-length|x-launchdarkly-(?:payload|instance)-id): ([0-9A-Za-z-]{1,100})(?=\r\n)",
    re.IGNORECASE,
)

HeadTemplate = tuple[bytes, ...]
"""The texts of a head in between its variable values, with the name of the header before each."""


def normalise_head(head: bytes) -> tuple[HeadTemplate, list[bytes]]:
    """Return the template of a head, and the values taken out of it.

    Only values of letters, digits and dashes are taken out: with any of these, a head is as valid
    as all others with the same template.
    """
    parts = _VARIABLE.split(head)
    values = parts[2::3]
    del parts[2::3]
    return tuple(parts), values


def variable_names(template: HeadTemplate) -> list[bytes]:
    """Return the names of the headers whose values were taken out, in lower case."""
    return [name.lower() for name in template[1::2]]
