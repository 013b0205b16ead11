"""Builders of what LaunchDarkly sends."""

from __future__ import annotations

import json


def flag(key: str = "lamp", version: int = 1, value: object = True, **members: object) -> dict:
    """A flag that is on and has one value for everybody."""
    return {
        "key": key,
        "version": version,
        "on": True,
        "variations": [value, None],
        "fallthrough": {"variation": 0},
        "offVariation": 1,
        "salt": key,
        **members,
    }


def segment(key: str = "crowd", version: int = 1, **members: object) -> dict:
    """A segment without anybody in it."""
    return {
        "key": key,
        "version": version,
        "included": [],
        "excluded": [],
        "rules": [],
        "salt": key,
        **members,
    }


def all_data(*items: dict) -> str:
    """The text of a data set: `{"flags":{…},"segments":{…}}`; segments have `included`."""
    data: dict[str, dict] = {"flags": {}, "segments": {}}
    for item in items:
        data["segments" if "included" in item else "flags"][item["key"]] = item
    return json.dumps(data)


def put(data: str) -> bytes:
    """The put message of a data set."""
    return f'event: put\ndata: {{"path":"/","data":{data}}}\n\n'.encode()


def patch(item: dict) -> bytes:
    """The patch message of a flag or segment."""
    kind = "segments" if "included" in item else "flags"
    message = {"path": f"/{kind}/{item['key']}", "data": item}
    return f"event: patch\ndata: {json.dumps(message)}\n\n".encode()


def delete(path: str, version: int) -> bytes:
    """The message that deletes what `path` names, such as `/flags/lamp`."""
    return f"event: delete\ndata: {json.dumps({'path': path, 'version': version})}\n\n".encode()
