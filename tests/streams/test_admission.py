"""Admission: who gets large data when, and what of them may be unread."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relay.streams import admission as module
from relay.streams.admission import LARGE, SETTLED, SHARE, TURN, Admission, AdmissionQueue
from relay.streams.transport import Unread

LIMIT, PATIENCE = 10 * SETTLED, 5.0
SIZES = st.integers(1, 6 * SETTLED)


class Queues(RuleBasedStateMachine):
    """Streams come, are admitted, read and leave, in any order, as time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: AdmissionQueue[int] = AdmissionQueue(LIMIT)
        self.now = 0.0
        self.number = 0
        self.waiting: list[int] = []
        self.unread: dict[int, int] = {}
        """Bytes of each admitted stream, as the queue knows them."""
        self.mark: dict[int, tuple[int, float]] = {}
        """For each, the bytes since which nothing was taken, and since when."""

    @rule(seconds=st.sampled_from([0.1, 3.0, 6.0]))
    def pass_time(self, seconds):
        self.now += seconds

    @rule()
    def arrive(self):
        self.number += 1
        self.queue.wait(self.number, self.now)
        self.waiting.append(self.number)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def arrive_again(self, data):
        self.queue.wait(data.draw(st.sampled_from(self.waiting)), self.now)

    @rule(size=SIZES)
    def admit_next(self, size):
        found = self.queue.next()
        if self.queue.is_full or not self.waiting:
            assert found is None
            return
        stream, arrived = found
        assert stream == self.waiting.pop(0)
        assert arrived <= self.now
        self._admit(stream, size)

    @rule(size=SIZES)
    def admit_at_once(self, size):
        if not self.queue.is_full:
            self.number += 1
            self._admit(self.number, size)

    def _admit(self, stream, size):
        self.queue.admit(stream, size, size, self.now)
        self.unread[stream], self.mark[stream] = size, (size, self.now)

    @precondition(lambda self: self.unread)
    @rule(data=st.data(), share=st.sampled_from([0, 0.5, 0.9, 1]))
    def look(self, data, share):
        stream = data.draw(st.sampled_from(list(self.unread)))
        unread = int(self.unread[stream] * share)
        stalls = self.queue.note(stream, unread, unread, self.now, PATIENCE)
        mark, since = self.mark[stream]
        if unread <= SETTLED:
            assert not stalls
            del self.unread[stream], self.mark[stream]
            return
        self.unread[stream] = unread
        if mark - unread >= SETTLED:
            self.mark[stream] = unread, self.now
            assert not stalls
        else:
            assert stalls == (self.now - since > PATIENCE)

    @precondition(lambda self: self.number)
    @rule(data=st.data())
    def leave(self, data):
        stream = data.draw(st.integers(1, self.number))
        self.queue.leave(stream)
        if stream in self.waiting:
            self.waiting.remove(stream)
        self.unread.pop(stream, None)

    @precondition(lambda self: self.unread)
    @rule(number=st.integers(1, 3))
    def ask_in_turn(self, number):
        asked = Counter[int]()
        for _ in range(len(self.unread)):
            asked.update(self.queue.oldest(number))
        assert set(asked) == set(self.unread)
        assert max(asked.values()) - min(asked.values()) <= 1 or number >= len(self.unread)

    @invariant()
    def unread_bytes_are_counted_and_bounded(self):
        assert self.queue.unread == sum(self.unread.values())
        assert self.queue.unread < LIMIT + 6 * SETTLED
        assert self.queue.is_full == (self.queue.unread >= LIMIT)
        assert self.queue.waiting == len(self.waiting)
        assert self.queue.admitted == len(self.unread)

    def teardown(self):
        """Whoever waits is admitted once the others have read, in order of arrival."""
        for stream in list(self.unread):
            self.queue.note(stream, 0, 0, self.now, PATIENCE)
        assert self.queue.unread == 0
        order = []
        while (found := self.queue.next()) is not None:
            order.append(found[0])
        assert order == self.waiting


TestQueues = Queues.TestCase
TestQueues.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


class Client:
    """A stream of one large message, whose client reads when the test says so."""

    def __init__(self, admission: Admission, size: int = SHARE) -> None:
        self.admission = admission
        self.size = size
        self.left = 0
        self.has_begun = False
        self.saves_memory = False
        self.was_cut = False

    def come(self) -> Client:
        if self.admission.admits:
            self.begin()
        else:
            self.admission.wait(self)
        return self

    def begin(self) -> None:
        self.has_begun, self.left = True, self.size
        self.admission.admit(self, self.size)

    def unread(self) -> Unread:
        return Unread(self.left, min(self.left, SHARE))

    def save_memory(self) -> None:
        self.saves_memory = True

    def cut(self) -> None:
        self.was_cut = True


