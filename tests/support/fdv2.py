"""SDKs of FDv2, as a server sees them: what they are strict about, and how they deviate (fdv2 13.2).

Each is stricter than any real one, so that what it takes, all take.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

Key = tuple[str, str]
"""Kind and key of an item."""

Content = Mapping[Key, Any]
"""Items that an SDK evaluates, or that a relay serves."""

_STATE = re.compile(r"[A-Za-z0-9():._~-]+")  # some SDKs send it back without escapes
_MAX_INT = 2**31 - 1
_KINDS = {"flag", "segment"}


class Client:
    """SDK that replaces what it gets, all at once, and names the newest state: as most do."""

    agent = "PythonClient/9.20.0"

    def __init__(self, instance: str = "1") -> None:
        self.instance = instance
        self.items: dict[Key, Any] = {}
        """Visible items, by kind and key."""
        self.basis = ""
        """State of the last transfer."""
        self.named = ""
        """Basis of the last request."""
        self.transfers: list[str] = []
        """Kinds of the transfers since the last request."""
        self._received = b""
        self._intent: dict[str, Any] | None = None
        self._collected: dict[Key, tuple[int, Any]] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.instance} [{self.basis}, {sorted(self.items)}]>"

    @property
    def headers(self) -> dict[bytes, bytes]:
        """Headers of its requests."""
        return {
            b"user-agent": self.agent.encode(),
            b"x-launchdarkly-instance-id": self.instance.encode(),
        }

    def stream_basis(self) -> str:
        """Begin a connection; return the state that the request names."""
        self.named = self.basis
        self._begin()
        return self.named

    def poll_basis(self) -> str:
        """Return the state that a poll names."""
        self.named = self.basis
        return self.named

    def feed(self, data: bytes) -> None:
        """Take bytes of a stream, in any pieces."""
        self._received += data
        *messages, self._received = self._received.split(b"\n\n")
        for message in messages:
            lines = [line for line in message.split(b"\n") if line != b":"]
            assert len(lines) == 2, lines  # in this order: Java reads the data as they come
            name, text = lines[0].removeprefix(b"event: "), lines[1].removeprefix(b"data: ")
            assert len(name) + len(text) == len(lines[0]) + len(lines[1]) - 13, message
            self._take(name.decode(), orjson.loads(text))

    def feed_poll(self, body: bytes) -> None:
        """Take the body of a poll, which is one transfer."""
        self._begin()
        (events,) = orjson.loads(body).values()
        for event in events:
            assert event.keys() == {"event", "data"}, event
            self._take(event["event"], event["data"])
        assert self._intent is None, "an incomplete transfer"

    def _begin(self) -> None:
        self._received, self._intent, self._collected, self.transfers = b"", None, {}, []

    def _take(self, name: str, data: dict[str, Any]) -> None:
        match name:
            case "server-intent":
                self._take_intent(data)
            case "put-object":
                assert data.keys() == {"version", "kind", "key", "object"}, data
                value = data["object"]
                assert value["version"] == data["version"], data
                self._take_item(data, value)
            case "delete-object":
                assert data.keys() == {"version", "kind", "key"}, data
                assert self._intent, data
                assert self._intent["intentCode"] == "xfer-changes", data
                self._take_item(data, None)
            case "payload-transferred":
                self._take_end(data)
            case _:
                raise AssertionError(f"Java takes it for a failure: {name}")

    def _take_intent(self, data: dict[str, Any]) -> None:
        (payload,) = data["payloads"]
        assert payload.keys() == {"id", "target", "intentCode", "reason"}, payload
        assert all(payload.values()), payload
        assert 1 <= payload["target"] <= _MAX_INT, payload
        code = payload["intentCode"]
        self.transfers.append(code)
        self._collected = {}
        if code == "none":
            assert self.named, "it has no data"
            self._intent = None
            self.up_to_date()
        else:
            assert code in ("xfer-full", "xfer-changes"), code
            self._intent = payload

    def _take_item(self, data: dict[str, Any], value: Any) -> None:
        assert self._intent, "a payload without an intent would be added to half a former one"
        key = data["kind"], data["key"]
        assert data["kind"] in _KINDS, data
        assert key not in self._collected, f"Java fails: {key} comes twice"
        assert data["version"] >= 0, data
        self._collected[key] = data["version"], value
        if self._intent["intentCode"] == "xfer-changes":
            self.item_came(key, value)

    def _take_end(self, data: dict[str, Any]) -> None:
        intent, self._intent = self._intent, None
        assert intent, "the end of nothing"
        assert data == {**data, "id": intent["id"], "version": intent["target"]}
        assert _STATE.fullmatch(data["state"]), data
        self.commit(self._collected, data["state"], full=intent["intentCode"] == "xfer-full")

    def up_to_date(self) -> None:
        """Keep everything."""

    def item_came(self, key: Key, value: Any) -> None:
        """Note an item of a transfer of changes that is not complete."""

    def commit(self, items: dict[Key, tuple[int, Any]], state: str, *, full: bool) -> None:
        """Apply a complete transfer."""
        if full:
            self.items = {}
        for key, (_, value) in items.items():
            self._put(key, value)
        self.basis = state

    def _put(self, key: Key, value: Any) -> None:
        if value is None:
            self.items.pop(key, None)
        else:
            self.items[key] = value


class Keeper(Client):
    """SDK that applies each item as it comes, and keeps it if the transfer is cut off.

    No real one does when each connection begins with an intent.
    """

    agent = "GoClient/7.14.6"

    def item_came(self, key: Key, value: Any) -> None:
        """Apply it at once."""
        self._put(key, value)


class NodeClient(Client):
    """Node's server SDK: ignores what is not newer; its streams name their first state for ever."""

    agent = "NodeJSClient/9.13.7"

    def __init__(self, instance: str = "1") -> None:
        super().__init__(instance)
        self._versions: dict[Key, int] = {}
        """Of all items that it knows, tombstones included."""
        self._stream_basis: str | None = None

    def stream_basis(self) -> str:
        """Begin a connection; return the state that the first one named."""
        self._begin()
        if self._stream_basis is None:
            self._stream_basis = self.basis
        self.named = self._stream_basis
        return self.named

    def renew_stream(self) -> None:
        """Give the stream up, as after malformed data; the next one names the newest state."""
        self._stream_basis = None

    def commit(self, items: dict[Key, tuple[int, Any]], state: str, *, full: bool) -> None:
        """Apply what is newer; ignore an empty transfer of changes with its state."""
        if full:
            self._versions = {key: version for key, (version, _) in items.items()}
            super().commit(items, state, full=True)
        elif items:
            newer = {k: i for k, i in items.items() if i[0] > self._versions.get(k, -1)}
            self._versions |= {key: version for key, (version, _) in newer.items()}
            super().commit(newer, state, full=False)
