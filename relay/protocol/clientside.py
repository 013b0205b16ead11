"""Messages of client-side streams: pings, and evaluated flags (streams 2.2, sdk-behaviour 11.3).

An evaluated stream begins with a `put`, whose data is the body of an evalx response and replaces
all flags of the SDK. SDKs accept a `patch` or `delete` only if its `version` is greater than
theirs. So `version` is a version of the data, which grows with each change; `flagVersion`, which
events report, is the version of the flag.
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from relay.protocol.sse import encode

PING = encode(b"ping", b" ")
"""Announces a change. Its data is a blank, because SDKs drop messages without data."""

_VERSION = b',"version":'


def put(flags: bytes) -> bytes:
    """Return a message with all flags: the complete body of an evalx response."""
    return encode(b"put", flags)


def changes(before: Mapping[str, bytes], after: Mapping[str, bytes], version: int) -> bytes:
    """Return the messages for the difference between two sets of evalx entries.

    Args:
        before: entries by flag key; missing keys are not visible to the SDK.
        after: entries by flag key. Equal entries need no message.
        version: version of the data, greater than in all earlier messages.
    """
    messages = [
        _patch(key, entry, version) for key, entry in after.items() if before.get(key) != entry
    ]
    messages += [_delete(key, version) for key in before if key not in after]
    return b"".join(messages)


def _patch(key: str, entry: bytes, version: int) -> bytes:
    # The last match is the entry's own member: it is followed neither by objects with a version
    # nor by unescaped text of upstream (endpoints 1.5).
    value, _, rest = entry.rpartition(_VERSION)
    versions = b',"version":%d,"flagVersion":' % version
    return encode(b"patch", b'{"key":', orjson.dumps(key), b",", value[1:], versions, rest)


def _delete(key: str, version: int) -> bytes:
    return encode(b"delete", b'{"key":', orjson.dumps(key), b',"version":%d}' % version)
