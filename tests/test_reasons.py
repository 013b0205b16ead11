"""Failures in the words of those who noticed them."""

from __future__ import annotations

import errno
import socket
import ssl

import pytest

from relay.reasons import describe, tls_reason


def caused(error, cause):
    error.__cause__ = cause
    return error


def verification(message):
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: x (_ssl.c:1006)")  # fmt: skip
    error.verify_message = message
    return error


REFUSED = f"[Errno {errno.ECONNREFUSED}]"
ALERT = ssl.SSLError(1, "[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca (_ssl.c:1006)")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"), "Connection refused"),
        (OSError(f"Multiple exceptions: {REFUSED} Connect call failed ('::1', 1, 0, 0), {REFUSED} Connect call failed ('127.0.0.1', 1)"), "Connection refused"),
        (OSError(f"Multiple exceptions: [Errno {errno.ENETUNREACH}] a, {REFUSED} b"), "Network is unreachable, Connection refused"),
        (PermissionError(errno.EACCES, "Permission denied", "/secret/path"), "Permission denied"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (ConnectionResetError(), "the other side closed the connection"),
        (ConnectionResetError("Connection lost"), "Connection lost"),
        (TimeoutError(), "no answer in time"),
        (verification("unable to get local issuer certificate"), "unable to get local issuer certificate"),
        (ALERT, "tlsv1 alert unknown ca"),
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol (_ssl.c:1006)"), "EOF occurred in violation of protocol"),
        (ValueError("two\r\nlines and a \x1b[31m colour"), "two lines and a \\x1b[31m colour"),
        (ValueError("x" * 500), "x" * 200),
        (caused(RuntimeError(), OSError(errno.ENOSPC, "")), "No space left on device"),
        (caused(RuntimeError(), KeyError()), "RuntimeError, without a reason"),
    ],
)  # fmt: skip
def test_an_error_is_described(error, words):
    """By the number of the system, by OpenSSL's text without its place, by its cause."""
    assert describe(error) == words


def test_a_circle_of_causes_ends():
    """Exceptions may be each other's context."""
    one, other = RuntimeError(), RuntimeError()
    one.__cause__, other.__cause__ = other, one
    assert describe(one) == "RuntimeError, without a reason"


def test_what_tls_said_is_found():
    """In the error, below it, or copied by a library; other errors have nothing of the kind."""
    assert tls_reason(ALERT) == "tlsv1 alert unknown ca"
    assert tls_reason(caused(ConnectionError("closed"), ALERT)) == "tlsv1 alert unknown ca"
    assert tls_reason(OSError(*ALERT.args)) == "tlsv1 alert unknown ca"
    assert tls_reason(OSError(errno.ECONNREFUSED, "refused")) == ""
