"""Untrusted text: its encoding, and its form in log lines and headers. Pure.

Input from configuration, upstream and clients is validated where it enters. This is the last line
of defence on the way out: no text can end a log line or a header early.
"""

from __future__ import annotations

import binascii
import re
from base64 import urlsafe_b64encode

_NOT_IN_LINES = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters, other line ends, changes of the writing direction, undecodable bytes."""

_NOT_IN_HEADERS = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_SURROGATES = re.compile("[\ud800-\udfff]")
_SHORT_ESCAPES = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}
_FIRST_BYTE, _LAST_BYTE = 0xDC80, 0xDCFF
"""Surrogates by which `surrogateescape` represents bytes that are not UTF-8: 0xDC00 plus byte."""


def is_utf8(text: str) -> bool:
    """Return whether a text has no surrogates, which stand for bytes that are not UTF-8."""
    return not _SURROGATES.search(text)


def one_line(text: str) -> str:
    """Escape the characters of a text that would end a line or confuse its reader."""
    return _NOT_IN_LINES.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[match[0]]
    if _FIRST_BYTE <= code <= _LAST_BYTE:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"  # noqa: PLR2004 - two digits


def header_value(value: bytes) -> bytes:
    """Replace control characters in the value of a header, which could end it, by spaces.

    Go's server does that for line ends (net/http, `headerNewlineToSpace`).
    """
    return _NOT_IN_HEADERS.sub(b" ", value).strip(b" \t")


def from_base64(text: bytes, ignored: bytes = b"") -> bytes:
    """Decode base64 in either alphabet, padded or not.

    Args:
        text: the encoded bytes.
        ignored: characters to ignore.

    Raises:
        ValueError: the text is not base64.
    """
    plain = text.translate(_STANDARD_ALPHABET, ignored).rstrip(b"=")
    return binascii.a2b_base64(plain + b"=" * (-len(plain) % 4), strict_mode=True)


def to_base64(data: bytes) -> str:
    """Encode bytes in the URL-safe alphabet, without padding."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()
