"""The texts of client-side streams: pings, and evaluated flags (streams 2.2, sdk-behaviour 11.3).

An evaluating stream begins with a `put`, which is the body of an evalx answer and replaces what the
SDK has. SDKs take a `patch` or `delete` only if its `version` is greater than what they hold, so
there it is a version of the data, which grows with each change, and `flagVersion`, which events
report, is that of the flag.
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson

PING = b"event: ping\ndata:  \n\n"
"""Something changed; the second blank is there because SDKs drop a message without data."""

_VERSION = b',"version":'


def put(flags: bytes) -> bytes:
    """Return the message that gives everything: the body of an evalx answer, whole."""
    return b"event: put\ndata: %b\n\n" % flags


def changes(before: Mapping[str, bytes], after: Mapping[str, bytes], version: int) -> bytes:
    """Return the messages that lead from some entries of an evalx answer to others.

    Args:
        before: flag key to entry; a key that is missing is not visible.
        after: likewise. Keys that are in neither, and equal entries, give no message.
        version: of the data; greater than in all messages before.
    """
    messages = [
        _patch(key, entry, version) for key, entry in after.items() if before.get(key) != entry
    ]
    messages += [_delete(key, version) for key in before if key not in after]
    return b"".join(messages)


def _patch(key: str, entry: bytes, version: int) -> bytes:
    # The last such member is the entry's own: behind it come neither objects with a version nor
    # anything unescaped of upstream's (endpoints 1.5).
    value, _, rest = entry.rpartition(_VERSION)
    return b'event: patch\ndata: {"key":%b,%b,"version":%d,"flagVersion":%b\n\n' % (
        orjson.dumps(key),
        value[1:],
        version,
        rest,
    )


def _delete(key: str, version: int) -> bytes:
    return b'event: delete\ndata: {"key":%b,"version":%d}\n\n' % (orjson.dumps(key), version)
