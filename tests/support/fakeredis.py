"""A Redis in memory, with the commands that fleets use, and a network that delivers late.

`tests/fleet/test_database.py` compares it with a real server.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from random import Random
from typing import Any, TypeVar

from relay.errors import StoreUnavailable

T = TypeVar("T")

Command = Sequence[str | bytes]


class Stream:
    """Entries up to a length; copies share them."""

    def __init__(self, entries: list[tuple[bytes, list[bytes]]], length: int) -> None:
        self.entries = entries
        self.length = length

    def __iter__(self) -> Any:
        return iter(self.entries[: self.length])

    @property
    def last(self) -> tuple[bytes, list[bytes]] | None:
        return self.entries[self.length - 1] if self.length else None

    def with_entry(self, place: bytes, pairs: list[bytes]) -> Stream:
        entries = self.entries[: self.length] if len(self.entries) > self.length else self.entries
        entries.append((place, pairs))
        return Stream(entries, self.length + 1)


class Refused(Exception):
    """A command that the server refuses."""


class Session:
    """A connection, as the server sees it."""

    def __init__(self) -> None:
        self.watched: dict[bytes, int] = {}
        self.queued: list[list[bytes]] | None = None


class FakeServer:
    """State of a server and its commands.

    Args:
        now: returns its clock.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.values: dict[bytes, Any] = {}
        self.expiries: dict[bytes, float] = {}
        self._touched: dict[bytes, int] = {}
        self._count = 0
        self._last_place = (0, 0)
        self.on_entry: Callable[[], None] = lambda: None
        """Called when an entry was added to a stream."""
        self.history: deque[tuple[float, dict[bytes, Any], dict[bytes, float]]] = deque(maxlen=200)
        """States after writes, with their times."""

    # Faults

    def lose_writes(self, seconds: float) -> None:
        """Go back to the state of some time ago, as after a failover."""
        until = self._now() - seconds
        values, expiries = next(
            ((v, e) for at, v, e in reversed(self.history) if at <= until), ({}, {})
        )
        self.values, self.expiries = dict(values), dict(expiries)
        self._touched = {}
        self._last_place = (0, 0)

    def wipe(self) -> None:
        for key in list(self.values):
            self._touch(key)
        self.values, self.expiries = {}, {}

    # Commands

    def execute(self, session: Session, command: Command) -> Any:  # noqa: PLR0911 - one for each
        """Execute a command of a session, or queue it."""
        words = [word.encode() if isinstance(word, str) else word for word in command]
        name = words[0].decode().upper()
        if session.queued is not None and name not in ("EXEC", "DISCARD", "MULTI"):
            session.queued.append(words)
            return b"QUEUED"
        match name:
            case "WATCH":
                self._expire()
                session.watched |= {key: self._touched.get(key, 0) for key in words[1:]}
                return b"OK"
            case "UNWATCH":
                session.watched = {}
                return b"OK"
            case "MULTI":
                session.queued = []
                return b"OK"
            case "DISCARD":
                session.queued, session.watched = None, {}
                return b"OK"
            case "EXEC":
                return self._exec(session)
            case _:
                reply = self._run(words)
                self._remember()
                return reply

    def _exec(self, session: Session) -> list[Any] | None:
        queued, session.queued = session.queued or [], None
        watched, session.watched = session.watched, {}
        self._expire()
        if any(self._touched.get(key, 0) != count for key, count in watched.items()):
            return None
        replies = [self._run(words) for words in queued]
        self._remember()
        return replies

    def _remember(self) -> None:
        self.history.append((self._now(), dict(self.values), dict(self.expiries)))

    def _run(self, words: list[bytes]) -> Any:
        self._expire()
        name, *arguments = words
        return getattr(self, f"_{name.decode().lower()}")(*arguments)

    def _expire(self) -> None:
        if self.expiries:
            now = self._now()
            for key in [key for key, at in self.expiries.items() if at <= now]:
                self._delete(key)

    def _delete(self, key: bytes) -> bool:
        self.expiries.pop(key, None)
        if self.values.pop(key, None) is None:
            return False
        self._touch(key)
        return True

    def _touch(self, key: bytes) -> None:
        self._count += 1
        self._touched[key] = self._count

    def _get(self, key: bytes) -> bytes | None:
        return self.values.get(key)

    def _mget(self, *keys: bytes) -> list[bytes | None]:
        return [self.values.get(key) for key in keys]

    def _set(self, key: bytes, value: bytes, *options: bytes) -> bytes:
        self.expiries.pop(key, None)
        self.values[key] = value
        self._touch(key)
        if options:
            self.expiries[key] = self._now() + int(options[1]) / 1000
        return b"OK"

    def _del(self, *keys: bytes) -> int:
        return sum(map(self._delete, keys))

    def _exists(self, *keys: bytes) -> int:
        return sum(key in self.values for key in keys)

    def _pexpire(self, key: bytes, milliseconds: bytes) -> int:
        if key not in self.values:
            return 0
        self.expiries[key] = self._now() + int(milliseconds) / 1000
        self._touch(key)
        return 1

    def _hset(self, key: bytes, *pairs: bytes) -> int:
        before = self.values.get(key, {})
        self.values[key] = before | dict(zip(pairs[::2], pairs[1::2], strict=True))
        self._touch(key)
        return len(self.values[key]) - len(before)

    def _hgetall(self, key: bytes) -> list[bytes]:
        return [word for pair in self.values.get(key, {}).items() for word in pair]

    def _hget(self, key: bytes, field: bytes) -> bytes | None:
        value: bytes | None = self.values.get(key, {}).get(field)
        return value

    def _hlen(self, key: bytes) -> int:
        return len(self.values.get(key, {}))

    def _hdel(self, key: bytes, *fields: bytes) -> int:
        before = self.values.get(key, {})
        after = {field: value for field, value in before.items() if field not in fields}
        if not after:
            self._delete(key)
        elif len(after) < len(before):
            self.values[key] = after
            self._touch(key)
        return len(before) - len(after)

    def _info(self, section: bytes) -> bytes:
        return b"maxmemory:0\r\nmaxmemory_policy:noeviction\r\n"

    def _xadd(self, key: bytes, *words: bytes) -> bytes:
        pairs = list(words[words.index(b"*") + 1 :])
        place = max((int(self._now() * 1000), 0), (self._last_place[0], self._last_place[1] + 1))
        self._last_place = place
        name = f"{place[0]}-{place[1]}".encode()
        self.values[key] = self.values.get(key, Stream([], 0)).with_entry(name, pairs)
        self._touch(key)
        self.on_entry()
        return name

    def _xrevrange(self, key: bytes, *_: bytes) -> list[Any]:
        last = self.values[key].last if key in self.values else None
        return [] if last is None else [[last[0], last[1]]]

    def _xread(self, *words: bytes) -> list[Any] | None:
        """Return what there is; who waits asks again."""
        key, place = words[-2:]
        after = _order(place)
        found = []
        for name, pairs in reversed(list(self.values.get(key, ()))):
            if _order(name) <= after:
                break
            found.append([name, pairs])
        return [[key, found[::-1]]] if found else None


