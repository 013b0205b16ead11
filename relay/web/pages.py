"""Pages about the relay: `/status`, health and `/metrics`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics
from relay.web import expectations
from relay.web.endpoints import metrics, status
from relay.web.responses import NOT_FOUND, PreparedResponse


class Page(NamedTuple):
    """A page, or one for each environment.

    Args:
        path: its path; that of an environment's page ends with a slash, and its name follows.
        render: returns it; takes the name, which is empty for a page of its own.
        schema: members for which expectations may ask; None if there are none.
        is_common: True if it is about all workers, so that the feeder has to be asked.
    """

    path: str
    render: Callable[[str], PreparedResponse]
    schema: expectations.Schema | None = None
    is_common: bool = False


class Pages:
    """All pages of a relay.

    Args:
        relay: that they are about.
        traffic: request counts.
    """

    def __init__(self, relay: Relay, traffic: RequestMetrics) -> None:
        self.all = (
            Page("/livez", lambda _: status.live()),
            Page("/startupz", lambda _: status.started(relay)),
            Page("/readyz", lambda _: status.ready(relay)),
            Page("/readyz/", lambda name: status.environment_ready(relay, name)),
            Page("/metrics", lambda _: metrics.page(relay, traffic), None, True),
            Page("/status", lambda _: status.overview(relay, traffic), expectations.OVERVIEW, True),
            Page(
                "/status/",
                lambda name: status.one(relay, traffic, name),
                expectations.ENVIRONMENT,
                True,
            ),
        )

    def __repr__(self) -> str:
        return f"<Pages {' '.join(page.path for page in self.all)}>"

    def response(self, path: str, query: bytes) -> PreparedResponse:
        """Return the response to a request for any page.

        Args:
            path: decoded.
            query: as it was received.
        """
        for page in self.all:
            if path == page.path:
                name = ""
            elif page.path.endswith("/") and path.startswith(page.path):
                name = path.removeprefix(page.path)
            else:
                continue
            return respond(page, name, query)
        return NOT_FOUND


def respond(page: Page, name: str, query: bytes) -> PreparedResponse:
    """Return the response to a request for a page.

    Args:
        page: the page.
        name: of the environment; empty for a page of its own.
        query: as it was received.
    """
    if page.path.endswith("/") and not name:  # `/status/` is no page
        return NOT_FOUND
    response = page.render(name)
    return expectations.check(response, query, page.schema) if page.schema else response
