"""Access to Redis as configured: one server, a cluster, or what Sentinels name; TLS and users."""

from __future__ import annotations

import os
import re
import ssl
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError

from relay import clock
from relay.config.schema import Redis as RedisOptions
from relay.errors import ConfigError
from relay.protocol.redisurl import host_and_port, masked_redis_urls, redis_urls
from relay.reasons import describe
from relay.stores.redis.client import RedisClient
from relay.stores.redis.cluster import Cluster
from relay.stores.redis.connections import MAX_CONNECTIONS, Address, Connections
from relay.stores.redis.identity import REAUTHENTICATION, Identity, make_identity
from relay.stores.redis.placement import OneServer, Placement
from relay.stores.redis.sentinels import Sentinels, require_master
from relay.tls import EncryptedKey, client_context, load_key_pair

DEFAULT_PORT = 6379

SENTINEL_PORT = 26379


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


async def _authenticate_to_master(connection: AbstractConnection) -> None:
    """Do as `_authenticate`, and make sure that the server is a master, not a former one.

    Raises:
        RedisError: the server refuses the client, or is a replica.
    """
    await _authenticate(connection)
    await require_master(connection)


def connect(options: RedisOptions, limit: int = MAX_CONNECTIONS) -> RedisClient:
    """Return access to the configured servers. Check all options and files, but connect nothing.

    Args:
        options: connection options; without Sentinels their URL is complete.
        limit: number of connections to one server.

    Raises:
        ConfigError: a URL or a TLS file is unusable, or a library of a cloud is missing.
    """
    label, identity = shown_address(options), make_identity(options, os.environ)
    try:
        placement, connections = _access(options, identity, limit)
    except ConfigError as e:
        raise ConfigError([f"Redis at {label}: {problem}" for problem in e.problems]) from e
    except ValueError as e:
        raise ConfigError([f"Redis at {label}: the URL cannot be used: {e}"]) from e
    return RedisClient(placement, connections, label)


def shown_address(options: RedisOptions) -> str:
    """Return the servers as shown in `/status`: a password is `xxxxx` (status 8.1)."""
    if options.sentinels:
        return f"redis-sentinel://{','.join(options.sentinels)}/{options.sentinel_master}"
    urls = masked_redis_urls(options.url, "xxxxx").split(",")
    return ",".join(url.partition("?")[0].partition("#")[0] for url in urls)


def _access(
    options: RedisOptions, identity: Identity | None, limit: int
) -> tuple[Placement, Connections]:
    """Return where keys are, and connections there.

    Raises:
        ConfigError: a TLS file is unusable.
        ValueError: a URL is unusable.
    """
    timeouts = options.connect_timeout, options.read_timeout
    uses_tls = options.tls or options.sentinel_tls or options.url.startswith("rediss:")
    tls = _tls_context(options) if uses_tls else None
    user = {"username": options.username, "password": options.password.reveal()}
    arguments = _arguments(options, user)
    if options.sentinels:
        arguments |= _over_network(tls if options.tls else None) | {"db": options.database}
        connections = Connections(
            _with(identity, arguments) | {"redis_connect_func": _authenticate_to_master},
            *timeouts,
            limit,
        )
        password = options.sentinel_password.reveal()
        user = {"username": options.sentinel_username, "password": password}
        of_sentinels = _over_network(tls if options.sentinel_tls else None)
        asked = Connections(_arguments(options, user) | of_sentinels, *timeouts)
        addresses = [host_and_port(each, SENTINEL_PORT) for each in options.sentinels]
        return Sentinels(addresses, options.sentinel_master, asked), connections
    urls = [urlsplit(url) for url in redis_urls(options.url)]
    arguments |= {"db": options.database} | _url_arguments(urls[0], tls)
    connections = Connections(_with(identity, arguments), *timeouts, limit)
    addresses = [_address(url) for url in urls]
    if options.cluster:
        return Cluster(addresses, connections), connections
    return OneServer(addresses[0]), connections


def _arguments(options: RedisOptions, user: dict[str, str]) -> dict[str, Any]:
    """Return arguments of the library for every connection."""
    return {
        "socket_connect_timeout": options.connect_timeout,
        "socket_timeout": None,  # see `RedisConnection`
        "retry": Retry(NoBackoff(), 0),  # the mirror retries and logs
        "protocol": 2,  # older servers and proxies know no other
        "redis_connect_func": _authenticate,
        **{name: value for name, value in user.items() if value},
    }


def _with(identity: Identity | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments in which an identity, if any, replaces user and password."""
    if identity is None:
        return arguments
    return arguments | {"username": None, "password": None, "credential_provider": identity}


def _over_network(tls: ssl.SSLContext | None) -> dict[str, Any]:
    """Return the arguments for TCP."""
    if tls is None:
        return {"connection_class": Connection, "socket_keepalive": True}
    return {"connection_class": _TLSConnection, "socket_keepalive": True, "tls": tls}


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


def _url_arguments(url: SplitResult, tls: ssl.SSLContext | None) -> dict[str, Any]:
    """Return the arguments that a URL gives, by the rules of ld-relay's driver.

    They override the other options. A single word before the `@` is a password. Only Unix sockets
    accept a query, because they have no other place for `db=N`; in other drivers a query can
    disable the verification of certificates, and more.

    Raises:
        ValueError: a part of the URL is not supported.
    """
    query = parse_qs(url.query, keep_blank_values=True)
    is_local = url.scheme == "unix"
    # Do not quote them: the "query" may be part of a password.
    if url.fragment or query.keys() - ({"db"} if is_local else set()):
        raise ValueError("what follows ? or # is not understood (in a password: %3F, %23)")
    name, password = unquote(url.username or ""), unquote(url.password or "")
    if url.password is None:
        name, password = "", name
    arguments: dict[str, Any] = {"username": name} if name and password else {}
    if password:
        arguments["password"] = password
    if is_local:
        if not url.path:
            raise ValueError("unix:// needs a path, as in unix:///run/redis.sock")
        database = query.get("db", [""])[0]
        arguments["connection_class"] = UnixDomainSocketConnection
    else:
        database = url.path.removeprefix("/")
        arguments |= _over_network(tls if url.scheme == "rediss" else None)
    if not re.fullmatch("[0-9]{0,9}", database):
        raise ValueError("a database is a number, as in redis://host:6379/1")
    return arguments | ({"db": int(database)} if database else {})


def _address(url: SplitResult) -> Address:
    if url.scheme == "unix":
        return unquote(url.path), 0
    return url.hostname or "", url.port or DEFAULT_PORT
