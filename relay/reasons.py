"""Says what happened, in the words of those who noticed: OpenSSL, the resolver, the system.

An exception's text depends on the library that raised it, and its class says little to people.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Iterator

from relay.model.text import one_line

MAX_LENGTH = 200
"""Characters of a text that is not our own."""

_OPENSSL_PLACE = re.compile(r"^\[[^\]]*\] *| *\(_ssl\.c:[0-9]+\)$")
_ERRNO = re.compile(r"\[Errno ([0-9]+)\]")


def describe(error: BaseException) -> str:
    """Return what happened, in one line that is never empty.

    If the error has no words of its own, those of its cause count. The text of a library may quote
    what it was given: an error about something secret needs words of the caller's.
    """
    for each in _causes(error):
        words = _words(each)
        if words:
            return words
    return f"{type(error).__name__}, without a reason"


def tls_reason(error: BaseException) -> str:
    """Return OpenSSL's words if an error, or something that caused it, is one of TLS; else ""."""
    for each in _causes(error):
        if isinstance(each, ssl.SSLError):
            return _words(each)
        if isinstance(each, OSError) and "[SSL" in (each.strerror or ""):
            return _openssl(each.strerror or "")  # copied by a library into an error of its own
    return ""


def shorten(text: str) -> str:
    """Return a text of somebody else's so that it fits into a line of the log."""
    return one_line(" ".join(text.split()))[:MAX_LENGTH]


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _words(error: BaseException) -> str:
    text = str(error)
    match error:
        case ssl.SSLCertVerificationError(verify_message=str(message)) if message:
            text = message
        case ssl.SSLError():
            return _openssl(error.strerror or text)
        case socket.gaierror():
            text = error.strerror or text
        case OSError(errno=int(number)) if number > 0:
            text = os.strerror(number)  # libraries put texts of their own there
        case OSError() if numbers := _ERRNO.findall(text):
            # Of all addresses that a name has.
            text = ", ".join(dict.fromkeys(os.strerror(int(number)) for number in numbers))
        case TimeoutError():
            text = "no answer in time"
        case ConnectionError() if not text:
            text = "the other side closed the connection"
    return shorten(text)


def _openssl(text: str) -> str:
    return shorten(_OPENSSL_PLACE.sub("", text))
