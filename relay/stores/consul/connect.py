"""Connections to Consul: address, TLS, access token, and the variables of Consul's own client."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct
from yarl import URL

from relay.config.references import read_value
from relay.config.schema import Consul as ConsulOptions
from relay.config.types import BOOLEAN, consul_url
from relay.errors import ConfigError
from relay.files import FileState, file_state
from relay.reasons import describe
from relay.stores.consul.layout import Scope
from relay.tls import EncryptedKey, client_context, load_key_pair


class Token:
    """Access token, which may change while the relay runs.

    Args:
        value: the token; empty for none.
        file: file that holds it; empty for none.
        name: name of the option or variable that names the file.

    Raises:
        ConfigError: the file holds no token.
    """

    def __init__(self, value: str = "", file: str = "", name: str = "") -> None:
        self._value = value
        self._file = file
        self._state: FileState | None = None
        if file:
            try:
                self._read()
            except ValueError as e:
                raise ConfigError([f"{name}: {file}: {e}"]) from e

    def __repr__(self) -> str:
        return f"<Token in {self._file}>" if self._file else "<Token>"

    @property
    def place(self) -> str:
        """The token for messages."""
        if self._file:
            return f"the token in {self._file}"
        return "the token" if self._value else "a request without a token"

    async def current(self) -> str:
        """Return the token; that of a file is read again if the file has changed."""
        if self._file:
            await asyncio.to_thread(self._read_again)
        return self._value

    def _read_again(self) -> None:
        state = file_state(Path(self._file))
        if state is None or state == self._state:
            return
        try:
            self._read()
        except ValueError:
            self._state = None  # it is being written, perhaps

    def _read(self) -> None:
        state = file_state(Path(self._file))
        self._value, self._state = read_value(self._file), state


class Connection(Struct, frozen=True):
    """Address, TLS and token of a server; all stores in it share one.

    Args:
        address: address as it was configured, without secrets.
        url: base URL of its HTTP API.
        socket: path of the Unix socket that it listens on; empty for none.
        tls: TLS context; None for plain HTTP.
        server_name: name that the server's certificate must have; None for that of the URL.
        token: access token.
        scope: part of the key space, in Consul Enterprise.
    """

    address: str
    url: URL
    socket: str
    tls: ssl.SSLContext | None
    server_name: str | None
    token: Token
    scope: Scope


def connect(options: ConsulOptions, environ: Mapping[str, str]) -> Connection:
    """Return how a server is reached. Check all options and files, but open no connection.

    Args:
        options: options with a host.
        environ: environment variables; those of Consul's own client apply as in ld-relay
            (datastore 4.5).

    Raises:
        ConfigError: a variable or a file is unusable.
    """
    url = consul_url(options.host)
    socket = url.removeprefix("unix://") if url.startswith("unix:") else ""
    wants_tls = _flag(environ, "CONSUL_HTTP_SSL", default=False)
    if socket:
        url = "http://localhost"
    elif wants_tls:
        url = "https" + url.removeprefix("https").removeprefix("http")
    return Connection(
        address=options.host,
        url=URL(url.rstrip("/")),
        socket=socket,
        tls=_tls_context(environ) if url.startswith("https:") else None,
        server_name=environ.get("CONSUL_TLS_SERVER_NAME") or None,
        token=_token(options, environ),
        scope=Scope(environ.get("CONSUL_NAMESPACE", ""), environ.get("CONSUL_PARTITION", "")),
    )


def _token(options: ConsulOptions, environ: Mapping[str, str]) -> Token:
    if options.token:
        return Token(options.token.reveal())
    if options.token_file:
        return Token(file=options.token_file, name="[Consul] tokenFile")
    if file := environ.get("CONSUL_HTTP_TOKEN_FILE"):
        return Token(file=file, name="CONSUL_HTTP_TOKEN_FILE")
    return Token(environ.get("CONSUL_HTTP_TOKEN", ""))


def _flag(environ: Mapping[str, str], name: str, *, default: bool) -> bool:
    text = environ.get(name)
    try:
        return bool(BOOLEAN.parse(text)) if text else default
    except ValueError as e:
        raise ConfigError([f"{name}: {e}"]) from e


def _tls_context(environ: Mapping[str, str]) -> ssl.SSLContext:
    files = _authorities(environ)
    context = client_context(files, trust_system=not files)
    if not _flag(environ, "CONSUL_HTTP_SSL_VERIFY", default=True):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    certificate, key = (environ.get(f"CONSUL_CLIENT_{name}") for name in ("CERT", "KEY"))
    if bool(certificate) != bool(key):
        text = "CONSUL_CLIENT_CERT and CONSUL_CLIENT_KEY: a certificate needs a key, and a key a"
        raise ConfigError([f"{text} certificate"])
    if certificate:
        try:
            load_key_pair(context, certificate, key)
        except EncryptedKey as e:
            raise ConfigError([f"CONSUL_CLIENT_KEY: {e}"]) from e
        except OSError as e:  # also of OpenSSL
            text = f"CONSUL_CLIENT_CERT {certificate} with CONSUL_CLIENT_KEY {key} cannot be used"
            raise ConfigError([f"{text}: {describe(e)}"]) from e
    return context


def _authorities(environ: Mapping[str, str]) -> list[Path]:
    """Return the files of authorities to trust instead of the system's; empty for these."""
    if file := environ.get("CONSUL_CACERT"):
        return [Path(file)]
    directory = environ.get("CONSUL_CAPATH")
    if not directory:
        return []
    try:
        files = sorted(each for each in Path(directory).iterdir() if each.is_file())
    except OSError as e:
        raise ConfigError([f"CONSUL_CAPATH: {directory}: {describe(e)}"]) from e
    if not files:
        raise ConfigError([f"CONSUL_CAPATH: {directory} has no files"])
    return files
