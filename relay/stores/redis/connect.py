"""Connections to Redis: addresses, TLS, authentication and error messages."""

from __future__ import annotations

import os
import re
import ssl
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeout

from relay import clock
from relay.config.schema import Redis as RedisOptions
from relay.errors import ConfigError
from relay.model.credential import masked_url
from relay.reasons import describe, shorten, tls_reason
from relay.stores.redis.identity import REAUTHENTICATION, Identity, make_identity
from relay.tls import EncryptedKey, client_context, load_key_pair

DEFAULT_PORT = 6379


class _TLSConnection(SSLConnection):
    """A TLS connection with Relay's own context."""

    def __init__(self, tls: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self.ssl_context.context = tls  # instead of the library's
        self._authenticate_at = 0.0
        """Monotonic time from which on a token is too old for the server."""

    async def connect(self) -> None:
        """Connect, or show a new token on a connection that the server would close for its age.

        The pool calls this before it lends a connection.
        """
        now = clock.monotonic()
        if self.is_connected and now < self._authenticate_at:
            return
        if self.is_connected and isinstance(self.credential_provider, Identity):
            await self._authenticate_again(self.credential_provider)
        # It returns at once if there is a connection.
        await super().connect()  # type: ignore[no-untyped-call]
        self._authenticate_at = now + REAUTHENTICATION

    async def _authenticate_again(self, identity: Identity) -> None:
        """Authenticate; close the connection if that fails."""
        try:
            credentials = await identity.get_credentials_async()
            await self.send_command("AUTH", *credentials, check_health=False)
            await self.read_response()
        except RedisError:
            await self.disconnect()
        except BaseException:
            await self.disconnect(nowait=True)
            raise


async def _authenticate(connection: AbstractConnection) -> None:
    """Send user, password and database number, and read an error that the server sends unasked.

    A server that refuses every client (`-DENIED`, `-ERR max number of clients reached`) sends an
    error and closes the connection. The library would take that for the reply to its own
    CLIENT SETINFO and ignore it. This command also needs a permission that the user may not have,
    so it is not sent.

    Raises:
        RedisError: the server refuses the client.
    """
    for name in ("driver_info", "lib_name", "lib_version"):
        setattr(connection, name, None)
    try:
        await connection.on_connect()
    except AuthenticationError:
        if isinstance(connection.credential_provider, Identity):
            connection.credential_provider.note_refusal()
        raise
    # The method had the longer name before redis-py 8.
    has_data = getattr(connection, "can_read", None) or connection.can_read_destructive
    if await has_data():
        await connection.read_response()


def connection_pool(
    options: RedisOptions, credentials: CredentialProvider | None = None
) -> ConnectionPool:
    """Return a connection pool. Check all options and files, but open no connection.

    Args:
        options: connection options with a complete URL.
        credentials: gives user and password of each new connection, instead of the options.

    Raises:
        ConfigError: the URL or a TLS file is unusable, or a library of a cloud is missing.
    """
    credentials = credentials or make_identity(options, os.environ)
    label = f"Redis at {masked_address(options.url)}"
    kwargs = _connection_options(options)
    if options.url.startswith("rediss:"):
        try:
            kwargs["tls"] = _tls_context(options)
        except ConfigError as e:
            raise ConfigError([f"{label}: {problem}" for problem in e.problems]) from e
    try:
        kwargs |= _url_options(options.url)
        if credentials:
            kwargs |= {"username": None, "password": None, "credential_provider": credentials}
        return ConnectionPool(**kwargs)
    except ValueError as e:
        raise ConfigError([f"{label}: the URL cannot be used: {e}"]) from e


def _tls_context(options: RedisOptions) -> ssl.SSLContext:
    ca_file = options.ca_file
    context = client_context([ca_file] if ca_file else [], trust_system=not ca_file)
    if options.client_certificate_file:
        key = options.client_key_file or None
        try:
            load_key_pair(context, options.client_certificate_file, key)
        except EncryptedKey as e:
            raise ConfigError([f"[Redis] clientKeyFile: {e}"]) from e
        except OSError as e:  # also of OpenSSL
            files = f"client certificate {options.client_certificate_file}"
            files += f" with key {key}" if key else ""
            raise ConfigError([f"{files} cannot be used: {describe(e)}"]) from e
    return context


def _connection_options(options: RedisOptions) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "socket_connect_timeout": options.connect_timeout,
        "socket_timeout": None,  # see `RedisStore._execute_all`
        "retry": Retry(NoBackoff(), 0),  # the mirror retries and logs
        "protocol": 2,  # older servers and proxies know no other
        "redis_connect_func": _authenticate,
    }
    if options.username:
        kwargs["username"] = options.username
    if options.password:
        kwargs["password"] = options.password.reveal()
    return kwargs