def _order(place: bytes) -> tuple[int, int]:
    first, _, second = place.partition(b"-")
    return int(first), int(second or 0)


class Link:
    """The network between a process and the server."""

    def __init__(self) -> None:
        self.held: list[Callable[[], None]] | None = None
        """Deliveries that wait for the end of a cut; None without one."""
        self.is_reset = False
        """True if nothing arrives, and the sender learns that."""
        self.delay = (0.0002, 0.002)
        self.answer_delay = (0.0002, 0.002)
        self.detour = 0.0
        """Seconds that the next addition to a stream takes, while everything else flows."""
        self.hash_detour = 0.0
        """Seconds that the next transaction with hashes, but without a stream, takes."""
        self.before_send: Callable[[], None] = lambda: None
        self.before_answer: Callable[[], None] = lambda: None


class FakeRedis:
    """A server that processes reach over links; the world's callbacks deliver.

    Args:
        after: does something in some seconds of the world.
        now: returns the time of the world.
        random: draws delays.
    """

    def __init__(
        self, after: Callable[..., None], now: Callable[[], float], random: Random
    ) -> None:
        self.server = FakeServer(now)
        self.server.on_entry = self._wake
        self._after = after
        self._random = random
        self.epoch = 0
        """Grows when all connections end."""
        self.is_down = False
        self.is_closed = False
        self._hung: list[Callable[[], None]] | None = None
        self._readers: list[Callable[[], bool]] = []
        self.before: Callable[[], Any] = lambda: None
        self.checked: Callable[[Any], None] = lambda before: None
        """Called around each batch of commands."""

    def _wake(self) -> None:
        self._after(0.0, self._serve_readers)

    def _serve_readers(self) -> None:
        self._readers = [each for each in self._readers if not each()]

    def crash(self) -> None:
        self.is_down = True
        self.epoch += 1
        self._readers.clear()

    def start(self) -> None:
        self.is_down = False

    def hang(self) -> None:
        self._hung = []

    def go_on(self) -> None:
        held, self._hung = self._hung or [], None
        for each in held:
            self._after(self._random.uniform(0, 0.01), each)

    def send(
        self, link: Link, session: Session, epoch: int, commands: Sequence[Command]
    ) -> asyncio.Future[Any]:
        """Let commands travel; the future has the replies, or an error."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.is_closed:
            future.set_exception(StoreUnavailable("the world has ended"))
            return future
        link.before_send()

        def arrive() -> None:
            if self._hung is not None and not self.is_down:
                self._hung.append(arrive)
                return
            if self.is_down or epoch != self.epoch:
                self._answer(link, future, StoreUnavailable("the server is down"))
                return
            before = self.before()
            replies = [self.server.execute(session, command) for command in commands]
            self.checked(before)
            if replies[-1] is None and commands[-1][0] == "XREAD":
                self._block(link, future, epoch, commands[-1])
            else:
                self._answer(link, future, replies)

        delay, names = link.delay, {command[0] for command in commands}
        if link.detour and "XADD" in names:
            delay, link.detour = (link.detour, link.detour), 0.0
        elif link.hash_detour and names >= {"HSET", "EXEC"} and "XADD" not in names:
            delay, link.hash_detour = (link.hash_detour, link.hash_detour), 0.0
        self._travel(link, delay, arrive, future)
        return future

    def _block(self, link: Link, future: asyncio.Future[Any], epoch: int, command: Command) -> None:
        words = [word.encode() if isinstance(word, str) else word for word in command]

        def served() -> bool:
            if future.done() or epoch != self.epoch:
                return True
            found = self.server._run(words)
            if found is None:
                return False
            self._answer(link, future, [found])
            return True

        def over() -> None:
            if served in self._readers:
                self._readers.remove(served)
                self._answer(link, future, [None])

        self._readers.append(served)
        wait = int(command[command.index("BLOCK") + 1]) / 1000
        self._after(wait, over)

    def _answer(self, link: Link, future: asyncio.Future[Any], replies: Any) -> None:
        def arrive() -> None:
            if future.done():
                return
            link.before_answer()
            if isinstance(replies, Exception):
                future.set_exception(replies)
            else:
                future.set_result(replies)

        self._travel(link, link.answer_delay, arrive, future)

    def _travel(
        self,
        link: Link,
        delay: tuple[float, float],
        arrive: Callable[[], None],
        future: asyncio.Future[Any],
    ) -> None:
        def reach() -> None:
            if link.is_reset:
                if not future.done():
                    future.set_exception(StoreUnavailable("the network is cut"))
            elif link.held is not None:
                link.held.append(arrive)
            else:
                arrive()

        self._after(self._random.uniform(*delay), reach)

    def heal(self, link: Link) -> None:
        """End a cut; what was on its way arrives now, though nobody may wait for it."""
        held, link.held, link.is_reset = link.held or [], None, False
        for each in held:
            self._after(self._random.uniform(0, 0.05), each)


class FakeConnection:
    def __init__(self, redis: FakeRedis, link: Link, limit: float) -> None:
        self._redis = redis
        self._link = link
        self._limit = limit
        self._session = Session()
        self._epoch = redis.epoch

    async def execute_all(self, commands: Sequence[Command]) -> list[Any]:
        try:
            async with asyncio.timeout(self._limit):
                future = self._redis.send(self._link, self._session, self._epoch, commands)
                replies: list[Any] = await future
                return replies
        except TimeoutError as e:
            raise StoreUnavailable("no answer in time") from e

    async def transaction(self, commands: Iterable[Command]) -> list[Any] | None:
        *_, done = await self.execute_all([("MULTI",), *commands, ("EXEC",)])
        replies: list[Any] | None = done
        return replies


class FakeDatabase:
    """Access of one process to the server.

    Args:
        redis: the server; or returns that of a key, in a cluster.
        link: of the process.
        limit: seconds for each batch of commands.
    """

    def __init__(
        self, redis: FakeRedis | Callable[[str], FakeRedis], link: Link, limit: float
    ) -> None:
        self._redis = redis
        self._link = link
        self._limit = limit

    async def run(self, key: str, work: Callable[[FakeConnection], Awaitable[T]]) -> T:
        redis = self._redis if isinstance(self._redis, FakeRedis) else self._redis(key)
        return await work(FakeConnection(redis, self._link, self._limit))

    def join(self, user: object) -> None:
        pass

    async def leave(self, user: object) -> None:
        pass
