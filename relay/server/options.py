"""Options of the servers, from the configuration."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

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
"""Of TLS 1.2, those of Go, and so of the reference."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """With what TLS is served.

    Args:
        cert: file of the certificate and its chain.
        key: file of the private key.
        minimum: version of the protocol, a key of `TLS_VERSIONS`.
    """

    cert: Path
    key: Path
    minimum: str = "1.2"

    def check(self) -> None:
        """See that the files can be used.

        Raises:
            ConfigError: they cannot; says which, and why.
        """
        self.context()

    def context(self) -> ssl.SSLContext:
        """Return what serves TLS.

        Raises:
            ConfigError: the files cannot be used; says which, and why.
        """
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            load_key_pair(made, self.cert, self.key)
        except EncryptedKey as e:
            raise ConfigError([f"[Main] tlsKey: {e}"]) from e
        except (OSError, ssl.SSLError) as e:
            files = f"TLS certificate {self.cert} with key {self.key}"
            raise ConfigError([f"{files} cannot be used: {e.strerror or e}"]) from e
        made.set_ciphers(CIPHERS)
        made.minimum_version = TLS_VERSIONS[self.minimum]
        return made


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the relay is served. Times in seconds.

    Args:
        port: to listen on; 0 for any free one.
        tls: None for plain HTTP.
        drain: the longest time that ending streams and responses may take. The default leaves
            room within the 10 s that `docker stop` allows.
        limits: what a connection may cost.
        exporter_port: for figures alone, without TLS; None for no such port.
    """

    port: int = 8030
    tls: Certificate | None = None
    drain: float = 8.0
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    exporter_port: int | None = None

    @classmethod
    def of(cls, config: Config) -> ServerOptions:
        """Return what a configuration says."""
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
