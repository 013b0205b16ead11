"""TLS contexts for outgoing connections, and loading of Relay's own certificates.

Encrypted private keys are refused, so OpenSSL never prompts for a pass phrase.

Verification is the same on every Python version. Python 3.13 enables `VERIFY_X509_STRICT` by
default, which demands the form that RFC 5280 requires of authorities: keyUsage, critical
basicConstraints. Authorities made by inspection proxies or plain `openssl req -x509` lack these,
and ld-relay, like browsers, trusts them; so chain, dates and host name are verified, but not the
form of an authority's certificate. Also like in ld-relay, any trusted certificate may end a chain,
not only a self-signed one (`VERIFY_X509_PARTIAL_CHAIN`, the default since Python 3.13).
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

    Loading the system's authorities takes about 20 ms, so share one context between connections
    that trust the same authorities.

    Args:
        ca_files: PEM files of authorities to trust.
        trust_system: True to trust the system's authorities, too: `SSL_CERT_FILE` and
            `SSL_CERT_DIR`, or OpenSSL's default locations.

    Raises:
        ConfigError: a file is unusable; names each file with the reason.
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
        except OSError as e:  # includes ssl.SSLError
            problems.append(f"CA file {file} cannot be used: {describe(e)}")
    if problems:
        raise ConfigError(problems)
    return context


def load_key_pair(context: ssl.SSLContext, cert: Path | str, key: Path | str | None) -> None:
    """Load a certificate and its private key into a context.

    By default OpenSSL prompts for the pass phrase of an encrypted key if there is a terminal, and
    blocks the start of the relay.

    Args:
        context: TLS context of a server or a client.
        cert: PEM file of the certificate and its chain.
        key: PEM file of the private key; None if it is in the same file.

    Raises:
        EncryptedKey: the key has a pass phrase; the message fits the end of a sentence.
        OSError: a file cannot be read; its subclass `ssl.SSLError`: a file has unusable content.
    """

    def refuse() -> NoReturn:
        file = key or cert
        raise EncryptedKey(
            f"the private key in {file} is encrypted; give one without a pass phrase, which"
            f" `openssl pkey -in {file}` makes"
        )

    context.load_cert_chain(cert, key, password=refuse)
