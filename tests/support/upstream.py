"""A scripted LaunchDarkly: a real HTTP server which does what the test says.

Asynchronous tests use `ScriptedUpstream`; synchronous ones `in_thread()`; people run
`python -m tests.support.upstream --port 8031 --data FILE`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import ssl
import threading
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

from aiohttp import web
from multidict import CIMultiDictProxy

from tests.support import data

EVENT_STREAM = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
BIG_SEGMENTS = "big-segments:"
"""Before an SDK key: its streams of big segments."""

PATIENCE = 10.0
"""Seconds that a wait may take before the test fails."""

LARGEST_POST = 64 * 1024 * 1024

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    headers: CIMultiDictProxy[str]


@dataclass(frozen=True)
class Posted:
    """One post of events as it came in, decompressed, and how it was answered."""

    path: str
    headers: CIMultiDictProxy[str]
    body: bytes
    status: int | None
    """None until there is an answer, and if there never is one."""

    @property
    def payload_id(self) -> str:
        return self.headers.get("X-LaunchDarkly-Payload-ID", "")

    @property
    def events(self) -> Any:
        return json.loads(self.body)


class ScriptedUpstream:
    """Serves `/all` and `/sdk/latest-all` for each SDK key that has data; others get 401.

    A request with a payload filter is one with the key `filtered(KEY, FILTER)`.

    Posts of events get 202, unless answers are scripted for their key, or for their path where
    there is no key.

    Args:
        tls: to serve HTTPS.
        prefix: path below which everything lies; nothing else is there.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, prefix: str = "") -> None:
        self.requests: list[Request] = []
        self.posts: list[Posted] = []
        self.port = 0
        self._tls = tls
        self._prefix = prefix
        self._data: dict[str, str] = {}
        self._answers: dict[str, deque[Answer]] = defaultdict(deque)
        self._always: dict[str, Answer] = {}
        self.patches: dict[str, list[dict[str, Any]]] = defaultdict(list)
        """Patches of big segments by SDK key; see `segment_patch`."""
        self._path_answers: dict[str, deque[Answer]] = defaultdict(deque)
        self._streams: dict[str, list[web.StreamResponse]] = defaultdict(list)
        self._ever: dict[str, int] = defaultdict(int)
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        scheme = "https" if self._tls else "http"
        return f"{scheme}://127.0.0.1:{self.port}{self._prefix}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; after `stop` on the same port."""
        app = web.Application(client_max_size=LARGEST_POST)
        app.router.add_route("POST", f"{self._prefix}/{{path:.*}}", self._take_post)
        app.router.add_route("*", f"{self._prefix}/{{path:.*}}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(
            self._runner, "127.0.0.1", self.port, ssl_context=self._tls, reuse_address=True
        )
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Refuse connections and end open streams."""
        runner, self._runner = self._runner, None
        self.close_streams()
        if runner is not None:
            await runner.cleanup()

    def serve(self, key: str, text: str) -> None:
        """From now on `key` has this data set (raw text); open streams are told nothing."""
        self._data[key] = text

    def script(self, key: str, *answers: Answer) -> None:
        """The next requests with `key` get these answers, one each."""
        self._answers[key].extend(answers)

    def script_path(self, path: str, *answers: Answer) -> None:
        """The next requests of a path get these answers, one each."""
        self._path_answers[path].extend(answers)

    async def send_patches(self, key: str, *patches: dict[str, Any]) -> None:
        """Add patches of big segments, and send them as one event on open streams."""
        self.patches[key].extend(patches)
        await self.raw(BIG_SEGMENTS + key, event(*patches))

    def asked(self, path: str) -> int:
        """Number of requests so far whose path begins so."""
        return sum(each.path.startswith(path) for each in self.requests)

    async def until_asked(self, path: str, n: int = 1) -> None:
        """Wait until there have been `n` requests of a path."""
        await self._until(lambda: self.asked(path) >= n)

    def always(self, key: str, answer: Answer | None) -> None:
        """All requests with `key` get this answer, until None is given."""
        if answer is None:
            self._always.pop(key, None)
        else:
            self._always[key] = answer

    async def put(self, key: str, text: str) -> None:
        """Change the data set and send it on open streams."""
        self.serve(key, text)
        await self.raw(key, data.put(text))

    async def patch(self, key: str, item: dict) -> None:
        await self.raw(key, data.patch(item))

    async def delete(self, key: str, path: str, version: int) -> None:
        await self.raw(key, data.delete(path, version))

    async def raw(self, key: str, content: bytes) -> None:
        """Send bytes on the open streams of `key`; one whose client has gone gets nothing."""
        for stream in list(self._streams[key]):
            with contextlib.suppress(ConnectionResetError):
                await stream.write(content)

    def close_streams(self, key: str | None = None) -> None:
        """Cut the open streams of `key`, or all, in the middle."""
        for each in [key] if key is not None else list(self._streams):
            for stream in self._streams.pop(each, []):
                abort(cast("web.Request", stream._req))

    async def connected(self, key: str, n: int = 1) -> None:
        """Wait until `key` has had `n` normal streams, counted from the start."""
        await self._until(lambda: self._ever[key] >= n)

    async def requested(self, n: int = 1) -> None:
        """Wait until there have been `n` requests, counted from the start."""
        await self._until(lambda: len(self.requests) >= n)

    @property
    def accepted(self) -> list[Posted]:
        """The posts of events that got 2xx."""
        return [p for p in self.posts if p.status is not None and 200 <= p.status < 300]

    async def posted(self, n: int = 1) -> None:
        """Wait until there have been `n` posts of events, answered or not."""
        await self._until(lambda: len(self.posts) >= n)

    async def took(self, n: int = 1) -> None:
        """Wait until `n` events have been accepted; those which came twice count twice."""
        await self._until(lambda: sum(len(p.events) for p in self.accepted) >= n)

    def open_streams(self, key: str) -> int:
        """Return how many streams `key` has now."""
        return len(self._streams.get(key, ()))

    async def left(self, key: str) -> None:
        """Wait until `key` has no open stream."""
        await self._until(lambda: not self._streams.get(key))

    async def _until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE), self._changed:
            await self._changed.wait_for(true)

    async def _note(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(Request(request.method, request.path_qs, request.headers))
        await self._note()
        key = filtered(request.headers.get("Authorization", ""), request.query.get("filter", ""))
        path = request.path.removeprefix(self._prefix)
        if self._path_answers[path]:
            return await self._path_answers[path].popleft()(request)
        if key in self._always:
            return await self._always[key](request)
        if self._answers[key]:
            return await self._answers[key].popleft()(request)
        if key not in self._data:
            return web.Response(status=401)
        return await self._respond(request, key, path)

    async def _respond(self, request: web.Request, key: str, path: str) -> web.StreamResponse:
        """Answer a request with a known key for which nothing else was scripted."""
        match path:
            case "/all" | "/relay_auto_config":
                return await self._stream(request, key, data.put(self._data[key]))
            case "/sdk/latest-all":
                return self._poll(request, key)
            case "/sdk/big-segments/revisions":
                return web.json_response(self._patches_after(key, request.query.get("after", "")))
            case "/big-segments":
                return await self._stream(request, BIG_SEGMENTS + key, b": begin\n\n")
        return web.Response(status=404)

    async def _take_post(self, request: web.Request) -> web.StreamResponse:
        """Record a post of events and answer as scripted."""
        self.requests.append(Request(request.method, request.path_qs, request.headers))
        post = Posted(request.path, request.headers, await request.read(), None)
        place = len(self.posts)
        self.posts.append(post)
        await self._note()
        key = request.headers.get("Authorization", request.path)
        answer = self._always.get(key) or status(202)
        if key not in self._always and self._answers[key]:
            answer = self._answers[key].popleft()
        response = await answer(request)
        if request.transport is not None and not request.transport.is_closing():
            self.posts[place] = replace(post, status=response.status)
        await self._note()
        return response

    def _poll(self, request: web.Request, key: str) -> web.Response:
        etag = '"' + hashlib.sha256(self._data[key].encode()).hexdigest()[:16] + '"'
        if request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers={"ETag": etag})
        answer = web.Response(
            text=self._data[key], content_type="application/json", headers={"ETag": etag}
        )
        answer.enable_compression()
        return answer

    def _patches_after(self, key: str, version: str) -> list[dict[str, Any]]:
        patches = self.patches[key]
        versions = [patch["version"] for patch in patches]
        start = len(versions) - versions[::-1].index(version) if version in versions else 0
        return patches[start:]

    async def _stream(self, request: web.Request, key: str, start: bytes) -> web.StreamResponse:
        stream = web.StreamResponse(headers=EVENT_STREAM)
        await stream.prepare(request)
        await stream.write(start)
        self._streams[key].append(stream)
        self._ever[key] += 1
        await self._note()
        try:
            await asyncio.Event().wait()
        finally:
            if stream in self._streams.get(key, []):
                self._streams[key].remove(stream)
            await self._note()
        return stream


def segment_patch(
    reference: str,
    version: str,
    previous: str,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    *,
    no_longer: Iterable[str] = (),
    no_longer_excluded: Iterable[str] = (),
) -> dict[str, Any]:
    """A patch of a big segment; contexts are given by their keys."""

    def change(add: Iterable[str], remove: Iterable[str]) -> dict[str, list[str]]:
        return {
            "add": [context_hash(key) for key in add],
            "remove": [context_hash(key) for key in remove],
        }

    return {
        "environmentId": "env",
        "segmentId": reference,
        "version": version,
        "previousVersion": previous,
        "changes": {
            "included": change(include, no_longer),
            "excluded": change(exclude, no_longer_excluded),
        },
    }


def context_hash(key: str) -> str:
    """The hash of a context key in patches and databases."""
    return base64.b64encode(hashlib.sha256(key.encode()).digest()).decode()


def event(*patches: dict[str, Any]) -> bytes:
    """An event with patches of big segments."""
    return b"event: patch\ndata: " + json.dumps(patches).encode() + b"\n\n"


def filtered(key: str, payload_filter: str) -> str:
    """The key by which the data set of an SDK key and a payload filter are known."""
    return f"{key}?filter={payload_filter}" if payload_filter else key


def abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def status(code: int, **headers: str) -> Answer:
    """An answer without a body, such as 401 or 503."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=code, headers=headers)

    return answer


