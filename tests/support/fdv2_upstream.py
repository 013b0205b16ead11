"""Builders of what LaunchDarkly sends by FDv2: events of a stream, and bodies of polls."""

from __future__ import annotations

import json
from collections.abc import Iterable

from relay.protocol import sse

Key = tuple[str, str]
"""Kind and key of an item."""


def event(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode()


def state(payload: str, version: int) -> str:
    """The name that LaunchDarkly gives to a version of a payload."""
    return f"(p:{payload}:{version})"


def intent(payload: str, version: int, code: str, reason: str = "stale") -> bytes:
    members = {"id": payload, "target": version, "intentCode": code, "reason": reason}
    return _event("server-intent", payloads=[members])


def objects(payload: str, version: int, *items: dict) -> bytes:
    """The puts of flags and segments; segments have `included`."""
    del payload
    kinds = ["segment" if "included" in item else "flag" for item in items]
    puts = (
        _event("put-object", version=version, kind=kind, key=item["key"], object=item)
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
