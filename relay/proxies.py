"""Chooses the HTTP proxy of a request: the configured one, or that of the environment variables.

The variables are read like in ld-relay, by the rules of Go's package `httpproxy` in
`golang.org/x/net`. These differ from Python's for nearly everything that `NO_PROXY` may contain.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from urllib.parse import unquote_to_bytes

from msgspec import Struct
from yarl import URL

from relay.errors import ConfigError, ErrorKind, UpstreamUnavailable

Address = IPv4Address | IPv6Address

_MAPPED_BITS = 96
"""Length of the prefix of IPv4-mapped IPv6 addresses."""

_CIDR = re.compile("[0-9a-f.:]+/[0-9]{1,3}")
_HOST_AND_PORT = re.compile(r"(?P<host>[^:\[\]]*|\[(?P<v6>[^\[\]]*)\]):(?P<port>[^:\[\]]*)")
_INVALID_HOST_CHARACTER = re.compile(r"[^a-z0-9._:~%-]")


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy.

    Args:
        url: URL without user and password.
        authorization: value of the header `Proxy-Authorization`; empty for none.
    """

    url: URL
    authorization: str = field(default="", repr=False)


ProxyChoice = Callable[[URL], Proxy | None]
"""Returns the proxy for a request by its URL; None for a direct connection.

Raises `UpstreamUnavailable` if the request must not be sent at all.
"""


def fixed_proxy(text: str) -> ProxyChoice:
    """Return a choice that uses one proxy for all requests.

    Args:
        text: URL of the proxy; user and password are optional and percent-encoded in UTF-8.

    Raises:
        ConfigError: the URL is unusable.
    """
    proxy = _parse_proxy(text, "")
    return lambda _: proxy


def environment_proxies(environ: Mapping[str, str]) -> ProxyChoice:
    """Return a choice that follows `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`.

    A lower-case variable is used if the upper-case one is empty. The first two contain a URL, or
    host and port, for requests of the scheme in their name. `NO_PROXY` is a comma-separated list of
    servers to connect to directly: names (`ld.example` includes subdomains, `.ld.example` and
    `*.ld.example` match only these), addresses, networks (`10.0.0.0/8`), each with an optional
    port, or `*` for everything. Local addresses never use a proxy.

    Raises:
        ConfigError: a proxy is unusable; names each variable.
    """
    no_proxy = _lookup(environ, "NO_PROXY")[1]
    proxies: dict[str, Proxy] = {}
    problems: list[str] = []
    if "*" not in _split(no_proxy):
        for scheme in ("http", "https"):
            name, value = _lookup(environ, f"{scheme.upper()}_PROXY")
            if not value:
                continue
            try:
                proxies[scheme] = _parse_proxy(value if "://" in value else f"http://{value}", name)
            except ConfigError as e:
                problems += e.problems
    if problems:
        raise ConfigError(problems)
    bypass = [_matcher(entry) for entry in _split(no_proxy)]
    return _ProxyRules(proxies, bypass, is_cgi=bool(environ.get("REQUEST_METHOD"))).choose


class _Target(Struct, frozen=True):
    """A server: lower-case ASCII name, the address if the name is one, and the port."""

    name: str
    address: Address | None
    port: str

    @classmethod
    def of(cls, url: URL) -> _Target:
        name = (url.raw_host or "").lower()
        return cls(name, _address(name), str(url.port or ""))

    @property
    def is_local(self) -> bool:
        return self.name == "localhost" or bool(self.address and self.address.is_loopback)


class _ProxyRules(Struct, frozen=True):
    proxies: Mapping[str, Proxy]
    bypass: list[Callable[[_Target], bool]]
    is_cgi: bool

    def choose(self, url: URL) -> Proxy | None:
        proxy = self.proxies.get(url.scheme)
        if proxy is None:
            return None
        if self.is_cgi and url.scheme == "http":
            # In a CGI program HTTP_PROXY is the `Proxy` header of the request: clients control it.
            reason = "HTTP_PROXY cannot be trusted beside REQUEST_METHOD, the sign of a CGI program"
            raise UpstreamUnavailable(ErrorKind.NETWORK_ERROR, reason)
        target = _Target.of(url)
        if target.is_local or any(matches(target) for matches in self.bypass):
            return None
        return proxy


def _lookup(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    """Return the name of the variable that is set, and its value without surrounding blanks."""
    for candidate in (name, name.lower()):
        if value := environ.get(candidate, "").strip():
            return candidate, value
    return name, ""


def _parse_proxy(text: str, variable: str) -> Proxy:
    """Parse the URL of a proxy; `variable` is the source to name in errors, if any."""
    try:
        url = URL(text)
        host, port = url.raw_host or "", url.port  # parsed lazily, so errors appear here
    except ValueError:
        url, host, port = URL(), "", None
    valid = text.isprintable() and " " not in text and not _INVALID_HOST_CHARACTER.search(host)
    if not valid or url.scheme not in ("http", "https") or not host or not port:
        prefix = f"{variable}: " if variable else ""
        form = "http://host:port or https://host:port"
        raise ConfigError([f"{prefix}the proxy's URL must be {form}"])
    return Proxy(url.origin(), basic_authorization(url))


def basic_authorization(url: URL) -> str:
    """Return the `Basic` value for user and password of a URL, in UTF-8; empty without them."""
    if url.raw_user is None and url.raw_password is None:
        return ""
    user, password = unquote_to_bytes(url.raw_user or ""), unquote_to_bytes(url.raw_password or "")
    return f"Basic {b64encode(user + b':' + password).decode()}"


def _split(text: str) -> list[str]:
    return [entry for candidate in text.split(",") if (entry := candidate.strip().lower())]


def _matcher(entry: str) -> Callable[[_Target], bool]:
    """Return the predicate of an entry of `NO_PROXY`; an invalid entry matches nothing."""
    network = _network(entry)
    if network is not None:
        return lambda target: target.address is not None and target.address in network
    parts = _HOST_AND_PORT.fullmatch(entry)
    host = (parts["v6"] or parts["host"]) if parts else entry
    ports = {parts["port"]} if parts and parts["port"] else None
    address = _address(host)
    if address is not None:
        return lambda target: target.address == address and (not ports or target.port in ports)
    subdomains = host.startswith((".", "*."))
    name = _to_ascii(host.removeprefix("*").removeprefix(".") if subdomains else host)
    names = frozenset() if subdomains else frozenset({name})
    return lambda target: (
        bool(name)
        and (target.name in names or target.name.endswith(f".{name}"))
        and (not ports or target.port in ports)
    )


def _network(text: str) -> IPv4Network | IPv6Network | None:
    if not _CIDR.fullmatch(text):
        return None  # Python would accept a netmask, too
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        return None
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped and network.prefixlen >= _MAPPED_BITS:
        return ip_network((mapped, network.prefixlen - _MAPPED_BITS))
    return network


def _address(text: str) -> Address | None:
    """Return `text` as an address, IPv4-mapped ones as IPv4; None if it is not an address."""
    if "%" in text:
        return None
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _to_ascii(name: str) -> str:
    """Return a host name in the form used in URLs; an invalid name is returned unchanged."""
    try:
        return URL.build(scheme="http", host=name).raw_host or ""
    except ValueError:
        return name
