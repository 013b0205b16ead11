"""Journal: which items recent changes have touched, for clients that come back (fdv2 13.8).

It holds no history. For each item it keeps the number of the step that touched it last, and for
each recent state of the data the step at which it was first reached. A delta from a state is the
*present* value of every item touched since, so it is right for any client that has seen at least
that state, and for one that has seen a part of what came after it.

A state is the name that upstream gives to the data, if clients get just what it sent. Else it is an
address of the content: replicas and restarted relays that hold the same items name them alike,
without talking. A state that is not known always means a transfer of everything.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import takewhile
from typing import ClassVar

import msgspec
from msgspec import Struct

from relay.model.answers import AnswerCounter, AnswerCounts
from relay.model.item import Item, Kind
from relay.model.payload import EMPTY, Change, Payload, Selector
from relay.model.text import to_base64
from relay.steps import Steps, Work

MAX_STATES = 4096
"""States that clients may come back with; an older one means a transfer of everything."""

MAX_VANISHED = 10_000
"""Items whose last version is remembered although upstream does not list them any more."""

SHARE_OF_DELTA = 2
"""Divisor: a delta is sent if it has at most half of the bytes of everything."""

MAX_ANSWERS = 64
"""Deltas remembered until the next step: clients come back with few different states."""

MAX_NUMBER = (1 << 31) - 1
"""Limit of the number of a state: some SDKs read it into 32 bits, and fail if it does not fit."""

MAX_SAVED_STATES = 1024
"""States that a restarted relay still knows: 60 KB beside the data, and the touches since."""

UNRELIABLE = "?"
"""Instead of the state that a client names, if its data may be others than those of that state."""

_MODULUS = 1 << 256

_USABLE = re.compile(r"[A-Za-z0-9().:_~-]{1,256}")
"""Names of upstream that clients can send back as they are (fdv2 13.8.5)."""

_NAMES = {kind: kind.value.encode() for kind in Kind}

_NUMBER = re.compile(r"[0-9]{1,20}")


class Full(Struct, frozen=True):
    """Answer to a client: everything.

    Args:
        reason: `payload-missing` if the client named no state, else `cant-catchup`.
        cause: of that, for those who operate the relay.
    """

    reason: str
    cause: str
    kind: ClassVar[str] = "full"

    @property
    def key(self) -> str:
        """Key by which it can be remembered until the next step."""
        return self.reason


class Delta(Struct, frozen=True):
    """Answer to a client: the items touched since its state; none if it is up to date.

    Args:
        items: present values; tombstones for those that are gone.
        since: step at which the state of the client was first reached.
    """

    items: tuple[Item, ...]
    since: int

    @property
    def kind(self) -> str:
        """`none` if the client is up to date, else `delta`."""
        return "delta" if self.items else "none"

    @property
    def cause(self) -> str:
        """Reason for the kind, as clients are told."""
        return "stale" if self.items else "up-to-date"

    @property
    def key(self) -> int:
        """Key by which it can be remembered until the next step."""
        return self.since


MISSING = Full("payload-missing", "no-state")
UNKNOWN = Full("cant-catchup", "unknown-state")
DOUBTED = Full("cant-catchup", "unreliable-state")
TOO_OLD = Full("cant-catchup", "old-state")
"""Before a barrier, or before what is remembered."""
TOO_LARGE = Full("cant-catchup", "large-delta")


class SavedJournal(Struct, frozen=True):
    """Part of a journal that is kept over a restart, together with the data.

    Args:
        step: number of changes of the data.
        floor: step from which on all touches are known.
        barrier: last step after which older clients need everything.
        states: the latest states, each with the step at which it was first reached.
        touched: keys touched since the oldest of these, by kind, each with its last step.
        vanished: kind, key and version of items that upstream has ceased to list.
        forgotten: greatest version of those that are remembered no more.
        digest: address of the content.
        versions: sum of the versions of all items.
        upstream: name that upstream gives to the data, as clients of it send it back.
        selector: the same, if it is what clients get.
        verbatim: False if something of upstream's data is held back.
    """

    step: int
    floor: int
    barrier: int
    states: list[tuple[str, int]]
    touched: dict[Kind, list[tuple[str, int]]]
    vanished: list[tuple[Kind, str, int]]
    forgotten: int
    digest: bytes
    versions: int
    upstream: str = ""
    selector: Selector | None = None
    verbatim: bool = False


class _Salted(Struct):
    salt: str | None = None


_SALT = msgspec.json.Decoder(_Salted)
_SALT_MEMBER = b'"salt":"'


class Journal:
    """Steps of one environment's data.

    Args:
        lineage: identifies the environment, and what was done to its data, such as a filter: equal
            on all replicas.
    """

    def __init__(self, lineage: str) -> None:
        self._own_id = "r" + to_base64(blake2b(lineage.encode(), digest_size=6).digest())
        self.step = 0
        """Number of changes of the data so far; 0 before there are any."""
        self.revision = 0
        """Grows with each step, and with each other name for the same data: answers that were
        encoded before are out of date."""
        self.latest: Full | Delta = MISSING
        """Answer to a client that had seen all before the last step."""
        self.answers = AnswerCounts()
        """Counts of the answers to clients."""
        self._floor = 0
        """Step from which on all touches are known."""
        self._barrier = 0
        """Last step after which a client of an older state needs everything: some item had a
        version, or a salt, that does not supersede what clients may have seen."""
        self._touched: dict[Kind, dict[str, int]] = {kind: {} for kind in Kind}
        """Last step at which each item was touched; the latest touch comes last."""
        self.barriers = 0
        """Number of such steps so far."""
        self._vanished: OrderedDict[tuple[Kind, str], int] = OrderedDict()
        """Versions of the tombstones of items that upstream has ceased to list."""
        self._forgotten = -1
        """Greatest version of those that are remembered no more."""
        self._answers: dict[int, Full | Delta] = {}
        """Answers since the last step, by the step at which the client's state was reached."""
        self._states: OrderedDict[str, int] = OrderedDict()
        """Step at which each state was first reached; the oldest first."""
        self._unnamed: dict[tuple[Kind, str], Item | None] = {}
        """Former value of each item touched since a state was named last."""
        self.naming: Work[None] | None = None
        """Work after a step that began anew: the name of its state. Whoever asks for that finishes
        the work; better, somebody does it in slices before, and calls `finish_naming` later on."""
        self.upstream = ""
        """Name that upstream gives to the data; empty if it gives none."""
        self._verbatim = False
        """True while clients get all that upstream has sent since it last sent everything."""
        self._selector: Selector | None = None
        """The same name, if clients get it, too."""
        self._digest = 0
        self._shares: dict[Kind, dict[str, int]] = {kind: {} for kind in Kind}
        """Share of each item in it, as of the last state that was named, so that each item is
        hashed once; those that are missing, as after a restart, are hashed when they change."""
        self._versions = 0
        self._payload = EMPTY

    def __repr__(self) -> str:
        touched = sum(map(len, self._touched.values()))
        return f"<Journal {self.id} [{self.step} steps, {touched} items touched]>"

    @property
    def depth(self) -> int:
        """Number of states that clients may come back with."""
        return len(self._states) + (not self.is_named)

    @property
    def is_named(self) -> bool:
        """False if `finish_naming` has something to do."""
        return not self._unnamed and self.naming is None

    @property
    def id(self) -> str:
        """Payload ID: that of upstream, or our own in characters of base64url."""
        return self._selector.id if self._selector else self._own_id

    @property
    def version(self) -> int:
        """Number of the state: from 1 to `MAX_NUMBER`, and equal for equal data."""
        if self._selector:
            return self._selector.version
        self.finish_naming()
        return self._number

    @property
    def state(self) -> str:
        """State of the data, as clients send it back: `basis` (fdv2 13.2.5)."""
        if self._selector is None:
            self.finish_naming()
        return self._state

    @property
    def client_selector(self) -> Selector | None:
        """Selector of upstream, if clients get it; else None."""
        return self._selector

    @property
    def upstream_selector(self) -> Selector | None:
        """Selector of upstream, whether or not clients get it; None if there is none."""
        if self._selector is not None:
            return self._selector
        return Selector(self.upstream, verbatim=False) if self.upstream else None

    @property
    def selector(self) -> Selector:
        """Names of the present content."""
        return Selector(self.state, self.id, self.version)

    @property
    def _state(self) -> str:
        return self._selector.state if self._selector else self._address

    @property
    def _address(self) -> str:
        """State that follows from the content."""
        digest = to_base64((self._digest % _MODULUS).to_bytes(32, "big")[:16])
        return f"(p:{self._own_id}-{digest}:{self._number})"

    @property
    def _number(self) -> int:
        return self._versions % MAX_NUMBER or MAX_NUMBER if self._versions else 1

    def record(
        self,
        payload: Payload,
        change: Change,
        *,
        full: bool = False,
        selector: Selector | None = None,
    ) -> None:
        """Record the next step.

        Args:
            payload: the data after it.
            change: the difference to the data before.
            full: True if whoever sent the items vouches for all data, not only for these.
            selector: name that upstream gives to the data after it; None for none.
        """
        before, self._payload = self._payload, payload
        self.step += 1
        self.revision += 1
        self._answers.clear()
        self._take_name(selector, full=full)
        if self.step == 1:
            self._begin(payload)
            return
        if full and change.size * SHARE_OF_DELTA > payload.size:
            self._begin_anew(payload)
            return
        items = change.items
        if change.vanished:
            items += tuple(_tombstone(item) for item in change.vanished if not item.deleted)
        if self.naming is not None:
            self.naming.run()
        is_barrier = False
        for item in items:
            known = before.all(item.kind).get(item.key)
            is_barrier = is_barrier or not self._supersedes(known, item)
            self._touch(known, item)
        if is_barrier:
            self._set_barrier()
        if change.vanished:
            for item in map(_tombstone, change.vanished):
                self._vanished[item.kind, item.key] = item.version
            self._forget_oldest()
        if self._selector:
            self._note_state(self._selector.state, self.step)
        self.latest = TOO_OLD if is_barrier else Delta(items, self.step - 1)

    def rename(self, selector: Selector | None, *, full: bool = False) -> None:
        """Note that upstream gives the same data another name, or none.

        Clients that know them by the former name are up to date.

        Args:
            selector: the new name; None for none.
            full: True if whoever gives it vouches for all data.
        """
        self.revision += 1
        self._take_name(selector, full=full)
        if self.step and (self._selector or self.is_named):
            self._note_state(self._state, self.step)

    def _take_name(self, selector: Selector | None, *, full: bool) -> None:
        self.upstream = selector.state if selector else ""
        self._verbatim = selector is not None and selector.verbatim and (full or self._verbatim)
        self._selector = selector if selector and self._verbatim and _is_usable(selector) else None

    def saved(self, payload: Payload) -> SavedJournal | None:
        """Return what a restarted relay has to know.

        Args:
            payload: the data that it is saved with.

        Returns:
            None if the journal is not of these data, or they have not been named yet.
        """
        if payload is not self._payload or not self.is_named or not self._states:
            return None
        latest = dict(list(self._states.items())[-MAX_SAVED_STATES:])
        since = next(iter(latest.values()))
        if (present := self._state) in self._states:  # it may recur, and be an old one
            latest.setdefault(present, self._states[present])
        touched = {kind: list(self._recent(kind, since))[::-1] for kind in Kind}
        vanished = [(kind, key, version) for (kind, key), version in self._vanished.items()]
        return SavedJournal(
            self.step,
            max(self._floor, since),
            self._barrier,
            list(latest.items()),
            touched,
            vanished,
            self._forgotten,
            (self._digest % _MODULUS).to_bytes(32, "big"),
            self._versions,
            self.upstream,
            self._selector,
            self._verbatim,
        )

    def restore(self, saved: SavedJournal, payload: Payload) -> None:
        """Go on where a journal was saved. Call it before the first step.

        Args:
            saved: what was saved.
            payload: the data that it was saved with.
        """
        self.step, self._floor, self._barrier = saved.step, saved.floor, saved.barrier
        self._states = OrderedDict(saved.states)
        self._touched = {kind: dict(saved.touched.get(kind, ())) for kind in Kind}
        self._vanished = OrderedDict(
            ((kind, key), version) for kind, key, version in saved.vanished
        )
        self._forgotten = saved.forgotten
        self._digest, self._versions = int.from_bytes(saved.digest, "big"), saved.versions
        self.upstream, self._selector = saved.upstream, saved.selector
        self._verbatim = saved.verbatim
        self._payload, self.latest = payload, TOO_OLD
        self.revision += 1
        self._note_state(self._state, self.step)  # another one, if the SDK key is

    def _begin_anew(self, payload: Payload) -> None:
        """Let all clients get everything, as most of it has changed: cheaper than to compare."""
        self._set_barrier()
        for touched in self._touched.values():
            touched.clear()
        self._vanished.clear()
        self._forgotten = -1
        self._unnamed.clear()
        self._begin(payload)
        self.latest = TOO_OLD

    def _set_barrier(self) -> None:
        self._barrier = self.step
        self.barriers += 1

    def answer(self, basis: str) -> Full | Delta:
        """Return what a client needs to be current (fdv2 13.8.3).

        Args:
            basis: state that it names; empty for none, `UNRELIABLE` if it says nothing.
        """
        if not basis:
            return MISSING
        if basis == UNRELIABLE:
            return DOUBTED
        if self._selector is None:
            self.finish_naming()
        since = self._states.get(basis)
        if since is None:
            return UNKNOWN
        answer = self._answers.get(since)
        if answer is None:
            if len(self._answers) >= MAX_ANSWERS:
                self._answers.clear()
            answer = self._answers[since] = self._answer_since(since)
        return answer

    def counter(self, answer: Full | Delta) -> AnswerCounter:
        """Return the counter of an answer, which has to count each time that it is given."""
        saved = 0
        if isinstance(answer, Delta):
            saved = self._payload.size - sum(len(item.json or b"") for item in answer.items)
        return self.answers.counter(answer.kind, answer.cause, saved)

    def is_behind(self, basis: str) -> bool:
        """Return whether a state may be one that these data have yet to reach (fdv2 13.8.3).

        Only a hint that it may be worth waiting: it goes by the number.
        """
        if basis in self._states or not basis.startswith("(p:" + self.id):
            return False
        number = basis.rpartition(":")[2].removesuffix(")")
        if basis in self._states or not _NUMBER.fullmatch(number):
            return False
        ahead = (int(number) - self.version) % MAX_NUMBER  # numbers begin anew after the greatest
        return 0 < ahead < MAX_NUMBER // 2

    def _answer_since(self, step: int) -> Full | Delta:
        if step < max(self._floor, self._barrier):
            return TOO_OLD
        items = tuple(self._touched_after(step))
        return TOO_LARGE if _is_large(items, self._payload) else Delta(items, step)

    def _begin(self, payload: Payload) -> None:
        self.naming = Work(self._name(payload, self.step))
        if self._selector:
            self._note_state(self._selector.state, self.step)

    def _name(self, payload: Payload, step: int) -> Steps[None]:
        """Name the state of a whole payload that came with a step of the journal.

        Item by item: the next step may begin before.
        """
        shares: dict[Kind, dict[str, int]] = {kind: {} for kind in Kind}
        digest, versions = 0, 0
        for item in payload:
            if not item.deleted:
                share = shares[item.kind][item.key] = _digest(item)
                digest += share
                versions += item.version
            yield
        self._digest, self._versions, self.naming = digest, versions, None
        self._shares = shares
        self._note_state(self._address, step)

    def finish_naming(self) -> None:
        """Name the state, so that clients of other replicas, which may have it, are known.

        In a burst of changes that is worth while for the last one only.
        """
        if self.naming is not None:
            self.naming.run()
        if not self._unnamed:
            return
        digest, versions, payload = self._digest, self._versions, self._payload
        for (kind, key), former in self._unnamed.items():
            shares = self._shares[kind]
            if former is not None and former.json is not None:
                digest -= shares.pop(key, 0) or _digest(former)
                versions -= former.version
            item = payload.all(kind).get(key)
            if item is not None and item.json is not None:
                share = shares[key] = _digest(item)
                digest += share
                versions += item.version
        self._digest, self._versions = digest, versions
        self._unnamed.clear()
        self._note_state(self._address, self.step)

    def _supersedes(self, known: Item | None, item: Item) -> bool:
        """Return whether every client takes an item for newer than what it has seen.

        Args:
            known: the item before; None if there was none.
            item: the item now.
        """
        seen = self._forgotten if known is None else known.version
        if self._vanished:
            seen = self._vanished.get((item.kind, item.key), seen)
        if item.version <= seen:
            return False
        if known is None or known.json is None or item.json is None:
            return True
        return _have_same_salt(known.json, item.json)

    def _touch(self, known: Item | None, item: Item) -> None:
        kind, key = item.kind, item.key
        self._unnamed.setdefault((kind, key), known)
        if self._vanished:
            self._vanished.pop((kind, key), None)
        touched = self._touched[kind]
        if key in touched:
            del touched[key]  # the latest touch comes last
        touched[key] = self.step

    def _touched_after(self, step: int) -> Iterator[Item]:
        """Yield the present values of the items touched after a step, the latest first."""
        for kind in self._touched:
            items = self._payload.all(kind)
            for key, _ in self._recent(kind, step):
                yield items.get(key) or Item(kind, key, self._vanished.get((kind, key), 0), None)

    def _recent(self, kind: Kind, step: int) -> Iterator[tuple[str, int]]:
        """Yield the keys of a kind touched after a step, with their steps, the latest first."""
        return takewhile(lambda entry: entry[1] > step, reversed(self._touched[kind].items()))

    def _note_state(self, state: str, step: int) -> None:
        # A state may recur. Clients that go by the older occurrence may have seen more.
        self._states.setdefault(state, step)
        if len(self._states) > MAX_STATES:
            self._states.popitem(last=False)

    def _forget_oldest(self) -> None:
        while len(self._vanished) > MAX_VANISHED:
            (kind, key), version = self._vanished.popitem(last=False)
            self._forgotten = max(self._forgotten, version)
            self._touched[kind].pop(key, None)
            self._floor = self.step


