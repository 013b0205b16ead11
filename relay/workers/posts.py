"""Events of a worker: they are safe once the feeder has them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import NamedTuple

from relay import clock
from relay.errors import StoreUnavailable
from relay.model.event import EventPayload
from relay.protocol.workers import FromWorker, Post, Stored

WAIT = 1.0
"""Seconds for which a post waits while there is no feeder; then the SDK has to send it again."""

MAX_WAITING = 64 * 1024 * 1024
"""Bytes of posts that may wait for the feeder; further ones are refused."""


class _Waiting(NamedTuple):
    post: Post
    result: asyncio.Future[bool]
    since: float
    """Monotonic time of arrival."""


class PostSender:
    """Acceptor that passes payloads to the feeder.

    Args:
        send: sends a message to the feeder; it is lost while there is none.
    """

    def __init__(self, send: Callable[[FromWorker], object]) -> None:
        self._send = send
        self._number = 0
        self._waiting: dict[int, _Waiting] = {}
        self._size = 0
        self._server_times: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<PostSender: {len(self._waiting)} posts waiting>"

    def accept(self, payload: EventPayload) -> asyncio.Future[bool]:
        """Send a payload to the feeder; the result resolves once it is safe there.

        Raises:
            StoreUnavailable: too many wait for the feeder.
        """
        if self._size + len(payload.body) > MAX_WAITING:
            raise StoreUnavailable("too many events wait to be stored")
        self._number += 1
        result: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(Post(self._number, payload), result, clock.monotonic())
        self._waiting[self._number] = waiting
        self._size += len(payload.body)
        self._send(waiting.post)
        return result

    def server_time(self, environment: str) -> float:
        """Return upstream's time at its last response, in Unix seconds; 0 before the first."""
        return self._server_times.get(environment, 0.0)

    def forget(self, environment: str) -> None:
        """Forget an environment that is gone."""
        self._server_times.pop(environment, None)

    def waiting(self) -> Iterator[Post]:
        """Yield the posts that another feeder has to get, under the same payload IDs."""
        return (each.post for each in self._waiting.values())

    def finish(self, message: Stored) -> None:
        """Report that a post is safe."""
        waiting = self._take(message.number)
        if waiting is None:
            return
        if message.server_time:
            name = waiting.post.payload.partition.environment
            self._server_times[name] = message.server_time
        if not waiting.result.done():
            waiting.result.set_result(message.new)

    def refuse(self, number: int) -> None:
        """Report that a post cannot be accepted."""
        waiting = self._take(number)
        if waiting is not None and not waiting.result.done():
            waiting.result.set_exception(StoreUnavailable("events cannot be stored now"))

    def refuse_late(self) -> None:
        """Refuse those that have waited for too long, as there is no feeder."""
        late = clock.monotonic() - WAIT
        for number in [n for n, waiting in self._waiting.items() if waiting.since < late]:
            self.refuse(number)

    def _take(self, number: int) -> _Waiting | None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            self._size -= len(waiting.post.payload.body)
        return waiting
