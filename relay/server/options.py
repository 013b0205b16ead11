"""Options of the HTTP servers, derived from the configuration."""

from __future__ import annotations

import ssl
from pathlib import Path

from msgspec import Struct, field

from relay.config.schema import Config
from relay.errors import ConfigError
from relay.tls import EncryptedKey, load_key_pair
from relay.web.fastpath.shared import ConnectionLimits

TLS_VERSIONS = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}


CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AES"
"""Cipher suites of TLS 1.2: those of Go, and therefore of ld-relay."""


class Certificate:
    """TLS certificate, and the minimum protocol version.

    Args:
        cert: file with the certificate and its chain.
        key: file with the private key.
        minimum: minimum protocol version, a key of `TLS_VERSIONS`.
    """

    def __init__(self, cert: Path, key: Path, minimum: str = "1.2") -> None:
        self.minimum = minimum
        self._cert = cert
        self._key = key
        self._context: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return f"<Certificate {self._cert}, TLS {self.minimum}>"

    def check(self) -> None:
        """Check that the files are usable.

        Raises:
            ConfigError: they are not; the message names the file and the reason.
        """
        self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def context(self) -> ssl.SSLContext:
        """Return the TLS context of the server, whose certificate `renew` replaces.

        Raises:
            ConfigError: the files are unusable; the message names the file and the reason.
        """
        if self._context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._load(context)
            context.set_ciphers(CIPHERS)
            context.minimum_version = TLS_VERSIONS[self.minimum]
            self._context = context
        return self._context

    def renew(self) -> None:
        """Read the files again, for the connections to come; call `check` before.

        Raises:
            ConfigError: the files have become unusable since.
        """
        self._load(self.context())

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            load_key_pair(context, self._cert, self._key)
        except EncryptedKey as e:
            raise ConfigError([f"[Main] tlsKey: {e}"]) from e
        except (OSError, ssl.SSLError) as e:
            files = f"TLS certificate {self._cert} with key {self._key}"
            raise ConfigError([f"{files} cannot be used: {e.strerror or e}"]) from e


class ServerOptions(Struct, frozen=True):
    """Options of the relay's HTTP servers. Times are seconds.

    Args:
        port: port to listen on; 0 for any free port.
        tls: certificate; None for plain HTTP.
        drain: time limit for ending streams and responses at shutdown. The default leaves a margin
            within the 10 s that `docker stop` allows.
        limits: limits of each connection.
        exporter_port: port for metrics only, without TLS; None for no such port.
    """

    port: int = 8030
    tls: Certificate | None = None
    drain: float = 8.0
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    exporter_port: int | None = None

    @classmethod
    def of(cls, config: Config) -> ServerOptions:
        """Return the options that a configuration sets."""
        main, prometheus = config.main, config.prometheus
        certificate = Certificate(Path(main.tls_cert), Path(main.tls_key), main.tls_min_version)
        limits = ConnectionLimits(
            max_head_size=main.max_request_head_size, stall_timeout=main.client_stall_timeout
        )
        return cls(
            port=main.port,
            tls=certificate if main.tls_enabled else None,
            drain=main.graceful_shutdown_timeout,
            limits=limits,
            exporter_port=prometheus.port if prometheus.enabled else None,
        )
