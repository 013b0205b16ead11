"""URLs of Redis servers, one or several in a comma-separated list. Pure."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from relay.model.credential import masked_url

_NEXT_URL = re.compile(",(?=(?:rediss?|unix)://)")


def redis_urls(text: str) -> tuple[str, ...]:
    """Return the URLs of a list; hosts may also follow each other in a single URL.

    `redis://:secret@a:1,b:2/0` stands for `redis://:secret@a:1/0` and `redis://:secret@b:2/0`.
    """
    urls: list[str] = []
    for part in _NEXT_URL.split(text):
        scheme, separator, rest = part.partition("://")
        userinfo, at, server = rest.rpartition("@")
        hosts, slash, path = server.partition("/")
        urls += [
            f"{scheme}{separator}{userinfo}{at}{host}{slash}{path}" for host in hosts.split(",")
        ]
    return tuple(urls)


def masked_redis_urls(text: str, mask: str) -> str:
    """Return the list with all passwords masked."""
    return ",".join(masked_url(url, mask) for url in redis_urls(text))


def host_and_port(text: str, default_port: int) -> tuple[str, int]:
    """Return the parts of an address such as `host`, `host:6379` or `[::1]:6379`.

    Raises:
        ValueError: there is no host, or the port is not a number.
    """
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.netloc != text or parts.username is not None:
        raise ValueError("must be of the form host:port")
    return parts.hostname, parts.port or default_port
