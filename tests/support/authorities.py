"""Authorities as people have them: made by old tools, by inspection proxies, or by the book."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_KEY_USAGE = x509.KeyUsage(
    digital_signature=False, content_commitment=False, key_encipherment=False,
    data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
    encipher_only=False, decipher_only=False,
)  # fmt: skip


class Authority:
    """An authority with the extensions that it is given.

    Args:
        folder: where its files lie.
        key_usage: whether its certificate says what its key is for.
        critical: whether it says in the demanded form that it is an authority.
        key_ids: whether its certificates name keys by identifiers.
    """

    def __init__(
        self, folder: Path, *, key_usage: bool = True, critical: bool = True, key_ids: bool = True
    ) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("an authority")
        self._key_ids = key_ids
        builder = _builder(self._name, self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=critical
        )
        if key_usage:
            builder = builder.add_extension(_KEY_USAGE, critical=True)
        if key_ids:
            identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
            builder = builder.add_extension(identifier, critical=False)
        self.file = folder / f"authority-{id(self)}.pem"
        self.file.write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))

    def issue(self, *hosts: str, days: int = 1) -> tuple[Path, Path]:
        """Return the files of a certificate for `hosts`, and of its private key."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(hosts[0]), self._name, key, days).add_extension(
            x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False
        )
        if self._key_ids:
            identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
            builder = builder.add_extension(identifier, critical=False)
        stem = self.file.with_suffix("")
        certificate, private = Path(f"{stem}-{hosts[0]}.pem"), Path(f"{stem}-{hosts[0]}.key")
        certificate.write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certificate, private

    def server(self, *hosts: str, days: int = 1) -> ssl.SSLContext:
        """Return the context of a server with a certificate for `hosts`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(*hosts, days=days))
        return context


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int = 1
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now + timedelta(days=days))
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


UNTIDY = {
    "no keyUsage": {"key_usage": False},
    "basicConstraints not critical": {"critical": False},
    "neither, and no key identifiers": {"key_usage": False, "critical": False, "key_ids": False},
}
"""Authorities that RFC 5280 does not allow, and that everybody else trusts."""
