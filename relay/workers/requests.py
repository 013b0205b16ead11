"""Requests of a worker that the feeder answers: pages about the whole relay, and LaunchDarkly's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from relay import clock
from relay.aio import wait_for
from relay.errors import ErrorKind, UpstreamUnavailable
from relay.model.reply import Reply
from relay.protocol.workers import Answer, FetchRequest, FromWorker, PageRequest, WebhookRequest

WITHIN = 0.3
"""Seconds within which the feeder answers, besides the time that LaunchDarkly may take."""

RETURNS_WITHIN = 2.0
"""Seconds for which a page waits for the next feeder: one worker alone has counted less than all,
so counters would seem to go back."""


class Requests:
    """Requests that wait for the feeder's answer.

    Args:
        send: sends a message to the feeder; returns False if there is none.
    """

    def __init__(self, send: Callable[[FromWorker], bool]) -> None:
        self._send = send
        self._number = 0
        self._connected = asyncio.Event()
        """Set while there is a feeder that has begun to feed."""
        self._waiting: dict[int, asyncio.Future[Answer]] = {}

    def __repr__(self) -> str:
        return f"<Requests: {len(self._waiting)} waiting>"

    async def fetch(
        self, url: str, *, headers: dict[str, str], within: float, max_body: int
    ) -> Reply:
        """Let the feeder send a request to LaunchDarkly, as `model.reply.Fetch`.

        Raises:
            UpstreamUnavailable: there was no response.
        """
        self._number += 1
        request = FetchRequest(self._number, url, headers, within, max_body)
        answer = await self._ask(request, within + WITHIN)
        if answer is None or not answer.status:
            reason = answer.body.decode() if answer else "the feeder does not answer"
            raise UpstreamUnavailable(ErrorKind.NETWORK_ERROR, reason)
        returned = {name.decode("latin-1"): text.decode("latin-1") for name, text in answer.headers}
        return Reply(answer.status, returned, answer.body)

    async def page(self, path: str, query: bytes) -> Answer | None:
        """Return the feeder's answer to a request for a page; None if it does not answer.

        Without a feeder this waits for the next one, which is there soon.
        """
        until = clock.monotonic() + RETURNS_WITHIN
        while (left := until - clock.monotonic()) > 0:
            self._number += 1
            began = self._connected.is_set()
            answer = await self._ask(PageRequest(self._number, path, query), min(WITHIN, left))
            if answer is not None or (began and self._connected.is_set()):
                return answer
            await wait_for(self._connected, until - clock.monotonic())
        return None

    async def webhook(self, content: bytes, signature: str) -> Answer | None:
        """Return the feeder's answer to a webhook; None if it does not answer."""
        self._number += 1
        return await self._ask(WebhookRequest(self._number, content, signature), WITHIN)

    def finish(self, answer: Answer) -> None:
        """Take an answer."""
        waiting = self._waiting.pop(answer.number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def begin(self) -> None:
        """Note that there is a feeder that has begun to feed."""
        self._connected.set()

    def cancel(self) -> None:
        """Give up what waits for a feeder that is gone."""
        self._connected.clear()
        for waiting in self._waiting.values():
            waiting.cancel()
        self._waiting.clear()

    async def _ask(
        self, request: PageRequest | WebhookRequest | FetchRequest, within: float
    ) -> Answer | None:
        if not self._send(request):
            return None
        waiting: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[request.number] = waiting
        done, _ = await asyncio.wait([waiting], timeout=within)
        self._waiting.pop(request.number, None)
        return waiting.result() if done and not waiting.cancelled() else None
