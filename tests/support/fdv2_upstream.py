"""LaunchDarkly's side of FDv2: events of a stream, bodies of polls, and a server of both."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import defaultdict
from collections.abc import Iterable

from aiohttp import web

from relay.protocol import sse
from tests.support.upstream import EVENT_STREAM, Answer, ScriptedUpstream

Key = tuple[str, str]
"""Kind and key of an item."""

Content = dict[Key, dict]


def event(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode()


def state(payload: str, version: int) -> str:
    """The name that LaunchDarkly gives to a version of a payload."""
    return f"(p:{payload}:{version})"


def intent(payload: str, version: int, code: str, reason: str = "stale") -> bytes:
    members = {"id": payload, "target": version, "intentCode": code, "reason": reason}
    return _event("server-intent", payloads=[members])


def objects(payload: str, version: int, *items: dict) -> bytes:
    """The puts of flags and segments, in the form of FDv1; segments have `included`."""
    del payload
    text = '{{"version":{},"kind":"{}","key":{},"object":{}}}'
    kinds = ["segment" if "included" in item else "flag" for item in items]
    puts = (
        event("put-object", text.format(version, kind, json.dumps(item["key"]), json.dumps(item)))
        for kind, item in zip(kinds, items, strict=True)
    )
    return b"".join(puts)


def deletions(version: int, *keys: Key) -> bytes:
    """The version is that of the payload."""
    return b"".join(_event("delete-object", version=version, kind=k, key=key) for k, key in keys)


def transferred(payload: str, version: int) -> bytes:
    named = state(payload, version)
    return _event("payload-transferred", state=named, id=payload, version=version)


def full(payload: str, version: int, *items: dict) -> bytes:
    """A transfer of everything."""
    start = intent(payload, version, "xfer-full", "payload-missing")
    return start + objects(payload, version, *items) + transferred(payload, version)


def changes(payload: str, version: int, *items: dict, deleted: Iterable[Key] = ()) -> bytes:
    """A transfer of what has changed; what is deleted comes last."""
    content = objects(payload, version, *items) + deletions(version, *deleted)
    return intent(payload, version, "xfer-changes") + content + transferred(payload, version)


def error(reason: str) -> bytes:
    return _event("error", payloadId="P", reason=reason)


def goodbye(reason: str, **members: object) -> bytes:
    return _event("goodbye", reason=reason, silent=False, catastrophe=False, **members)


def body(content: bytes) -> bytes:
    """The events of a stream as the body of a poll."""
    events = sse.Decoder().feed(content)
    texts = (f'{{"event":"{each.name}","data":{each.data.decode()}}}' for each in events)
    return f'{{"events":[{",".join(texts)}]}}'.encode()


def _event(name: str, **data: object) -> bytes:
    return event(name, json.dumps(data, separators=(",", ":")))


STREAMS = "fdv2:"
"""Before an SDK key: its streams of FDv2."""

PAYLOAD = "UPSTREAM"
"""ID of the payload of every environment; with a filter it has another one."""


def payload_of(key: str) -> str:
    """ID of the payload for an SDK key, or for one with a filter."""
    return PAYLOAD + key.partition("?filter=")[2].upper()


class FDv2Upstream(ScriptedUpstream):
    """Serves `/sdk/stream` and `/sdk/poll` as well, with deltas from any version of its data."""

    def __init__(self, tls: ssl.SSLContext | None = None, prefix: str = "") -> None:
        super().__init__(tls, prefix)
        self._contents: dict[str, list[Content]] = defaultdict(list)
        """Each version of the data, by SDK key; the first is 1."""
        self.forgets = False
        """True if it knows no basis any more."""
        self.filters = True
        """False if it takes no notice of filters by FDv2, as LaunchDarkly."""
        self.transfers: list[tuple[str, int]] = []
        """Answers by FDv2 so far: the intent, and the bytes of the transfer."""

    def serve(self, key: str, text: str) -> None:
        super().serve(key, text)
        data = json.loads(text)
        kinds = (("flag", "flags"), ("segment", "segments"))
        items = {(kind, k): item for kind, name in kinds for k, item in data[name].items()}
        self._contents[key].append(items)

    async def put(self, key: str, text: str) -> None:
        """Change the data; open streams of both protocols get what has changed."""
        await super().put(key, text)
        version = self.version(key)
        if version > 1:
            basis = state(payload_of(key), version - 1)
            await self.raw(STREAMS + key, self.transfer(key, basis))

    def version(self, key: str) -> int:
        return len(self._contents[key])

    def state(self, key: str) -> str:
        """The present name of the data."""
        return state(payload_of(key), self.version(key))

    def transfer(self, key: str, basis: str) -> bytes:
        """Return the transfer that brings a client with this basis up to date."""
        contents, version, payload = self._contents[key], self.version(key), payload_of(key)
        known = {state(payload, n + 1): items for n, items in enumerate(contents)}
        if basis == state(payload, version):
            return intent(payload, version, "none", "up-to-date")
        if basis not in known or self.forgets:
            reason = "cant-catchup" if basis else "payload-missing"
            start = intent(payload, version, "xfer-full", reason)
            content = objects(payload, version, *contents[-1].values())
            return start + content + transferred(payload, version)
        before, after = known[basis], contents[-1]
        changed = [item for k, item in after.items() if before.get(k) != item]
        gone = [k for k in before if k not in after]
        return changes(payload, version, *changed, deleted=gone)

    async def _respond(self, request: web.Request, key: str, path: str) -> web.StreamResponse:
        if path not in {"/sdk/poll", "/sdk/stream"}:
            return await super()._respond(request, key, path)
        if not self.filters:
            key = key.partition("?filter=")[0]
        content = self.transfer(key, request.query.get("basis", ""))
        code = json.loads(sse.Decoder().feed(content)[0].data)["payloads"][0]["intentCode"]
        self.transfers.append((code, len(content)))
        if path == "/sdk/poll":
            return web.Response(body=body(content), content_type="application/json")
        return await self._stream(request, STREAMS + key, content)


def answer(content: bytes, headers: dict[str, str] | None = None) -> Answer:
    """Answer a poll with the events of a stream."""

    async def respond(_: web.Request) -> web.Response:
        return web.Response(body=body(content), content_type="application/json", headers=headers)

    return respond


def streaming(
    content: bytes, headers: dict[str, str] | None = None, *, then: str = "stall"
) -> Answer:
    """Answer a stream with some content; then `stall`, or `end` it."""

    async def respond(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers=EVENT_STREAM | (headers or {}))
        await stream.prepare(request)
        await stream.write(content)
        if then == "stall":
            await asyncio.Event().wait()
        return stream

    return respond
