"""Text from outside, made fit for a line of a log and for a header. Pure.

Configuration, upstream and clients are checked where they come in. This is the last line of
defence, where text goes out: nothing can end a line or a header that we began.
"""

from __future__ import annotations

import re

_UNFIT_FOR_A_LINE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters, other line ends, changes of the direction of writing, bytes of no text."""

_UNFIT_FOR_A_HEADER = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_BYTES = re.compile("[\ud800-\udfff]")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}
_FIRST_BYTE, _LAST_BYTE = 0xDC80, 0xDCFF
"""Surrogates that Python makes of bytes that are not UTF-8: 0xDC00 and the byte."""


def is_utf8(text: str) -> bool:
    """Whether a text has no bytes in it that Python could only keep as they were."""
    return not _BYTES.search(text)


def one_line(text: str) -> str:
    """Return a text with what would end a line, or confuse its reader, shown as an escape."""
    return _UNFIT_FOR_A_LINE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] in _SHORT:
        return _SHORT[match[0]]
    if _FIRST_BYTE <= code <= _LAST_BYTE:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"  # noqa: PLR2004 - two digits


def header_value(value: bytes) -> bytes:
    """Return the value of a header without what would end it; a blank stands in its place.

    Go's server does the same (net/http, `headerNewlineToSpace`), for all control characters here.
    """
    return _UNFIT_FOR_A_HEADER.sub(b" ", value).strip(b" \t")
