"""`POST /webhooks/launchdarkly`: check upstream as soon as a change is announced (webhooks 12).

The response does not wait for the check. Each affected environment checks upstream, and again a
little later, until it has the announced change: upstream's caches may lag behind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import orjson
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from relay.environment import Environment
from relay.errors import InvalidData
from relay.lru import LRUMap
from relay.model.credential import Secret
from relay.protocol import webhook
from relay.protocol.webhook import ChangedResource, ChangeNotice
from relay.refresh import BURST, RECHECK_AFTER, RefreshTracker
from relay.telemetry.throttle import Throttle
from relay.web.bodies import MemoryBudget, RequestBody, RequestRejected
from relay.web.requests import header
from relay.web.responses import PreparedResponse, json_error

PATH = "/webhooks/launchdarkly"

MAX_BUFFERED = 16 * 1024 * 1024
"""Bytes of all bodies that are being received."""

BODY_TIME = 10.0
"""Seconds within which a body must arrive."""

MAX_SEEN = 10_000
"""Webhooks that are remembered so as to recognise repeated deliveries."""

MAX_WARNINGS, WARNINGS_WITHIN = 20, 60.0
"""Number of refused webhooks that are logged in so many seconds: anybody can send any number."""

ACCEPTED = json_error(202, "accepted")
REPEATED = json_error(202, "known already")
UNSIGNED = json_error(401, "the signature in X-LD-Signature is missing or wrong")
MALFORMED = json_error(400, "the body is not that of a LaunchDarkly webhook")
TOO_LARGE = json_error(413, f"the body is longer than {webhook.MAX_BODY} bytes")
TOO_SLOW = json_error(408, "the body did not come in time").with_headers((b"connection", b"close"))
BUSY = json_error(503, "too many webhooks at a time")

_log = logging.getLogger("relay.webhooks")


Ask = Callable[[bytes, str], Awaitable[PreparedResponse | None]]
"""Ask for the response to a webhook, by body and signature; None if there is no answer."""


class WebhooksHandler:
    """ASGI application of the route.

    Args:
        environments: all environments of the relay by name; may change.
        secrets: with which webhooks may be signed; at least one.
        recheck_after: see `RefreshTracker`.
        burst: see `RefreshTracker`.
        ask: lets the feeder respond, if this is a worker; None if it does not.
    """

    def __init__(
        self,
        environments: Mapping[str, Environment],
        secrets: Sequence[Secret],
        recheck_after: Sequence[float] = RECHECK_AFTER,
        burst: float = BURST,
        *,
        ask: Ask | None = None,
    ) -> None:
        self._ask = ask
        self._environments = environments
        self._new_tracker = partial(RefreshTracker, recheck_after=recheck_after, burst=burst)
        self._trackers: dict[Environment, RefreshTracker] = {}
        """Of the environments that wait for announced changes."""
        self._tasks: asyncio.TaskGroup | None = None
        self.secrets = tuple(secrets)
        """With which webhooks may be signed; may be replaced."""
        self._seen: LRUMap[str, None] = LRUMap(MAX_SEEN)
        """IDs of received webhooks."""
        self._budget = MemoryBudget(webhook.MAX_BODY, MAX_BUFFERED, too_large=TOO_LARGE, full=BUSY)
        self._warnings = Throttle(WARNINGS_WITHIN, MAX_WARNINGS)

    async def run(self) -> None:
        """Check upstream whenever webhooks have announced changes, until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await asyncio.Event().wait()
        finally:
            self._tasks = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a webhook."""
        response = (await self._respond(Request(scope, receive))).to_starlette()
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> PreparedResponse:
        body = RequestBody(request, self._budget, raw=True)
        try:
            async with asyncio.timeout(BODY_TIME):
                content = await body.read()
        except RequestRejected as e:
            return await body.reject(self._refuse(e.response))
        except TimeoutError:
            return self._refuse(TOO_SLOW)
        finally:
            body.release()
        signature = header(request, "x-ld-signature").decode("latin-1")
        if self._ask is not None:
            return await self._ask(content, signature) or BUSY
        return self.respond(content, signature)

    def respond(self, content: bytes, signature: str) -> PreparedResponse:
        """Return the response to a webhook, which is acted upon.

        Args:
            content: its body.
            signature: the header that signs it.
        """
        if not webhook.is_signed(content, signature, self.secrets):
            return self._refuse(UNSIGNED)
        try:
            notice = webhook.read(content)
        except InvalidData as e:
            return self._refuse(MALFORMED, f": {e.reason}")
        if self._is_repeated(notice.id or signature):
            _log.info("A webhook came again; it is not acted upon")
            return REPEATED
        self._act(notice)
        return ACCEPTED

    def _act(self, notice: ChangeNotice) -> None:
        """Announce the changes to the affected environments."""
        affected = notice.affected(environment.spec for environment in self._environments.values())
        checking = [
            name
            for name, resources in affected.items()
            if self._announce(self._environments[name], resources)
        ]
        # At level debug: a webhook of the whole account may come as often as traffic.
        _log.debug("A webhook concerns %d environments; %d look", len(affected), len(checking))

    def _announce(self, environment: Environment, resources: Sequence[ChangedResource]) -> bool:
        """Announce changes to one environment; return whether there is anything to check for."""
        tracker = self._trackers.get(environment) or self._new_tracker(environment)
        if not tracker.announce(resources):
            return False
        if environment not in self._trackers and self._tasks is not None:
            self._trackers[environment] = tracker
            self._tasks.create_task(self._track(environment, tracker))
        return True

    async def _track(self, environment: Environment, tracker: RefreshTracker) -> None:
        try:
            await tracker.run()
        finally:
            del self._trackers[environment]

    def _is_repeated(self, name: str) -> bool:
        """Return whether a webhook was received before, and remember it."""
        if name in self._seen:
            return True
        self._seen.put(name, None)
        return False

    def _refuse(self, response: PreparedResponse, detail: str = "") -> PreparedResponse:
        """Log that a webhook is refused, up to `MAX_WARNINGS` times; return the response."""
        if self._warnings.count():
            reason = orjson.loads(response.body)["message"]
            suffix = "; more are not logged for a while" if self._warnings.exhausted else ""
            _log.warning(
                "A webhook is refused (%d): %s%s%s", response.status, reason, detail, suffix
            )
        return response