def _tombstone(item: Item) -> Item:
    """Return the tombstone of an item that upstream has ceased to list.

    Its version is greater than any that clients have seen.
    """
    return item if item.deleted else Item(item.kind, item.key, item.version + 1, None)


def _digest(item: Item) -> int:
    """Return the share of an item in the address of the content; 0 for a tombstone."""
    if item.json is None:
        return 0
    text = b"%b\0%b\0%b" % (_NAMES[item.kind], item.key.encode(), item.json)
    return int.from_bytes(blake2b(text, digest_size=32).digest(), "big")


def _have_same_salt(former: bytes, json: bytes) -> bool:
    """Return whether an item is the former one, and not one that was created anew."""
    start = former.find(_SALT_MEMBER)
    # Without a parser, which costs ten times as much. A value of the flag may have a salt, too.
    if former.count(_SALT_MEMBER) == 1 == json.count(_SALT_MEMBER):
        written = former[start : former.find(b'"', start + len(_SALT_MEMBER)) + 1]
        if written in json and b"\\" not in written:
            return True
    return _salt(former) == _salt(json)


def _is_usable(selector: Selector) -> bool:
    """Return whether clients can get a name of upstream, and send it back."""
    names = selector.state, selector.id
    return all(map(_USABLE.fullmatch, names)) and 0 < selector.version <= MAX_NUMBER


def _salt(json: bytes) -> str | None:
    try:
        return _SALT.decode(json).salt
    except msgspec.MsgspecError:
        return None


def _is_large(items: Iterable[Item], payload: Payload) -> bool:
    """Return whether items are so many that everything is sent instead."""
    return sum(map(_size, items)) * SHARE_OF_DELTA > payload.size


def _size(item: Item) -> int:
    return len(item.json or b"") + len(item.key)