def redirect(location: str, code: int = 307) -> Answer:
    """Sends the client elsewhere; to itself it is a loop."""
    return status(code, Location=location)


def body(
    content: bytes,
    content_type: str = "text/event-stream",
    *,
    gzip: bool = False,
    then: str = "end",
) -> Answer:
    """Sends bytes as a stream; then `end`s it, `abort`s the connection, or `stall`s."""

    async def answer(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": content_type})
        if gzip:
            stream.enable_compression(web.ContentCoding.gzip)
        await stream.prepare(request)
        await stream.write(content)
        if then == "stall":
            await asyncio.Event().wait()
        if then == "abort":
            abort(request)
        return stream

    return answer


def rejecting(poison: bytes, code: int = 400) -> Answer:
    """Answers `code` to bodies with `poison` in them, and 202 to others."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=code if poison in await request.read() else 202)

    return answer


def at_most(size: int) -> Answer:
    """Answers 413 to bodies that are longer, and 202 to others."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=413 if len(await request.read()) > size else 202)

    return answer


def slowly(seconds: float) -> Answer:
    """Answers 202 after a while."""

    async def answer(_: web.Request) -> web.Response:
        await asyncio.sleep(seconds)
        return web.Response(status=202)

    return answer


async def stall(_: web.Request) -> web.StreamResponse:
    """Takes the request and never answers."""
    await asyncio.Event().wait()
    raise AssertionError


async def hang_up(request: web.Request) -> web.StreamResponse:
    """Closes the connection without an answer."""
    abort(request)
    return web.Response()


def half_a_put(text: str) -> Answer:
    """Sends the first half of a put, then ends the stream."""
    message = data.put(text)
    return body(message[: len(message) // 2])


def drip(chunk: bytes, pause: float = 0.0) -> Answer:
    """Repeats `chunk` for ever: endless garbage, or a slow drip."""

    async def answer(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers=EVENT_STREAM)
        await stream.prepare(request)
        while True:
            await stream.write(chunk)
            await asyncio.sleep(pause)

    return answer


class ThreadedUpstream:
    """A scripted upstream in a thread of its own."""

    def __init__(self, upstream: ScriptedUpstream, loop: asyncio.AbstractEventLoop) -> None:
        self.upstream = upstream
        self._loop = loop
        self.url = upstream.url

    def do(self, name: str, *args: object, **options: object) -> None:
        """Call a method of the upstream in its loop and wait for it: `do("put", key, text)`."""

        async def call() -> None:
            result = getattr(self.upstream, name)(*args, **options)
            if asyncio.iscoroutine(result):
                await result

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(PATIENCE)


@contextlib.contextmanager
def in_thread() -> Iterator[ThreadedUpstream]:
    """A scripted upstream for synchronous tests."""
    ready = threading.Event()
    made: list[ThreadedUpstream] = []
    ends: list[asyncio.Event] = []

    async def run() -> None:
        end = asyncio.Event()
        async with ScriptedUpstream() as upstream:
            made.append(ThreadedUpstream(upstream, asyncio.get_running_loop()))
            ends.append(end)
            ready.set()
            await end.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    try:
        yield made[0]
    finally:
        made[0]._loop.call_soon_threadsafe(ends[0].set)
        thread.join(PATIENCE)


def main() -> None:
    """Serve a data set to people."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8031)
    parser.add_argument("--key", default="sdk-demo")
    parser.add_argument("--data", type=Path, help='JSON: {"flags":{…},"segments":{…}}')
    options = parser.parse_args()
    text = options.data.read_text() if options.data else data.all_data(data.flag())

    async def run() -> None:
        upstream = ScriptedUpstream()
        upstream.port = options.port
        upstream.serve(options.key, text)
        async with upstream:
            print(f"{upstream.url} serves {options.key}", flush=True)  # noqa: T201 - for people
            await asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())


if __name__ == "__main__":
    main()
