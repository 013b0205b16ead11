"""Request heads as bytes: what is left of one without what each instance and each post has anew.

Functions come by the thousand, and all of them say the same but for these values. What a head means
is found out once, by the parser; whoever has the same outline means the same.
"""

from __future__ import annotations

import re

END = b"\r\n\r\n"
"""What ends a head."""

MAX_HEAD = 4096
"""Bytes of a head whose meaning is worth remembering; SDKs send a few hundred."""

LENGTH = b"content-length"
PAYLOAD_ID = b"x-launchdarkly-payload-id"

_VARIABLE = re.compile(
    rb"\r\n(content-length|x-launchdarkly-(?:payload|instance)-id): ([0-9A-Za-z-]{1,100})(?=\r\n)",
    re.IGNORECASE,
)

HeadTemplate = tuple[bytes, ...]
"""Texts of a head, each but the last followed by the name of a header whose value is left out."""


def normalise_head(head: bytes) -> tuple[HeadTemplate, list[bytes]]:
    """Return the outline of a head, and the values that it leaves out.

    Only values of letters, digits and dashes are left out: whatever they are, a head is as valid as
    another one with the same outline.
    """
    parts = _VARIABLE.split(head)
    values = parts[2::3]
    del parts[2::3]
    return tuple(parts), values


def variable_names(template: HeadTemplate) -> list[bytes]:
    """Return the names of the headers whose values are left out, in lower case."""
    return [name.lower() for name in template[1::2]]
