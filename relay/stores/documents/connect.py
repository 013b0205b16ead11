"""From the URL of a place to the stores and mirrors that use it.

All places of a process share one S3 client and one HTTP session for each token. Libraries are
imported when the first URL needs them.
"""

# ruff: noqa: PLC0415 - see above

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from relay.errors import ConfigError
from relay.model.credential import Secret
from relay.model.environment import EnvironmentSpec
from relay.protocol import document
from relay.stores.documents import Place
from relay.stores.documents.location import Location, masked
from relay.stores.documents.store import DocumentStore, Renderings
from relay.telemetry.log import Log

if TYPE_CHECKING:
    from relay.stores.documents.http import HttpConnection
    from relay.stores.documents.s3 import S3Connection
    from relay.upstream import Upstream


class Places:
    """Makes places, with the connections that they share.

    Args:
        make_session: makes an HTTP session.
        proxy: URL of the proxy for S3; empty for that of the environment variables.
        urls: URLs as configured: what takes long is done for them at once.

    Raises:
        ConfigError: a library is missing.
    """

    def __init__(
        self, make_session: Callable[[], Upstream], proxy: str = "", urls: Iterable[str] = ()
    ) -> None:
        self._make_session = make_session
        self._proxy = proxy
        self._s3: S3Connection | None = None
        self._http: dict[Secret, HttpConnection] = {}
        for url in urls:
            if Location.of(url, "").scheme == "s3":
                self._connect_s3(url)

    def __repr__(self) -> str:
        return f"<Places, {len(self._http)} tokens>"

    def stores(
        self, urls: Iterable[str], token: Secret, spec: EnvironmentSpec, log: Log
    ) -> list[DocumentStore]:
        """Return the stores of an environment's document, one for each URL.

        Args:
            urls: URLs as configured.
            token: bearer token for `https` URLs without a user; may be empty.
            spec: environment; it has a client-side ID.
            log: a logger that names it.

        Raises:
            ConfigError: a library is missing.
        """
        name = _name(spec)
        locations = {url: Location.all_of(url, name) for url in urls}
        in_gzip = any(each.in_gzip for forms in locations.values() for each in forms)
        renderings = Renderings(shared=len(locations) > 1, in_gzip=in_gzip)
        return [
            DocumentStore(
                [self._place(form, token) for form in forms], renderings, masked(url), name, log
            )
            for url, forms in locations.items()
        ]

    def place(self, url: str, token: Secret, spec: EnvironmentSpec) -> Place:
        """Return the place of an environment's document, to read from.

        Raises:
            ConfigError: a library is missing.
        """
        return self._place(Location.of(url, _name(spec)), token)

    def _place(self, location: Location, token: Secret) -> Place:
        if location.scheme == "file":
            from relay.stores.documents.file import FilePlace

            return FilePlace(location)
        if location.scheme == "s3":
            connection = self._connect_s3(location.masked)
            from relay.stores.documents.s3 import S3Place

            return S3Place(location, connection)
        from relay.stores.documents.http import HttpConnection, HttpPlace

        if token not in self._http:
            self._http[token] = HttpConnection(self._make_session(), token)
        return HttpPlace(location, self._http[token])

    def _connect_s3(self, url: str) -> S3Connection:
        if self._s3 is None:
            try:
                from relay.stores.documents.s3 import S3Connection
            except ImportError as e:
                text = f"{url} needs the libraries for AWS: pip install 'relay[aws]'"
                raise ConfigError([text]) from e
            self._s3 = S3Connection(os.environ, self._proxy)
        return self._s3


def _name(spec: EnvironmentSpec) -> str:
    environment_id = spec.environment_id.value if spec.environment_id else spec.name
    return document.name(environment_id, spec.payload_filter)
