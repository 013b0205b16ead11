"""Tells which HTTP proxy a request goes through: the configured one, or the environment's.

The environment is read as the reference does, by the rules of Go's package `httpproxy` in
`golang.org/x/net`, which differ from those of Python in nearly all that `NO_PROXY` may hold.
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

from yarl import URL

from relay.errors import ConfigError, ErrorKind, UpstreamUnavailable

Address = IPv4Address | IPv6Address

_MAPPED_BITS = 96
"""Leading bits of an IPv6 address that stands for one of IPv4."""

_CIDR = re.compile("[0-9a-f.:]+/[0-9]{1,3}")
_HOST_AND_PORT = re.compile(r"(?P<host>[^:\[\]]*|\[(?P<v6>[^\[\]]*)\]):(?P<port>[^:\[\]]*)")
_BAD_IN_HOST = re.compile(r"[^a-z0-9._:~%-]")


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy.

    Args:
        url: where it is, without user and password.
        authorization: value of the header `Proxy-Authorization`; empty for none.
    """

    url: URL
    authorization: str = field(default="", repr=False)


ProxyChoice = Callable[[URL], Proxy | None]
"""Tells the proxy for a request by its URL; None for a direct connection.

It raises `UpstreamUnavailable` if there must not be a request at all.
"""


def fixed_proxy(text: str) -> ProxyChoice:
    """Return the choice of one proxy for everything.

    Args:
        text: its URL, perhaps with user and password, percent-encoded in UTF-8.

    Raises:
        ConfigError: it cannot be used.
    """
    proxy = _parse(text, "")
    return lambda _: proxy


def environment_proxies(environ: Mapping[str, str]) -> ProxyChoice:
    """Return the choice that `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` make.

    A variable in lower case counts where the one in upper case is empty. The first two hold URLs,
    or host and port, for requests with the scheme in their name. `NO_PROXY` lists what is asked
    directly, separated by commas: names (`ld.example` with, `.ld.example` or `*.ld.example` without
    the name itself), addresses, networks (`10.0.0.0/8`), with a port perhaps, or `*` for
    everything. This machine is always asked directly.

    Raises:
        ConfigError: a proxy cannot be used; names each variable.
    """
    exceptions = _first(environ, "NO_PROXY")[1]
    proxies: dict[str, Proxy] = {}
    problems: list[str] = []
    if "*" not in _entries(exceptions):
        for scheme in ("http", "https"):
            name, value = _first(environ, f"{scheme.upper()}_PROXY")
            if not value:
                continue
            try:
                proxies[scheme] = _parse(value if "://" in value else f"http://{value}", name)
            except ConfigError as e:
                problems += e.problems
    if problems:
        raise ConfigError(problems)
    direct = [_exception(entry) for entry in _entries(exceptions)]
    return _Rules(proxies, direct, cgi=bool(environ.get("REQUEST_METHOD"))).choose


@dataclass(frozen=True, slots=True)
class _Target:
    """A server: its name in lower case and ASCII, its address if the name is one, its port."""

    name: str
    address: Address | None
    port: str

    @classmethod
    def of(cls, url: URL) -> _Target:
        name = (url.raw_host or "").lower()
        return cls(name, _address(name), str(url.port or ""))

    @property
    def is_this_machine(self) -> bool:
        return self.name == "localhost" or bool(self.address and self.address.is_loopback)


@dataclass(frozen=True, slots=True)
class _Rules:
    proxies: Mapping[str, Proxy]
    direct: list[Callable[[_Target], bool]]
    cgi: bool

    def choose(self, url: URL) -> Proxy | None:
        proxy = self.proxies.get(url.scheme)
        if proxy is None:
            return None
        if self.cgi and url.scheme == "http":
            # The header `Proxy` of a request to a CGI program is such a variable.
            reason = "HTTP_PROXY cannot be trusted beside REQUEST_METHOD, the sign of a CGI program"
            raise UpstreamUnavailable(ErrorKind.NETWORK_ERROR, reason)
        target = _Target.of(url)
        if target.is_this_machine or any(matches(target) for matches in self.direct):
            return None
        return proxy


def _first(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    """Return the variable that counts, and its value without blanks around it."""
    for each in (name, name.lower()):
        if value := environ.get(each, "").strip():
            return each, value
    return name, ""


def _parse(text: str, variable: str) -> Proxy:
    """Read a proxy's URL; `variable` is where it comes from, if that is worth saying."""
    try:
        url = URL(text)
        host, port = url.raw_host or "", url.port  # both are looked at only now
    except ValueError:
        url, host, port = URL(), "", None
    clean = text.isprintable() and " " not in text and not _BAD_IN_HOST.search(host)
    if not clean or url.scheme not in ("http", "https") or not host or not port:
        where = f"{variable}: " if variable else ""
        form = "http://host:port or https://host:port"
        raise ConfigError([f"{where}the proxy's URL must be {form}"])
    return Proxy(url.origin(), basic_authorization(url))


def basic_authorization(url: URL) -> str:
    """Return the header's value for user and password of a URL, in UTF-8; empty if it has none."""
    if url.raw_user is None and url.raw_password is None:
        return ""
    user, password = unquote_to_bytes(url.raw_user or ""), unquote_to_bytes(url.raw_password or "")
    return f"Basic {b64encode(user + b':' + password).decode()}"


def _entries(text: str) -> list[str]:
    return [entry for each in text.split(",") if (entry := each.strip().lower())]


def _exception(entry: str) -> Callable[[_Target], bool]:
    """Return what an entry of `NO_PROXY` matches; one that means nothing matches nothing."""
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
    name = _ascii(host.removeprefix("*").removeprefix(".") if subdomains else host)
    names = frozenset() if subdomains else frozenset({name})
    return lambda target: (
        bool(name)
        and (target.name in names or target.name.endswith(f".{name}"))
        and (not ports or target.port in ports)
    )


def _network(text: str) -> IPv4Network | IPv6Network | None:
    if not _CIDR.fullmatch(text):
        return None  # Python would take a netmask, too
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        return None
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped and network.prefixlen >= _MAPPED_BITS:
        return ip_network((mapped, network.prefixlen - _MAPPED_BITS))
    return network


def _address(text: str) -> Address | None:
    """Return the address that a text is; one of IPv4 in the form of IPv6 is one of IPv4."""
    if "%" in text:
        return None
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _ascii(name: str) -> str:
    """Return a name as it stands in URLs; one that cannot be a name as it is."""
    try:
        return URL.build(scheme="http", host=name).raw_host or ""
    except ValueError:
        return name
