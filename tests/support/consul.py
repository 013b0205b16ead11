"""Consul for tests: an emulation of its key-value and transaction API, and the real one.

**The emulation is the tests' own**, because no package registry has Consul: an HTTP server with
modification indexes, compare-and-set, transactions with their limits, access tokens and TLS. Its
answers were compared with those of Consul 1.14. If a binary `consul` is on the path, `ConsulAgent`
runs it, and the contract of all stores is tested with that, too.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import signal
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from aiohttp import web

from relay.config.schema import Consul as ConsulOptions
from relay.stores.consul.connect import connect
from relay.stores.consul.store import ConsulStore
from tests.support.process import free_port

GOLDEN = Path(__file__).parent.parent / "golden" / "consul.json"

MAX_OPERATIONS = 64
"""Operations in a transaction, as in older versions of Consul; 1.14 accepts 128."""

MAX_SIZE = 512 * 1024
"""Default of `kv_max_value_size` and `txn_max_req_len`."""

ANONYMOUS = "00000000-0000-0000-0000-000000000002"
_LIMIT = "Request body({} bytes) too large, max size: {} bytes. See https://developer.hashicorp.com"
_LIMIT += "/docs/agent/config/config-files#{}."
START_LIMIT = 30.0
"""Seconds until a real agent must have a leader."""


def recordings() -> dict[str, Any]:
    """Recordings of ld-relay with Consul, by name of the scene."""
    recorded: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))["recordings"]
    return recorded


def store_in(
    address: str, prefix: str = "p", environ: Mapping[str, str] | None = None, **options: Any
) -> ConsulStore:
    """Return a store in the server at an address."""
    given = ConsulOptions(host=address, **options)
    return ConsulStore(connect(given, environ or {}), prefix, given.max_value_size)


class Asked(NamedTuple):
    """A request: method, path with query, token, body of JSON or bytes, and status of the answer."""

    method: str
    path: str
    token: str
    body: Any
    status: int


class _Stored(NamedTuple):
    value: bytes
    created: int
    modified: int


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class ConsulServer:
    """The emulation. Entered it listens, left it does not.

    Args:
        tls: to serve HTTPS.
        socket: path of a Unix socket to listen on, in place of a port.
        path: path below which everything lies.
        policies: for each token the prefixes that it may read and write; None for no access control.
        namespace: namespace in which the keys are; requests for others are refused.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        socket: Path | None = None,
        path: str = "",
        policies: dict[str, tuple[str, ...]] | None = None,
        namespace: str = "",
    ) -> None:
        self.port = 0
        self.values: dict[str, bytes] = {}
        """Content; assign to it to write as somebody else."""
        self.asked: list[Asked] = []
        self.policies = policies
        self.failure: tuple[int, str] | None = None
        """Answer to every request; None to answer properly."""
        self.before_write: Callable[[], None] | None = None
        """Called once, before the next write is carried out."""
        self.max_size = MAX_SIZE
        self._answering = asyncio.Event()
        self._answering.set()
        self._tls, self._socket, self._path, self._namespace = tls, socket, path, namespace
        self._indexes: dict[str, _Stored] = {}
        self._index = 0
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> str:
        if self._socket:
            return f"unix://{self._socket}"
        scheme = "https://" if self._tls else ""
        return f"{scheme}localhost:{self.port}{self._path}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; after `stop` on the same port, with the same content."""
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", self._path + "/v1/txn", self._answer)
        app.router.add_route("*", self._path + "/v1/kv/{key:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site: web.BaseSite
        if self._socket:
            site = web.UnixSite(self._runner, str(self._socket))
        else:
            site = web.TCPSite(self._runner, "localhost", self.port, ssl_context=self._tls)
        await site.start()
        if not self._socket:
            assert site._server
            self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    async def stop(self) -> None:
        """Close all connections, and refuse new ones."""
        self.go_on()
        if self._runner:
            await self._runner.cleanup()

    def pause(self) -> None:
        """Accept connections, and answer nothing."""
        self._answering.clear()

    def go_on(self) -> None:
        self._answering.set()

    def item(self, key: str) -> dict[str, Any]:
        """Return the JSON at a key; empty without one."""
        stored: dict[str, Any] = json.loads(self.values.get(key) or b"{}")
        return stored

    def writes(self) -> list[list[tuple[str, str]]]:
        """Return the verbs and keys of each transaction that was carried out and wrote."""
        written = []
        for each in self.asked:
            if (
                each.path.startswith(f"{self._path}/v1/txn")
                and each.status == web.HTTPOk.status_code
            ):
                operations = [(op["KV"]["Verb"], op["KV"]["Key"]) for op in each.body]
                if any(not verb.startswith("get") for verb, _ in operations):
                    written.append(operations)
        return written

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        await self._answering.wait()
        try:
            status, answer = self._carry_out(request, body)
        except _Refused as e:
            status, answer = e.status, e.text
        is_json = request.path.endswith("/v1/txn") and body.startswith(b"[")
        given = json.loads(body) if is_json else body
        token = request.headers.get("X-Consul-Token", "")
        self.asked.append(Asked(request.method, request.raw_path, token, given, status))
        if isinstance(answer, str):
            return web.Response(status=status, text=answer)
        return web.json_response(answer, status=status)

    def _carry_out(self, request: web.Request, body: bytes) -> tuple[int, Any]:
        if self.failure is not None:
            raise _Refused(*self.failure)
        if request.query.get("ns", "") != self._namespace:
            raise _Refused(400, 'Invalid query parameter: "ns" - unknown namespace')
        token = request.headers.get("X-Consul-Token", "")
        if self.policies is not None and token and token not in self.policies:
            raise _Refused(403, "ACL not found")
        self._notice_foreign_writes()
        if request.path.endswith("/v1/txn"):
            return self._transact(json.loads(body), body, token)
        key = request.match_info["key"]
        if request.method == "PUT":
            return self._put(request, key, body, token)
        if request.method == "DELETE":
            return self._delete(request, key, token)
        return self._get(request, key, token)

    def _notice_foreign_writes(self) -> None:
        """Give an index to what tests have written into `values` themselves."""
        for key in self._indexes.keys() - self.values.keys():
            self._index += 1
            del self._indexes[key]
        for key, value in self.values.items():
            known = self._indexes.get(key)
            if known is None or known.value != value:
                self._index += 1
                self._set(key, value)

    def _set(self, key: str, value: bytes) -> None:
        known = self._indexes.get(key)
        created = known.created if known else self._index
        self._indexes[key] = _Stored(value, created, self._index)
        self.values[key] = value

    def _remove(self, key: str) -> None:
        self._indexes.pop(key, None)
        self.values.pop(key, None)

    def _may(self, token: str, key: str) -> bool:
        return self.policies is None or any(map(key.startswith, self.policies.get(token, ())))

    def _denial(self, token: str, right: str, key: str) -> str:
        accessor = ANONYMOUS if not token else f"accessor-of-{len(token)}-characters"
        right = f"'key:{right}'"
        return f"Permission denied: token with AccessorID '{accessor}' lacks permission {right} on \"{key}\""

    def _pair(self, key: str, *, with_value: bool = True) -> dict[str, Any]:
        stored = self._indexes[key]
        encoded = base64.b64encode(stored.value).decode() if stored.value and with_value else None
        return {
            "LockIndex": 0,
            "Key": key,
            "Flags": 0,
            "Value": encoded,
            "CreateIndex": stored.created,
            "ModifyIndex": stored.modified,
        }

    def _below(self, prefix: str, token: str) -> list[str]:
        return sorted(k for k in self._indexes if k.startswith(prefix) and self._may(token, k))

    def _get(self, request: web.Request, key: str, token: str) -> tuple[int, Any]:
        if "keys" in request.query or "recurse" in request.query:
            found = self._below(key, token)
            if not found:
                return 404, ""
            return 200, found if "keys" in request.query else [self._pair(each) for each in found]
        if not self._may(token, key):
            raise _Refused(403, self._denial(token, "read", key))
        return (200, [self._pair(key)]) if key in self._indexes else (404, "")

    def _put(self, request: web.Request, key: str, body: bytes, token: str) -> tuple[int, Any]:
        if len(body) > self.max_size:
            raise _Refused(413, _LIMIT.format(len(body), self.max_size, "kv_max_value_size"))
        if not self._may(token, key):
            raise _Refused(403, self._denial(token, "write", key))
        self._interrupt()
        stored = self._indexes.get(key)
        wanted = request.query.get("cas")
        if wanted is not None and int(wanted) != (stored.modified if stored else 0):
            return 200, False
        self._index += 1
        self._set(key, body)
        return 200, True

    def _delete(self, request: web.Request, key: str, token: str) -> tuple[int, Any]:
        for each in self._below(key, token) if "recurse" in request.query else [key]:
            self._index += 1
            self._remove(each)
        return 200, True

    def _transact(self, members: list[Any], body: bytes, token: str) -> tuple[int, Any]:
        if len(body) > self.max_size:
            raise _Refused(413, _LIMIT.format(len(body), self.max_size, "txn_max_req_len"))
        if len(members) > MAX_OPERATIONS:
            text = f"Transaction contains too many operations ({len(members)} > {MAX_OPERATIONS})"
            raise _Refused(413, text)
        operations = [member["KV"] for member in members]
        if any(not op["Verb"].startswith("get") for op in operations):
            self._interrupt()
        if any(op.get("Namespace", "") != self._namespace for op in operations):
            raise _Refused(400, "unknown namespace")
        before, index = dict(self._indexes), self._index
        self._index += 1
        results: list[dict[str, Any]] = []
        errors = []
        for number, operation in enumerate(operations):
            try:
                results += [{"KV": pair} for pair in self._operate(operation, token)]
            except ValueError as e:
                errors.append({"OpIndex": number, "What": str(e)})
        if errors:
            self._indexes, self._index = before, index
            self.values = {key: stored.value for key, stored in before.items()}
            return 409, {"Results": None, "Errors": errors}
        return 200, {"Results": results, "Errors": None}

    def _operate(self, operation: dict[str, Any], token: str) -> list[dict[str, Any]]:
        """Carry out one operation; raises ValueError in Consul's words."""
        verb, key = operation["Verb"], operation["Key"]
        if verb == "get-tree":
            return [self._pair(each) for each in self._below(key, token)]
        stored = self._indexes.get(key)
        if verb == "get":
            if stored is None:
                raise ValueError(f'key "{key}" doesn\'t exist')
            return [self._pair(key)] if self._may(token, key) else []
        if not self._may(token, key):
            raise ValueError(self._denial(token, "write", key))
        if verb == "delete":
            self._remove(key)
            return []
        if verb == "cas" and operation.get("Index", 0) != (stored.modified if stored else 0):
            raise ValueError(f'failed to set key "{key}", index is stale')
        assert verb in ("set", "cas"), verb
        self._set(key, base64.b64decode(operation.get("Value") or ""))
        return [self._pair(key, with_value=False)]

    def _interrupt(self) -> None:
        """Let another writer come just before a write."""
        interrupt, self.before_write = self.before_write, None
        if interrupt is not None:
            interrupt()
            self._notice_foreign_writes()


class ConsulAgent:
    """A real agent, in development mode and in memory; entered it runs."""

    binary = shutil.which("consul")

    def __init__(self) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        assert self.binary
        ports = {name: free_port() for name in ("server", "serf_lan", "serf_wan")}
        ports |= {"http": self.port, "dns": -1, "grpc": -1, "grpc_tls": -1}
        settings = ", ".join(f"{name} = {port}" for name, port in ports.items())
        command = [self.binary, "agent", "-dev", "-bind", "127.0.0.1"]
        self._process = subprocess.Popen(
            [*command, "-hcl", f"ports = {{ {settings} }}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_LIMIT
        while True:
            with suppress(OSError):
                self.empty()
                return self
            assert time.monotonic() < deadline, "the agent does not start"
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        assert self._process
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def empty(self) -> None:
        """Delete all keys."""
        url = f"http://{self.address}/v1/kv/?recurse"
        with urllib.request.urlopen(urllib.request.Request(url, method="DELETE")) as answer:
            assert answer.status == web.HTTPOk.status_code
