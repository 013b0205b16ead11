"""Error messages for people, in the words of OpenSSL, the resolver or the operating system.

The text of an exception depends on the library that raised it, and its class means little to users.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Iterator

from relay.model.text import one_line

MAX_LENGTH = 200
"""Maximum number of characters of an external text."""

_OPENSSL_PLACE = re.compile(r"^\[[^\]]*\] *| *\(_ssl\.c:[0-9]+\)$")
_ERRNO = re.compile(r"\[Errno ([0-9]+)\]")


def describe(error: BaseException) -> str:
    """Return the reason of an error in one line, never empty.

    If the error has no text, that of its cause is used. Libraries may quote their input, so do not
    use this for errors about secrets.
    """
    for cause in _causes(error):
        text = _error_text(cause)
        if text:
            return text
    return f"{type(error).__name__}, without a reason"


def tls_reason(error: BaseException) -> str:
    """Return OpenSSL's message if TLS caused the error, directly or not; otherwise ""."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError):
            return _error_text(cause)
        if isinstance(cause, OSError) and "[SSL" in (cause.strerror or ""):
            return _strip_openssl_place(cause.strerror or "")  # a library's copy of an SSLError
    return ""


def shorten(text: str) -> str:
    """Return an external text shortened to fit in a log line."""
    return one_line(" ".join(text.split()))[:MAX_LENGTH]


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _error_text(error: BaseException) -> str:
    text = str(error)
    match error:
        case ssl.SSLCertVerificationError(verify_message=str(message)) if message:
            text = message
        case ssl.SSLError():
            return _strip_openssl_place(error.strerror or text)
        case socket.gaierror():
            text = error.strerror or text
        case OSError(errno=int(number)) if number > 0:
            text = os.strerror(number)  # libraries replace strerror with their own texts
        case OSError() if numbers := _ERRNO.findall(text):
            # One error for each address of a host name.
            text = ", ".join(dict.fromkeys(os.strerror(int(number)) for number in numbers))
        case TimeoutError():
            text = "no answer in time"
        case ConnectionError() if not text:
            text = "the other side closed the connection"
    return shorten(text)


def _strip_openssl_place(text: str) -> str:
    return shorten(_OPENSSL_PLACE.sub("", text))
