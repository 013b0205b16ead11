"""Makes the contexts of all TLS connections that the relay opens: what is trusted, and how much.

The decision is the same on every interpreter. Python 3.13 began to demand by default what RFC 5280
asks of authorities (`VERIFY_X509_STRICT`): keyUsage, critical basicConstraints. Authorities that
inspection proxies and plain `openssl req -x509` make do not have these, and the reference, like
browsers, trusts them; so chain, dates and host name are verified, and the form of an authority's
certificate is not. As in the reference, too, whatever is trusted may end a chain, not only what
signs itself (`VERIFY_X509_PARTIAL_CHAIN`, likewise the default since Python 3.13).
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from pathlib import Path

from relay.errors import ConfigError
from relay.reasons import describe


def client_context(
    ca_files: Iterable[str | Path] = (), *, trust_system: bool = True
) -> ssl.SSLContext:
    """Return a context that verifies the server's certificate and its host name.

    Reading the system's authorities takes some 20 ms: one context serves all connections that
    trust the same.

    Args:
        ca_files: PEM files of authorities that are trusted.
        trust_system: whether those of the system are trusted, too: `SSL_CERT_FILE` and
            `SSL_CERT_DIR`, or where OpenSSL looks by itself.

    Raises:
        ConfigError: a file cannot be used; names each, and says why.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if trust_system:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    problems = []
    for file in ca_files:
        try:
            context.load_verify_locations(cafile=file)
        except OSError as e:  # also of OpenSSL
            problems.append(f"CA file {file} cannot be used: {describe(e)}")
    if problems:
        raise ConfigError(problems)
    return context
