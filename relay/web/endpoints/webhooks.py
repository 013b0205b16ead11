"""`POST /webhooks/launchdarkly`: who is told at once of a change looks at once (webhooks 12).

Answered before anything is done. Then each environment that is concerned looks at upstream, and
again a little later, until it has what was announced: upstream's caches may lag behind.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence

import orjson
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from relay.environment import Environment
from relay.errors import InvalidData
from relay.model.credential import Secret
from relay.protocol import webhook
from relay.protocol.webhook import ChangeNotice
from relay.refresh import BURST, RECHECK_AFTER, RefreshTracker
from relay.web.bodies import MemoryBudget, RequestBody, RequestRejected
from relay.web.responses import PreparedResponse, json_error
from relay.web.routing import header

PATH = "/webhooks/launchdarkly"


MAX_BUFFERED = 16 * 1024 * 1024
"""Bytes of all bodies that are received at a time."""

BODY_TIME = 10.0
"""Seconds in which a body must have come."""

REMEMBERED = 10_000
"""Webhooks that are known again when they come twice."""


MAX_WARNINGS, WARNINGS_WITHIN = 20, 60.0
"""Refused webhooks that are logged within so many seconds: strangers can send them without end."""

ACCEPTED = json_error(202, "accepted")
KNOWN = json_error(202, "known already")
UNSIGNED = json_error(401, "the signature in X-LD-Signature is missing or wrong")
MALFORMED = json_error(400, "the body is not that of a LaunchDarkly webhook")
TOO_LARGE = json_error(413, f"the body is longer than {webhook.MAX_BODY} bytes")
TOO_SLOW = json_error(408, "the body did not come in time").with_headers((b"connection", b"close"))
BUSY = json_error(503, "too many webhooks at a time")

_log = logging.getLogger("relay.webhooks")


class Webhooks:
    """The application behind the route.

    Args:
        environments: all of the relay.
        secrets: those with which webhooks may be signed; at least one.
        recheck_after: see `RefreshTracker`.
        burst: see `RefreshTracker`.
    """

    def __init__(
        self,
        environments: Collection[Environment],
        secrets: Sequence[Secret],
        recheck_after: Sequence[float] = RECHECK_AFTER,
        burst: float = BURST,
    ) -> None:
        self._watches = {e.spec.name: RefreshTracker(e, recheck_after, burst) for e in environments}
        self._specs = [environment.spec for environment in environments]
        self._secrets = tuple(secrets)
        self._known: OrderedDict[str, None] = OrderedDict()
        """Webhooks that came, the last one last."""
        self._budget = MemoryBudget(webhook.MAX_BODY, MAX_BUFFERED, too_large=TOO_LARGE, full=BUSY)
        self._warnings = 0
        self._warnings_since = -float("inf")

    async def run(self) -> None:
        """See that environments look, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for watch in self._watches.values():
                tasks.create_task(watch.run())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a webhook."""
        response = (await self._answer(Request(scope, receive))).to_starlette()
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> PreparedResponse:
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
        if not webhook.is_signed(content, signature, self._secrets):
            return self._refuse(UNSIGNED)
        try:
            announced = webhook.read(content)
        except InvalidData as e:
            return self._refuse(MALFORMED, f": {e.reason}")
        if self._is_known(announced.id or signature):
            _log.info("A webhook came again; it is not acted upon")
            return KNOWN
        self._act(announced)
        return ACCEPTED

    def _act(self, announced: ChangeNotice) -> None:
        """Tell the environments that are concerned."""
        concerned = announced.concerning(self._specs)
        looking = [
            name for name, places in concerned.items() if self._watches[name].announce(places)
        ]
        # With a policy of the whole account there may be many: they are traffic.
        _log.debug("A webhook concerns %d environments; %d look", len(concerned), len(looking))

    def _is_known(self, name: str) -> bool:
        """Whether a webhook came before; from now on it did."""
        if name in self._known:
            return True
        self._known[name] = None
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return False

    def _refuse(self, answer: PreparedResponse, detail: str = "") -> PreparedResponse:
        """Log that a webhook is refused, unless that was said often of late."""
        now = time.monotonic()
        if now - self._warnings_since > WARNINGS_WITHIN:
            self._warnings, self._warnings_since = 0, now
        self._warnings += 1
        if self._warnings <= MAX_WARNINGS:
            reason = orjson.loads(answer.body)["message"]
            last = "; more are not logged for a while" if self._warnings == MAX_WARNINGS else ""
            _log.warning("A webhook is refused (%d): %s%s%s", answer.status, reason, detail, last)
        return answer
