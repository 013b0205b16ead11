"""Events endpoints (endpoints 1.8): read payloads, and respond once they are safe."""

from __future__ import annotations

import base64
from collections import Counter

from starlette.requests import Request

from relay.errors import StoreUnavailable
from relay.events.intake import EventAcceptor, EventIntake
from relay.model.text import from_base64
from relay.web.access import Access
from relay.web.bodies import BODIES_OVERLOADED, MemoryBudget, RequestBody, RequestRejected
from relay.web.requests import first_values, parameter
from relay.web.responses import EVENTS_DISABLED, PreparedResponse, json_error

_GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")

ACCEPTED = PreparedResponse(202)
IMAGE = PreparedResponse(200, ((b"content-type", b"image/gif"),), _GIF)
EMPTY = json_error(400, "body may not be empty")


class EventsHandler:
    """Handler of the events endpoints, for the application and the fast path.

    Args:
        acceptor: accepts payloads; None if events are disabled.
        max_size: bytes of the largest payload, decompressed; 0 for `relay.web.bodies.MAX_SIZE`.
        unusable: counts payloads that are not JSON arrays, and malformed events of schemas 1
            and 2, by environment.
    """

    def __init__(
        self,
        acceptor: EventAcceptor | None = None,
        max_size: int = 0,
        unusable: Counter[str] | None = None,
    ) -> None:
        self.intake = EventIntake(acceptor, Counter() if unusable is None else unusable)
        self.budget = MemoryBudget(max_size)
        """Shared by the application and the fast path."""

    def __repr__(self) -> str:
        return f"<EventsHandler: {self.intake}>"

    async def image(self, request: Request, access: Access) -> PreparedResponse:
        """Respond to a request for the image in whose URL browsers send events."""
        if not self.intake.enabled:
            return EVENTS_DISABLED
        body = _events_in(parameter(request, "d")) if request.method == "GET" else b""
        if body and not self.intake.discard(access.environment.spec.name):
            try:
                await self.intake.accept_image(access.environment.spec, body)
            except StoreUnavailable:
                return BODIES_OVERLOADED
        return IMAGE

    async def handle(self, request: Request, access: Access) -> PreparedResponse:
        """Respond to a POST of events."""
        environment, endpoint = access.environment, access.route.events_endpoint
        body = RequestBody(request, self.budget)
        try:
            await body.begin()
            if not self.intake.enabled:
                return await body.reject(EVENTS_DISABLED)
            if self.intake.discard(environment.spec.name):
                return await body.reject(ACCEPTED)
            content = await body.read()
            if not content:
                return EMPTY
            await self.intake.accept(
                *(environment.spec, endpoint, first_values(request), content),
                flags=environment.payload,
            )
        except RequestRejected as e:
            return await body.reject(e.response)
        except StoreUnavailable:
            return BODIES_OVERLOADED
        finally:
            body.release()
        return ACCEPTED


def _events_in(text: str) -> bytes:
    """Return the events in a query; empty if they are no base64."""
    try:
        # An unescaped `+` in a query is decoded as a blank.
        return from_base64(text.replace(" ", "+").encode())
    except ValueError:
        return b""
