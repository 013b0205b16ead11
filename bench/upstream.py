"""A scripted stand-in for LaunchDarkly's flags and events services, in a process of its own.

Run as a program it serves `/all`, `/sdk/latest-all`, `/sdk/stream` and `/sdk/poll` of FDv2 and, for
automatic configuration, `/relay_auto_config`, as if it were `latency` seconds away, and takes
orders, one JSON object a line, on its standard input; for each it answers on its standard output:
with the CLOCK_MONOTONIC time just before sending, or with what has arrived. `Upstream` starts that
program and gives the orders.
"""

import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any
from urllib.parse import unquote

from bench import data
from bench.machine import LOAD_CORE, ROOT, Closing, pinned
from bench.mailbox import BACKLOG, Arrived, Mailbox

AUTO_CONFIG_KEY = "rel-bench"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
POLLED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b"
)
MEMBERS = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n["
BIG_SEGMENTS = ("/sdk/big-segments/revisions", "/big-segments")
FDV2 = ("/sdk/stream", "/sdk/poll")
PAYLOAD = "BENCH"
"""ID of the payload of each environment."""
ACCEPTED = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
UNAUTHORIZED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Upstream(Closing):
    """The running program: where it listens, and what it shall send."""

    def __init__(
        self, environments: Mapping[str, str], latency: float = 0.0, core: int = LOAD_CORE
    ) -> None:
        """Start it with a data set's name for each SDK key.

        Args:
            environments: the data sets.
            latency: seconds of each round trip, of which setting up a connection is one.
            core: where it runs; not that of its clients where it is what they wait for.
        """
        given = [json.dumps(dict(environments)), str(latency)]
        command = [sys.executable, "-m", "bench.upstream", *given]
        with pinned(core):
            self._program = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        self.url = f"http://127.0.0.1:{self._reply()}"
        self.events_url = f"http://127.0.0.1:{self._reply()}"
        """Where events go that shall be counted; refuses connections until it is opened."""

    def put(self, sdk_key: str, name: str, version: int) -> float:
        """Send a whole data set on the open streams; return the time just before sending."""
        self._order(order="put", sdk_key=sdk_key, name=name, version=version)
        return float(self._reply())

    def patch(self, sdk_key: str, version: int, marker: str, count: int = 1) -> float:
        """Send `count` patches of different flags at once, the last of them with `marker`."""
        self.start_patch(sdk_key, version, marker, count)
        return float(self._reply())

    def start_patch(self, sdk_key: str, version: int, marker: str, count: int = 1) -> None:
        """Order patches without waiting for them to be sent; `sent()` tells when they were."""
        self._order(order="patch", sdk_key=sdk_key, version=version, marker=marker, count=count)

    def change(self, sdk_key: str, flag: Mapping[str, Any]) -> float:
        """Send a patch of one flag, which new streams begin with, too.

        Returns:
            The time just before sending.
        """
        self._order(order="change", sdk_key=sdk_key, flag=flag)
        return float(self._reply())

    def alter(self, sdk_key: str, version: int) -> None:
        """Let the first flag have another version for those who connect from now on."""
        self._order(order="alter", sdk_key=sdk_key, version=version)
        self._reply()

    def transferred(self) -> int:
        """Bytes of flags that were sent so far, heads of responses included."""
        self._order(order="transferred")
        return int(self._reply())

    def environment(self, dataset: str, description: Mapping[str, Any]) -> float:
        """Add an environment, or change it, for relays that are configured automatically.

        Returns:
            The time just before sending.
        """
        self._order(order="environment", name=dataset, description=description)
        return float(self._reply())

    def sent(self) -> float:
        """The time at which what `start_patch` ordered was sent."""
        return float(self._reply())

    def open_mailbox(self, *, keep: bool = False) -> float:
        """Take events from now on; return the time. Keep them to count numbered ones."""
        self._order(order="open", keep=keep)
        return float(self._reply())

    def arrived(self, *, events: bool = False) -> Arrived:
        """Return the counts of events that came in; numbered ones only if they are asked for."""
        self._order(order="arrived", events=events)
        return Arrived(*json.loads(self._reply()))

    def asked(self) -> int:
        """Return the number of requests for flags: streams and polls that it answered."""
        self._order(order="asked")
        return int(self._reply())

    def connections(self, sdk_key: str) -> list[tuple[float, int]]:
        """Return the number of an environment's open streams, from each CLOCK_MONOTONIC time on."""
        self._order(order="connections", sdk_key=sdk_key)
        return [(since, number) for since, number in json.loads(self._reply())]

    def _order(self, **order: Any) -> None:
        assert self._program.stdin
        self._program.stdin.write(json.dumps(order) + "\n")
        self._program.stdin.flush()

    def _reply(self) -> str:
        assert self._program.stdout
        line = self._program.stdout.readline()
        if not line:
            raise RuntimeError("the scripted upstream has ended")
        return line.strip()

    def close(self) -> None:
        """End what it has begun."""
        self._program.communicate()


class Feed:
    """Content of one environment: first put, body of polls, and the open streams."""

    def __init__(self, first: bytes, everything: bytes = b"", dataset: str = "") -> None:
        self._lock = threading.Lock()
        self.dataset = dataset
        """The name of the data set that was put last."""
        self.members: list[socket.socket] = []
        """Open streams of big segments, on which nothing comes."""
        self._first = first
        self._everything = everything
        self.asked = 0
        """Streams and polls so far."""
        self.bytes = 0
        """Sent in answer to these."""
        self._altered: list[dict[str, Any]] = []
        """The first flag in the versions of its data after the first one."""
        self._changed: dict[str, Any] = {}
        """Everything with what was changed; empty before the first change."""
        self.connections: list[tuple[float, int]] = []
        """Times at which streams were opened or closed, with the number after it."""
        self._streams: list[socket.socket] = []

    def join(self, stream: socket.socket) -> None:
        """Serve a stream: response head, first put, and then what is sent, until it is closed."""
        with self._lock:
            self._begin(stream, self._opening())
        self._wait_for_end(stream)

    def _begin(self, stream: socket.socket, first: bytes) -> None:
        self.asked += 1
        self.bytes += len(OK) + len(first)
        stream.sendall(OK + first)
        self._streams.append(stream)
        self._note_connections()

    def _wait_for_end(self, stream: socket.socket) -> None:
        with suppress(OSError):
            stream.recv(1)
        with self._lock:
            self._leave(stream)

    def change(self, flag: Mapping[str, Any]) -> float:
        """Send a patch of one flag, and let new streams begin with it."""
        patch = {"path": f"/flags/{flag['key']}", "data": flag}
        with self._lock:
            self._changed = self._changed or data.everything(self.dataset)
            self._changed["flags"][flag["key"]] = flag
            return self._send(event("patch", data.compact(patch)))

    def _opening(self) -> bytes:
        if not self._changed:
            return self._first
        return event("put", data.compact({"path": "/", "data": self._changed}))

    def _note_connections(self) -> None:
        self.connections.append((time.monotonic(), len(self._streams)))

    def _leave(self, stream: socket.socket) -> None:
        if stream in self._streams:
            self._streams.remove(stream)
            self._note_connections()
        stream.close()

    def poll(self, client: socket.socket) -> None:
        """Answer a poll with what a new stream begins with."""
        self._answer(client, self._everything)

    def _answer(self, client: socket.socket, body: bytes) -> None:
        response = POLLED % (len(body), body)
        with self._lock:
            self.asked += 1
            self.bytes += len(response)
        client.sendall(response)
        client.close()

    def alter(self, version: int) -> None:
        """Let the first flag have another version."""
        altered = data.flag(data.flag_key(0), version, data.PATCH_BYTES)
        with self._lock:
            self._altered.append(altered)
            everything = self._content()
            self._first = event("put", data.compact({"path": "/", "data": everything}))
            self._everything = gzip.compress(data.compact(everything))

    def _content(self) -> dict[str, Any]:
        content = data.everything(self.dataset)
        return content | {
            "flags": content["flags"] | {each["key"]: each for each in self._altered[-1:]}
        }

    def transfer(self, client: socket.socket, basis: str, *, stream: bool) -> None:
        """Answer a client of FDv2, which has the data of a basis."""
        with self._lock:
            events = [(name, data.compact(each)) for name, each in self._transfer(basis)]
            if stream:
                self._begin(client, b"".join(event(*each) for each in events))
        if stream:
            self._wait_for_end(client)
            return
        texts = (b'{"event":"%b","data":%b}' % (name.encode(), text) for name, text in events)
        self._answer(client, gzip.compress(b'{"events":[%b]}' % b",".join(texts)))

    def _transfer(self, basis: str) -> Iterator[tuple[str, dict[str, Any]]]:
        version = 1 + len(self._altered)
        known = [f"(p:{PAYLOAD}:{number})" for number in range(1, version + 1)]
        items = [] if basis in known else list(self._content()["flags"].values())
        code = "xfer-full" if items else "none"
        if basis in known[:-1]:
            code, items = "xfer-changes", self._altered[-1:]
        intent = {"id": PAYLOAD, "target": version, "intentCode": code, "reason": "bench"}
        yield "server-intent", {"payloads": [intent]}
        if code == "none":
            return
        for item in items:
            put = {"version": version, "kind": "flag", "key": item["key"], "object": item}
            yield "put-object", put
        yield "payload-transferred", {"state": known[-1], "id": PAYLOAD, "version": version}

    def send_members(self, client: socket.socket, *, is_first: bool) -> None:
        """Answer a poll of big segments: all patches the first time, and no more after that."""
        client.sendall(MEMBERS)
        if is_first:
            for number, patch in enumerate(data.member_patches(self.dataset)):
                client.sendall((b"," if number else b"") + patch)
        client.sendall(b"]")
        client.close()

    def send(self, frames: bytes) -> float:
        """Send to every open stream; return the time just before."""
        with self._lock:
            return self._send(frames)

    def _send(self, frames: bytes) -> float:
        start = time.monotonic()
        for stream in self._streams[:]:
            try:
                stream.sendall(frames)
            except OSError:
                self._leave(stream)
        return start


@cache
def contents(name: str) -> tuple[bytes, bytes]:
    """First put and body of polls in an environment with the data set `name`."""
    return event("put", data.put(name)), gzip.compress(data.compact(data.everything(name)))


def event(name: str, body: bytes) -> bytes:
    """An event as one chunk of a chunked body."""
    frame = b"event: %s\ndata: %s\n\n" % (name.encode(), body)
    return b"%x\r\n%s\r\n" % (len(frame), frame)


def obey(feeds: dict[str, Feed], mailbox: Mailbox, order: Mapping[str, Any]) -> str:
    """Carry out one order; return the answer."""
    match order["order"]:
        case "open":
            return repr(mailbox.open(keep=order["keep"]))
        case "arrived":
            return json.dumps(mailbox.arrived(events=order["events"]))
        case "connections" | "asked" | "transferred":
            return json.dumps(count(feeds, order))
        case "environment":
            described = order["description"]
            feeds[described["sdkKey"]["value"]] = Feed(*contents(order["name"]), order["name"])
            patch = event("patch", data.environment_patch(described))
            return repr(feeds[AUTO_CONFIG_KEY].send(patch))
        case _:
            return repr(send(feeds[order["sdk_key"]], order))


def count(feeds: Mapping[str, Feed], order: Mapping[str, Any]) -> object:
    """Return what relays have asked for."""
    if order["order"] == "connections":
        return feeds[order["sdk_key"]].connections
    if order["order"] == "asked":
        return sum(feed.asked for feed in feeds.values())
    return sum(feed.bytes for feed in feeds.values())


def send(feed: Feed, order: Mapping[str, Any]) -> float:
    """Send what is ordered; return the time just before."""
    if order["order"] == "change":
        return feed.change(order["flag"])
    version = order["version"]
    if order["order"] == "alter":
        feed.alter(version)
        return time.monotonic()
    if order["order"] == "put":
        feed.dataset = order["name"]
        return feed.send(event("put", data.put(order["name"], version)))
    last = order["count"] - 1
    patches = (
        data.patch(index, version, order["marker"] if index == last else "salt")
        for index in range(order["count"])
    )
    return feed.send(b"".join(event("patch", patch) for patch in patches))


def answer(client: socket.socket, feeds: Mapping[str, Feed], latency: float) -> None:
    """Serve one connection: flags, or "accepted" for whatever else a relay sends home."""
    head = b""
    while b"\r\n\r\n" not in head:
        received = client.recv(65536)
        if not received:
            return
        head += received
    request, *lines = head.decode("latin-1").split("\r\n")
    time.sleep(2 * latency)
    path, _, query = request.split(" ")[1].partition("?")
    if path not in (*BIG_SEGMENTS, *FDV2, "/all", "/sdk/latest-all", "/relay_auto_config"):
        client.sendall(ACCEPTED)
        client.close()
        return
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    feed = feeds.get(headers.get("authorization", ""))
    if feed is None:
        client.sendall(UNAUTHORIZED)
        client.close()
        return
    if path == "/sdk/big-segments/revisions":
        feed.send_members(client, is_first="after=" not in query)
    elif path == "/big-segments":
        client.sendall(OK)
        feed.members.append(client)
    elif path == "/sdk/latest-all":
        feed.poll(client)
    elif path in FDV2:
        basis = unquote(query.partition("basis=")[2])
        feed.transfer(client, basis, stream=path == "/sdk/stream")
    else:
        feed.join(client)


def accept(listener: socket.socket, feeds: Mapping[str, Feed], latency: float) -> None:
    """Serve every connection in a thread of its own: there are few."""
    while True:
        client, _ = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=answer, args=(client, feeds, latency), daemon=True).start()


def main() -> None:
    """Serve until standard input ends."""
    given = json.loads(sys.argv[1])
    feeds = {key: Feed(*contents(name), name) for key, name in given.items()}
    listed = data.environments_put(data.environment(key, key) for key in given)
    feeds[AUTO_CONFIG_KEY] = Feed(event("put", listed))
    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    latency = float(sys.argv[2])
    threading.Thread(target=accept, args=(listener, feeds, latency), daemon=True).start()
    mailbox = Mailbox(latency)
    print(listener.getsockname()[1], mailbox.port, sep="\n", flush=True)
    for line in sys.stdin:
        print(obey(feeds, mailbox, json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
