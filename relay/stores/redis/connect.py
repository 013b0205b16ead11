"""Connections to Redis: addresses, TLS, and what the server says when it refuses."""

from __future__ import annotations

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
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeout

from relay.config.schema import Redis as RedisOptions
from relay.errors import ConfigError
from relay.model.credential import masked_url
from relay.reasons import describe, shorten, tls_reason
from relay.tls import EncryptedKey, client_context, load_key_pair

DEFAULT_PORT = 6379


class _TLSConnection(SSLConnection):
    """A connection over TLS with a context of ours."""

    def __init__(self, tls: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self.ssl_context.context = tls  # instead of one that the library would make


async def _log_in(connection: AbstractConnection) -> None:
    """Send user, password and number of the database, and read what the server says by itself.

    A server that refuses everybody (`-DENIED`, `-ERR max number of clients reached`) says so and
    closes, without being asked. The library would take that for the reply to a command of its own,
    by which it tells its name, and ignore it; that command also needs a right that the user may not
    have (CLIENT SETINFO), so it is not sent.

    Raises:
        RedisError: the server refuses.
    """
    for name in ("driver_info", "lib_name", "lib_version"):
        setattr(connection, name, None)
    await connection.on_connect()
    # Before redis-py 8 it had the longer name.
    has_spoken = getattr(connection, "can_read", None) or connection.can_read_destructive
    if await has_spoken():
        await connection.read_response()


def _pool(options: RedisOptions) -> ConnectionPool:
    """Return where connections come from; none is opened, but all that they need is looked at."""
    where = f"Redis at {_masked(options.url)}"
    given = _connection_options(options)
    if options.url.startswith("rediss:"):
        try:
            given["tls"] = _tls_context(options)
        except ConfigError as e:
            raise ConfigError([f"{where}: {problem}" for problem in e.problems]) from e
    try:
        return ConnectionPool(**given | _address(options.url))
    except ValueError as e:
        raise ConfigError([f"{where}: the URL cannot be used: {e}"]) from e


def _tls_context(options: RedisOptions) -> ssl.SSLContext:
    own = options.ca_file
    context = client_context([own] if own else [], trust_system=not own)
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
    given: dict[str, Any] = {
        "socket_connect_timeout": options.connect_timeout,
        "socket_timeout": None,  # see `_ask`
        "retry": Retry(NoBackoff(), 0),  # the mirror tries again, and tells
        "protocol": 2,  # older servers and proxies know no other
        "redis_connect_func": _log_in,
    }
    if options.username:
        given["username"] = options.username
    if options.password:
        given["password"] = options.password.reveal()
    return given


def _address(url: str) -> dict[str, Any]:
    """Return what a URL says, by the rules of the reference's driver; it stands above options.

    What stands alone before the `@` is a password. Only a Unix socket has a query, as it has no
    other place for `db=N`: those of other drivers can switch off checks of certificates, and more.

    Raises:
        ValueError: part of it means nothing here.
    """
    parts = urlsplit(url)
    query = parse_qs(parts.query, keep_blank_values=True)
    # They are not repeated: it may be a password that looks like a query.
    if parts.fragment or query.keys() - ({"db"} if parts.scheme == "unix" else set()):
        raise ValueError("what follows ? or # is not understood (in a password: %3F, %23)")
    name, password = unquote(parts.username or ""), unquote(parts.password or "")
    if parts.password is None:
        name, password = "", name
    given: dict[str, Any] = {"username": name} if name and password else {}
    if password:
        given["password"] = password
    if parts.scheme == "unix":
        if not parts.path:
            raise ValueError("unix:// needs a path, as in unix:///run/redis.sock")
        database = query.get("db", [""])[0]
        given |= {"connection_class": UnixDomainSocketConnection, "path": unquote(parts.path)}
    else:
        database = parts.path.removeprefix("/")
        tls = parts.scheme == "rediss"
        given |= {
            "connection_class": _TLSConnection if tls else Connection,
            "host": parts.hostname,
            "port": parts.port or DEFAULT_PORT,
            "socket_keepalive": True,
        }
    if not re.fullmatch("[0-9]{0,9}", database):
        raise ValueError("a database is a number, as in redis://host:6379/1")
    return given | {"db": int(database or 0)}


def _masked(url: str) -> str:
    """Return a URL as `/status` shows it: the password is `xxxxx` (status 8.1)."""
    return masked_url(url, "xxxxx").partition("?")[0].partition("#")[0]


def _reason(error: Exception) -> str:
    """Say what happened: in the server's words if it has said anything."""
    tls = tls_reason(error)
    match error:
        case _ if tls:
            reason = f"TLS failed: {tls}"
        case AuthenticationError():
            reason = f"the server refuses user or password: {_reply(error)}"
        case ResponseError():
            reason = f"the server answers: {_reply(error)}"
        case RedisTimeout() | TimeoutError():
            reason = "no answer in time"
        case RedisConnectionError(__context__=OSError() as cause):
            reason = describe(cause)
        case RedisConnectionError():
            reason = _reply(error)  # that it loads its data, or has too many clients, is a reply
        case _:
            reason = describe(error)
    return reason


def _reply(error: RedisError) -> str:
    """Return the text of an error without what a server repeats of a command.

    One that does not know AUTH repeats the password.
    """
    text, _, _ = str(error).partition(", with args beginning")
    code = getattr(error, "status_code", None)  # of redis-py 8, which takes it from the text
    return shorten(f"{code} {text}" if code else text)
