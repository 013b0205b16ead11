"""Certificates and keys of our own, from files. Nobody is ever asked for a pass phrase."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NoReturn

from relay.errors import RelayError


class EncryptedKey(RelayError):
    """A private key is encrypted; there is no option for its pass phrase."""


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
