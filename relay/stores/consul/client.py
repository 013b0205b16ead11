"""Requests to Consul's HTTP API: transactions, large values, and what Consul says of them.

aiohttp's exceptions are translated here. No error contains the token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from urllib.parse import quote

import msgspec
from yarl import URL

from relay.errors import StoreUnavailable, UpstreamUnavailable
from relay.imports import system_authorities_skipped
from relay.reasons import shorten
from relay.stores.consul.connect import Connection
from relay.stores.consul.layout import Failure, Operation, Reply, Write, encode, reply_of
from relay.upstream import READ_BUFFER, read_body, reason_of

with system_authorities_skipped():
    import aiohttp

CONNECT_TIMEOUT = 5.0
"""Seconds for establishing a connection."""

READ_TIMEOUT = 10.0
"""Seconds of silence after which an answer does not come any more."""

REQUEST_TIMEOUT = 60.0
"""Seconds for a whole request: enough for 100 MB on a slow link, and an end to a mere trickle."""

_STALE = Failure(reason="index is stale")
_DECISIVE = (HTTPStatus.OK, HTTPStatus.CONFLICT)
"""Statuses of replies to transactions: carried out, or not."""


class ConsulClient:
    """Client of one store. The first request creates the session, in its event loop.

    Args:
        connection: how the server is reached.
        prefix: prefix of the keys, for advice on permissions.
    """

    def __init__(self, connection: Connection, prefix: str) -> None:
        self._connection = connection
        self._prefix = prefix
        self._session: aiohttp.ClientSession | None = None
        self.scope = connection.scope

    def __repr__(self) -> str:
        return f"<ConsulClient {self._connection.address}>"

    async def transact(self, operations: Sequence[Operation]) -> Reply:
        """Carry out a few operations together.

        Raises:
            StoreUnavailable: there is no reply, or it is an error.
        """
        return await self._transact(encode(operations, self.scope))

    async def carry_out(self, write: Write) -> Sequence[Failure]:
        """Carry out a write; return the reasons for which nothing was done, if any.

        Raises:
            StoreUnavailable: there is no reply, or it is an error.
        """
        if write.body is not None:
            return (await self._transact(write.body)).failures or ()
        [operation] = write.operations
        query = {"cas": str(operation.index)} if operation.verb == "cas" else {}
        path = f"/v1/kv/{quote(operation.key)}"
        _, answer = await self._request(path, operation.value or b"", query, (HTTPStatus.OK,))
        return () if answer.strip() == b"true" else (_STALE,)

    def refusal(self, reason: str) -> StoreUnavailable:
        """Return the error for what Consul says, with advice."""
        advice = self._advice(reason)
        return StoreUnavailable(shorten(reason) + (f" ({advice})" if advice else ""))

    async def aclose(self) -> None:
        """Close all connections. A later request would create a new session."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _transact(self, body: bytes) -> Reply:
        _, answer = await self._request("/v1/txn", body, {}, _DECISIVE)
        with translated():
            return reply_of(answer)

    async def _request(
        self, path: str, body: bytes, query: dict[str, str], statuses: Sequence[int]
    ) -> tuple[int, bytes]:
        token = await self._connection.token.current()
        headers = {"X-Consul-Token": token} if token else {}
        scope = {"ns": self.scope.namespace, "partition": self.scope.partition}
        query = {name: value for name, value in (query | scope).items() if value}
        url = URL(f"{self._connection.url}{path}", encoded=True).with_query(query)
        with translated():
            async with self._get_session().put(
                url,
                data=body,
                headers={"Accept-Encoding": "identity", **headers},
                allow_redirects=False,
                ssl=self._connection.tls or True,
                server_hostname=self._connection.server_name,
            ) as response:
                status, answer = response.status, await read_body(response)
        if status not in statuses:
            text = answer.decode(errors="replace").strip()
            raise self.refusal(f"the server answers {status}: {text or response.reason}")
        return status, answer

    def _advice(self, reason: str) -> str:
        token, policy = self._connection.token.place, f'key_prefix "{self._prefix}/"'
        for words, advice in (
            ("ACL not found", f"Consul does not know {token}: it was deleted, or has expired"),
            ("Permission denied", f'{token} needs a policy with {policy} {{ policy = "write" }}'),
            ("No cluster leader", "Consul's servers cannot elect a leader; a majority must be up"),
            ("kv_max_value_size", "[Consul] maxValueSize is larger than the server's limit"),
            ("txn_max_req_len", "the server's limit must be 512 KiB at least, its default"),
        ):
            if words in reason:
                return advice
        return ""

    def _get_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            socket = self._connection.socket
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(socket) if socket else aiohttp.TCPConnector(),
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=READ_BUFFER,
                timeout=aiohttp.ClientTimeout(
                    total=REQUEST_TIMEOUT, connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT
                ),
                trust_env=False,
            )
        return self._session


@contextmanager
def translated() -> Iterator[None]:
    """Translate what libraries raise within the context into `StoreUnavailable`."""
    try:
        yield
    except msgspec.MsgspecError as e:
        raise StoreUnavailable("the answer is not one of Consul's") from e
    except UpstreamUnavailable as e:
        raise StoreUnavailable(e.reason) from e
    except (aiohttp.ClientError, OSError, ValueError) as e:
        raise StoreUnavailable(reason_of(e)) from e
