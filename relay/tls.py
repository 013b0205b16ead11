"""TLS: the contexts of all connections that the relay opens, and certificates of its own.

Nobody is ever asked for a pass phrase.

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
from typing import NoReturn

from relay.errors import ConfigError, RelayError
from relay.reasons import describe


class EncryptedKey(RelayError):
    """A private key is encrypted; there is no option for its pass phrase."""


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


def load_key_pair(context: ssl.SSLContext, cert: Path | str, key: Path | str | None) -> None:
    """Let a context present a certificate.

    Left to itself, OpenSSL asks at the terminal for the pass phrase of a key, and waits: also in a
    container with one, and in the middle of a start.

    Args:
        context: of a server or a client.
        cert: PEM file of the certificate and its chain.
        key: PEM file of the private key; None if it is in the same file.

    Raises:
        EncryptedKey: the key has a pass phrase; the message is the end of a sentence.
        OSError: a file cannot be read; ssl.SSLError, which is one, means that it holds nothing
            usable.
    """

    def refuse() -> NoReturn:
        file = key or cert
        raise EncryptedKey(
            f"the private key in {file} is encrypted; give one without a pass phrase, which"
            f" `openssl pkey -in {file}` makes"
        )

    context.load_cert_chain(cert, key, password=refuse)
