"""Published documents: an environment's data as one file or object, in places without a database.

`location` reads the URLs of places; `file`, `s3` and `http` are the kinds of place. `store` keeps
the document of one environment in a place as a data store, so that a `DatabaseMirror` publishes it
under the rules of all stores. `bootstrap` only reads one, at the start.
"""

from __future__ import annotations

from typing import Protocol


class DocumentChanged(Exception):
    """A document is not the one that was read before, so nothing was written."""


class Place(Protocol):
    """One place for one document, plain or in gzip.

    A *tag* stands for the content of a place: as long as nobody writes there it stays the same.
    Every method raises `StoreUnavailable` when the place cannot be reached or refuses.
    """

    @property
    def url(self) -> str:
        """Address of the document, without secrets."""

    @property
    def in_gzip(self) -> bool:
        """True if the document is written in gzip."""

    async def read(self) -> tuple[bytes, str] | None:
        """Return the content and its tag; None if there is nothing."""

    async def is_unchanged(self, tag: str | None) -> bool:
        """Return whether the content still has this tag; None stands for a place without content.

        It is a cheap question where the place allows one.
        """

    async def write(self, content: bytes, tag: str | None) -> str:
        """Replace the content as a whole; return the new tag.

        Args:
            content: the new content.
            tag: tag of the content to replace; None if there was none.

        Raises:
            DocumentChanged: the present content has another tag.
        """

    async def aclose(self) -> None:
        """Close all connections."""
