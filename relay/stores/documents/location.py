"""URLs of places for documents; pure.

`{key}` stands for the name of a document. Where it is missing, a document lies below the URL, as in
a folder; an `https` URL without it is the address of one document.
"""

from __future__ import annotations

from typing import Self
from urllib.parse import quote, unquote, urlsplit

from msgspec import Struct

from relay.model.credential import masked_url

KEY = "{key}"

MASK = "********"

GZIP = ".gz"
"""End of the path of a document in gzip."""


class Location(Struct, frozen=True):
    """Address of one document.

    Args:
        scheme: `file`, `s3`, `http` or `https`.
        url: the URL, with everything that is secret.
        in_gzip: True if the document is in gzip.
    """

    scheme: str
    url: str
    in_gzip: bool = False

    @property
    def masked(self) -> str:
        """The URL without secrets: password and values of the query."""
        return masked(self.url)

    @property
    def has_user(self) -> bool:
        """True if the URL has a user or password of its own."""
        return "@" in urlsplit(self.url).netloc

    @property
    def path(self) -> str:
        """Path of a file, or key of an object without its bucket, decoded."""
        path = unquote(urlsplit(self.url).path)
        return path if self.scheme == "file" else path.removeprefix("/")

    @property
    def bucket(self) -> str:
        """Bucket of an object."""
        return urlsplit(self.url).netloc

    @classmethod
    def all_of(cls, url: str, name: str) -> tuple[Self, ...]:
        """Return where the document of a name is published; the plain form last.

        In key-value stores there is one form only. A URL that ends with `.gz` asks for gzip only.

        Args:
            url: URL as configured.
            name: name of the document.
        """
        plain = cls.of(url, name)
        if plain.in_gzip or plain.scheme not in ("file", "s3"):
            return (plain,)
        return (cls(plain.scheme, plain.url + GZIP, in_gzip=True), plain)

    @classmethod
    def of(cls, url: str, name: str) -> Self:
        """Return the address of the document of a name."""
        scheme = _scheme(url)
        if scheme in ("file", "s3"):
            name = quote(name)  # `path` decodes it
            if KEY not in url:
                url = f"{url.rstrip('/')}/{KEY}"
        url = url.replace(KEY, name)
        return cls(scheme, url, in_gzip=urlsplit(url).path.endswith(GZIP))


def masked(url: str) -> str:
    """Return a URL without secrets."""
    return masked_url(url, MASK)


def _scheme(url: str) -> str:
    return urlsplit(url).scheme.lower()
