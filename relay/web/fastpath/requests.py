"""Request heads that the fast path may answer, parsed."""

from __future__ import annotations

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

_UNUSUAL_HEADERS = frozenset((b"expect", b"upgrade"))
_BODY_HEADERS = frozenset((b"content-length", b"transfer-encoding"))


class RequestHead:
    """Complete request head.

    Args:
        raw: its bytes, with the blank line.
    """

    __slots__ = ("_is_usual", "_parser", "closes", "headers", "method", "raw", "url")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.method = b""
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        """Values by name in lower case."""
        self.closes = False
        """True if the client wants the connection closed after the response."""
        self._is_usual = False
        self._parser: HttpRequestParser | None = None

    @classmethod
    def parse(cls, raw: bytes) -> RequestHead | None:
        """Parse a head; None if it is invalid, or unusual in a way that only uvicorn handles."""
        head = cls(raw)
        head._parser = HttpRequestParser(head)
        try:
            head._parser.feed_data(raw)
        except (HttpParserError, HttpParserUpgrade):
            return None
        finally:
            head._parser = None
        return head if head._is_usual else None

    @property
    def has_body(self) -> bool:
        """True if the head announces a body."""
        return not _BODY_HEADERS.isdisjoint(self.headers)

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        name = name.lower()
        self._is_usual = self._is_usual and name not in self.headers
        self.headers[name] = value

    def on_message_begin(self) -> None:
        """Begin a head without repeated headers."""
        self._is_usual = True

    def on_headers_complete(self) -> None:
        """Judge the complete head."""
        parser = self._parser
        if parser is None or parser.get_http_version() != "1.1":
            self._is_usual = False
            return
        self.method, self.closes = parser.get_method(), not parser.should_keep_alive()
        self._is_usual = self._is_usual and _UNUSUAL_HEADERS.isdisjoint(self.headers)