async def until(holds) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def begun(clients: list[Client]) -> int:
    """Return how many have begun; these have come before all others."""
    number = sum(client.has_begun for client in clients)
    assert all(client.has_begun for client in clients[:number])
    return number


async def test_those_who_come_together_begin_in_turns_of_the_loop():
    """The bytes written in one turn are bounded, so that others come in between."""
    admission = Admission()
    clients = [Client(admission, TURN // 4).come() for _ in range(10)]
    assert begun(clients) == 4
    await asyncio.sleep(0)
    assert begun(clients) == 8
    await asyncio.sleep(0)
    assert begun(clients) == 10
    assert admission.waiting == 0


async def test_further_streams_wait_until_others_have_read():
    """As many begin as there is room for; the others follow in order of arrival."""
    admission = Admission(4 * SHARE)
    clients = [Client(admission).come() for _ in range(12)]
    await until(lambda: admission.unread >= 4 * SHARE)
    first = begun(clients)
    assert first < 12
    await asyncio.sleep(0.03)
    assert begun(clients) == first
    clients[0].left = 0
    await until(lambda: begun(clients) > first)
    for client in clients:
        client.left = 0
        await asyncio.sleep(0.01)
        client.left = 0
    await until(lambda: begun(clients) == 12)
    assert admission.waiting == 0


async def test_streams_save_memory_from_a_part_of_the_limit_on():
    """More of those that do not read find room then."""
    admission = Admission(16 * SHARE)
    clients = [Client(admission).come() for _ in range(6)]
    await until(lambda: begun(clients) == 6)
    assert [client.saves_memory for client in clients] == [False] * 4 + [True] * 2


async def test_those_who_go_give_up_their_place():
    """A stream that leaves while it waits is never begun; one that has begun makes room."""
    admission = Admission(1)
    first, second, third = (Client(admission).come() for _ in range(3))
    assert (first.has_begun, second.has_begun, third.has_begun) == (True, False, False)
    admission.leave(second)
    assert admission.waiting == 1
    admission.leave(first)
    await until(lambda: third.has_begun)
    assert not second.has_begun
    assert admission.waiting == 0


async def test_who_does_not_read_is_cut_once_others_wait():
    """Nobody is cut before, and nobody who reads."""
    admission = Admission(2 * SHARE, patience=0.1)
    silent, reader = Client(admission), Client(admission, 20 * SHARE)
    for each in (silent, reader):
        each.come()

    async def read() -> None:
        while True:
            reader.left -= SETTLED
            await asyncio.sleep(0.01)

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.2)
    assert admission.unread
    assert not silent.was_cut
    late = Client(admission).come()
    assert not late.has_begun
    await until(lambda: late.has_begun)
    reading.cancel()
    assert silent.was_cut
    assert not reader.was_cut
    assert admission.cut == 1


async def test_the_log_tells_beginning_and_end_of_a_long_wait(caplog, monkeypatch):
    """One line each, with numbers; a short wait is not worth a line."""
    caplog.set_level(logging.INFO, "relay.streams")
    monkeypatch.setattr(module, "NOTABLE", 0.05)
    admission = Admission(1, patience=0.2)
    first, *others = (Client(admission).come() for _ in range(3))
    admission.leave(first)
    await until(lambda: others[0].has_begun)
    assert caplog.records == []
    await until(lambda: others[1].has_begun)
    await until(lambda: len(caplog.records) == 2)
    beginning, end = (record.getMessage() for record in caplog.records)
    assert beginning.startswith("Clients have not read ")
    assert beginning.endswith(" 1 further streams wait for theirs")
    assert end.startswith("All streams that waited have got their data: 2, after ")
    assert end.endswith("; 1 others were closed because their clients did not read")


async def test_an_error_of_one_stream_stops_no_other(monkeypatch):
    """The next ones are begun all the same."""
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    admission = Admission(1)
    first, second, third = (Client(admission).come() for _ in range(3))
    monkeypatch.setattr(second, "begin", lambda: 1 / 0)
    admission.leave(first)
    await until(lambda: third.has_begun)
    assert len(errors) == 1


def test_a_message_that_is_not_large_fits_into_one_piece():
    """It is written as it is, whatever the client reads."""
    assert LARGE <= module.TURN
    assert LARGE < SHARE
