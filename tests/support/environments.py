"""Environments as LaunchDarkly describes them to relays."""

from __future__ import annotations

import json


def description(name: str = "alpha", version: int = 1, key: int = 1, **members: object) -> dict:
    """The representation of an environment; `key` numbers its SDK key."""
    return {
        "envID": f"id-{name}",
        "envKey": name,
        "envName": name.capitalize(),
        "mobKey": f"mob-{name}-key",
        "projKey": "proj",
        "projName": "Project",
        "sdkKey": {"value": f"sdk-{name}-{key}"},
        "defaultTtl": 0,
        "secureMode": False,
        "version": version,
        **members,
    }


def environment_list(*descriptions: dict, **members: object) -> str:
    """The data of a put."""
    environments = {each["envID"]: each for each in descriptions}
    return json.dumps({"environments": environments, **members})


def put(*descriptions: dict, **members: object) -> bytes:
    """A put message."""
    data = environment_list(*descriptions, **members)
    return f'event: put\ndata: {{"path":"/","data":{data}}}\n\n'.encode()


def patch(description: dict) -> bytes:
    """A patch message."""
    message = {"path": f"/environments/{description['envID']}", "data": description}
    return f"event: patch\ndata: {json.dumps(message)}\n\n".encode()


def payload_filter(key: str, version: int = 1, project: str = "proj") -> dict:
    """The representation of a payload filter."""
    return {"projKey": project, "key": key, "version": version}


def patch_filter(identifier: str, entry: dict) -> bytes:
    """A patch message for a payload filter."""
    message = {"path": f"/filters/{identifier}", "data": entry}
    return f"event: patch\ndata: {json.dumps(message)}\n\n".encode()


def delete_filter(identifier: str, version: int) -> bytes:
    """A delete message for a payload filter."""
    message = {"path": f"/filters/{identifier}", "version": version}
    return f"event: delete\ndata: {json.dumps(message)}\n\n".encode()


def delete(name: str, version: int) -> bytes:
    """A delete message."""
    message = {"path": f"/environments/id-{name}", "version": version}
    return f"event: delete\ndata: {json.dumps(message)}\n\n".encode()