def _url_options(url: str) -> dict[str, Any]:
    """Return the connection options of a URL, by the rules of ld-relay's driver.

    They override the other options. A single word before the `@` is a password. Only Unix sockets
    accept a query, because they have no other place for `db=N`; in other drivers a query can
    disable the verification of certificates, and more.

    Raises:
        ValueError: a part of the URL is not supported.
    """
    parts = urlsplit(url)
    query = parse_qs(parts.query, keep_blank_values=True)
    # Do not quote them: the "query" may be part of a password.
    if parts.fragment or query.keys() - ({"db"} if parts.scheme == "unix" else set()):
        raise ValueError("what follows ? or # is not understood (in a password: %3F, %23)")
    name, password = unquote(parts.username or ""), unquote(parts.password or "")
    if parts.password is None:
        name, password = "", name
    kwargs: dict[str, Any] = {"username": name} if name and password else {}
    if password:
        kwargs["password"] = password
    if parts.scheme == "unix":
        if not parts.path:
            raise ValueError("unix:// needs a path, as in unix:///run/redis.sock")
        database = query.get("db", [""])[0]
        kwargs |= {"connection_class": UnixDomainSocketConnection, "path": unquote(parts.path)}
    else:
        database = parts.path.removeprefix("/")
        tls = parts.scheme == "rediss"
        kwargs |= {
            "connection_class": _TLSConnection if tls else Connection,
            "host": parts.hostname,
            "port": parts.port or DEFAULT_PORT,
            "socket_keepalive": True,
        }
    if not re.fullmatch("[0-9]{0,9}", database):
        raise ValueError("a database is a number, as in redis://host:6379/1")
    return kwargs | {"db": int(database or 0)}


def masked_address(url: str) -> str:
    """Return a URL as shown in `/status`: the password is `xxxxx` (status 8.1)."""
    return masked_url(url, "xxxxx").partition("?")[0].partition("#")[0]


def reason_of(error: Exception) -> str:
    """Return the reason of an error, in the server's words if it has sent any."""
    tls = tls_reason(error)
    match error:
        case _ if tls:
            reason = f"TLS failed: {tls}"
        case AuthenticationError():
            reason = f"the server refuses user or password: {_error_text(error)}"
        case ResponseError():
            reason = f"the server answers: {_error_text(error)}"
        case RedisTimeout() | TimeoutError():
            reason = "no answer in time"
        case RedisConnectionError(__context__=OSError() as cause):
            reason = describe(cause)
        case RedisConnectionError():
            reason = _error_text(error)  # "loading" and "too many clients" are of this class, too
        case _:
            reason = describe(error)
    return reason


def _error_text(error: RedisError) -> str:
    """Return the text of an error without the arguments of the command.

    A server that does not know AUTH repeats the password in its error.
    """
    text, _, _ = str(error).partition(", with args beginning")
    code = getattr(error, "status_code", None)  # redis-py 8 removes it from the text
    return shorten(f"{code} {text}" if code else text)
