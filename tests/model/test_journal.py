"""A journal gives clients that come back what they miss, and never less (fdv2 13.8)."""

from __future__ import annotations

import os

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.model.item import Item, Kind
from relay.model.journal import (
    DOUBTED,
    MAX_SAVED_STATES,
    MAX_STATES,
    MAX_VANISHED,
    MISSING,
    TOO_LARGE,
    TOO_OLD,
    UNKNOWN,
    UNRELIABLE,
    Delta,
    Full,
    Journal,
    SavedJournal,
)
from relay.model.payload import EMPTY, Change, ChangeSet, Payload, Selector

PADDING = b"x" * 2000
EXAMPLES = int(os.environ.get("EXAMPLES", "300"))


def flag(key: str, version: int, salt: str = "s", text: bytes = b"") -> Item:
    json = b'{"key":"%b","version":%d,"salt":"%b","text":"%b"}'
    return Item(Kind.FLAG, key, version, json % (key.encode(), version, salt.encode(), text))


def gone(key: str, version: int) -> Item:
    return Item(Kind.FLAG, key, version, None)


def segment(key: str, version: int) -> Item:
    return Item(Kind.SEGMENT, key, version, b'{"version":%d}' % version)


LARGE = flag("large", 1, text=PADDING)
"""Beside it, any delta of small items is small."""


class History:
    """Data of an environment, and their journal."""

    def __init__(self, *items: Item) -> None:
        self.journal = Journal("environment")
        self.payload = EMPTY
        self.apply(*items, full=True)

    def apply(self, *items: Item, full: bool = False, selector: Selector | None = None) -> str:
        """Apply a change set; return the state after it."""
        changes = ChangeSet(items, full=full, selector=selector)
        self.payload, change = self.payload.apply(changes)
        if change is not None:
            self.journal.record(self.payload, change, full=full, selector=selector)
        else:
            self.journal.rename(selector, full=full)
        return self.journal.state

    def saved(self) -> SavedJournal:
        """Return the journal as it is saved, on its way to a file and back."""
        self.journal.finish_naming()
        saved = self.journal.saved(self.payload)
        return msgspec.json.decode(msgspec.json.encode(saved), type=SavedJournal)

    def restart(self, lineage: str = "environment") -> None:
        saved, self.journal = self.saved(), Journal(lineage)
        self.journal.restore(saved, self.payload)

    def answer(self, basis: str) -> set[Item] | Full:
        answer = self.journal.answer(basis)
        return answer if isinstance(answer, Full) else set(answer.items)


def test_a_client_without_a_state_gets_everything():
    assert History(LARGE).answer("") == MISSING


@pytest.mark.parametrize("basis", ["(p:x:1)", "nonsense", "(p:", "\0", "x" * 10_000, "ü"])
def test_a_state_that_is_not_known_means_everything(basis):
    assert History(LARGE).answer(basis) == UNKNOWN


def test_a_state_that_is_named_after_the_next_step_is_that_of_its_own():
    """Else a client that another replica gave it would be told that nothing is new."""
    state = History(LARGE, flag("a", 1)).journal.state
    history = History()
    for items in ((LARGE, flag("a", 1)), (flag("a", 2),)):
        full = len(items) > 1
        history.payload, change = history.payload.apply(ChangeSet(items, full=full))
        assert change is not None
        history.journal.record(history.payload, change, full=full)
    assert history.answer(state) == {flag("a", 2)}


def test_a_client_that_is_up_to_date_needs_nothing():
    history = History(LARGE)
    assert history.answer(history.journal.state) == set()


def test_a_client_gets_what_was_touched_since():
    """The present value of each item, once, whatever happened to it in between."""
    history = History(LARGE, flag("a", 1), segment("s", 1))
    states = [history.journal.state]
    states += [
        history.apply(flag("a", 2)),
        history.apply(flag("b", 1)),
        history.apply(flag("a", 3)),
    ]
    states += [history.apply(gone("b", 2), segment("s", 2))]
    after = [{flag("a", 3), gone("b", 2), segment("s", 2)}] * 3
    after += [{gone("b", 2), segment("s", 2)}, set()]
    assert [history.answer(state) for state in states] == after
    assert len(set(states)) == 5


def test_equal_data_have_an_equal_state():
    """However they came about, so replicas and restarted relays know each other's clients."""
    changed = History(LARGE, flag("a", 1), flag("b", 1))
    changed.apply(gone("b", 2))
    changed.apply(flag("a", 2))
    whole = History(flag("a", 2), LARGE)
    assert changed.journal.state == whole.journal.state
    assert whole.answer(changed.journal.state) == set()


def test_another_environment_has_other_states():
    """A state of one environment is of no use in another."""
    history = History(LARGE)
    other = Journal("other")
    assert other.id != history.journal.id
    assert other.state != history.journal.state


def test_states_and_ids_need_no_escapes():
    """Some SDKs send them back as they are (fdv2 13.8.5)."""
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789():._~-")
    journal = History(LARGE).journal
    assert set(journal.state + journal.id) <= allowed
    assert journal.version >= 1
    assert Journal("empty").version == 1


def test_what_vanished_is_deleted_with_a_greater_version():
    """Upstream lists it no more, and clients that compare versions must take the deletion."""
    history = History(LARGE, flag("a", 7))
    before = history.journal.state
    history.apply(LARGE, full=True)
    assert history.answer(before) == {gone("a", 8)}
    assert history.journal.latest == Delta((gone("a", 8),), 1)


def test_upstreams_everything_touches_only_what_differs():
    history = History(LARGE, flag("a", 1), flag("b", 1))
    before = history.journal.state
    history.apply(LARGE, flag("a", 1), flag("b", 2), full=True)
    assert history.answer(before) == {flag("b", 2)}


@pytest.mark.parametrize(
    "steps",
    [
        [[LARGE, flag("a", 3)]],  # an older version
        [[LARGE, flag("a", 5, text=b"other")]],  # another item of the same version
        [[LARGE, flag("a", 6, salt="other")]],  # created anew
        [[LARGE], [LARGE, flag("a", 6)]],  # created anew, at the version of its tombstone
    ],
)
def test_what_does_not_supersede_means_everything(steps):
    """Clients that compare versions would keep what they have."""
    history = History(LARGE, flag("a", 5))
    before = history.journal.state
    for items in steps:
        history.apply(*items, full=True)
    assert history.answer(before) == TOO_OLD
    assert history.journal.latest == TOO_OLD
    after = history.journal.state
    history.apply(flag("b", 1))
    assert history.answer(after) == {flag("b", 1)}


@pytest.mark.parametrize(
    ("value", "salt", "is_new"),
    [
        (b'{"salt":"s"}', "other", True),  # a value has the former salt
        (b'{"salt":"t"}', "s", False),
        (b'{\\"salt\\":\\"s', "other", True),
        (b"[]", 'a\\"other', True),
    ],
)
def test_a_salt_is_that_of_the_flag(value, salt, is_new):
    """Values of flags are any JSON, and salts any string; neither must hide that a flag is new."""

    def valued(version: int, salt: str) -> Item:
        json = b'{"variations":[%b],"key":"a","version":%d,"salt":"%b"}'
        text = b'"%b"' % value if b"\\" in value else value
        return Item(Kind.FLAG, "a", version, json % (text, version, salt.encode()))

    history = History(LARGE, valued(1, 'a\\"s' if "\\" in salt else "s"))
    before = history.journal.state
    history.apply(valued(2, salt))
    assert history.answer(before) == (TOO_OLD if is_new else {valued(2, salt)})


def test_a_forgotten_tombstone_still_counts():
    """Clients remember the deletion, though upstream lists it no more."""
    history = History(LARGE, flag("a", 1))
    history.apply(gone("a", 5))
    before = history.journal.state
    history.apply(LARGE, flag("c", 1), full=True)
    history.apply(flag("a", 3))
    assert history.answer(before) == TOO_OLD


def test_a_large_delta_is_everything():
    history = History(flag("a", 1), flag("b", 1, text=PADDING))
    before = history.journal.state
    history.apply(flag("b", 2, text=PADDING))
    assert history.answer(before) == TOO_LARGE
    assert isinstance(history.journal.latest, Delta)  # live, one change is never more than all


def test_a_state_that_recurs_stands_for_its_first_time():
    """A client that names it may have seen what came in between."""
    history = History(LARGE)
    first = history.journal.state
    history.apply(flag("a", 1))
    history.apply(gone("a", 2))
    assert history.journal.state == first
    assert history.answer(first) == {gone("a", 2)}


def test_memory_is_bounded():
    """The oldest states are forgotten; their clients get everything."""
    history = History(LARGE, flag("a", 1))
    first = history.journal.state
    for version in range(2, MAX_STATES + 2):
        last = history.apply(flag("a", version))
    assert history.journal.depth == MAX_STATES
    assert history.answer(first) == UNKNOWN
    assert history.answer(last) == set()


def test_forgotten_deletions_end_older_states():
    history = History(LARGE, *(flag(f"f{n}", 1) for n in range(MAX_VANISHED)))
    before = history.apply(flag("a", 1))
    history.apply(LARGE, full=True)
    assert isinstance(history.answer(before), Full)
    assert history.answer(history.journal.state) == set()


def test_forgotten_deletions_are_not_undone():
    """Clients that compare versions remember them: what may be one of them starts them over."""
    huge = flag("huge", 1, text=b"x" * 300_000)
    history = History(huge, *(flag(f"f{n}", 5) for n in range(MAX_VANISHED + 1)))
    before = history.journal.state
    after = history.apply(huge, full=True)
    assert history.answer(before) == TOO_OLD
    assert history.answer(after) == set()
    history.apply(flag("new", 7))
    assert isinstance(history.journal.latest, Delta)
    history.apply(flag("perhaps", 6))
    assert history.journal.latest == TOO_OLD


def test_a_delta_is_made_once_for_all_who_need_it():
    history = History(LARGE, flag("a", 1))
    state = history.journal.state
    history.apply(flag("a", 2))
    assert history.journal.answer(state) is history.journal.answer(state)
    assert history.answer(state) == {flag("a", 2)}
    history.apply(flag("b", 1))
    assert history.answer(state) == {flag("a", 2), flag("b", 1)}


def test_barriers_are_counted():
    history = History(LARGE, flag("a", 2))
    history.apply(flag("a", 3))
    history.apply(LARGE, flag("a", 1), full=True)
    assert history.journal.barriers == 1


def test_a_state_is_named_behind_the_step():
    """Large data take a while to hash; whoever asks meanwhile is answered all the same."""
    wholes = [Payload.of([LARGE, flag("a", n, text=PADDING * 3)]) for n in (1, 2)]
    journal, all_of_it = Journal("environment"), Change((), (), replace=True)
    journal.record(wholes[0], all_of_it, full=True)
    former = journal.naming
    assert former is not None
    former.run(until=-1)
    journal.record(wholes[1], Change(tuple(wholes[1]), (), replace=True), full=True)
    assert journal.naming not in (None, former)
    other = Journal("environment")
    other.record(wholes[1], all_of_it, full=True)
    while other.naming is not None:
        other.naming.run(until=-1)
    assert journal.answer(other.state) == Delta((), 2)
    assert journal.naming is None
    assert journal.state == other.state


def test_a_client_whose_data_are_in_doubt_gets_everything():
    assert History(LARGE).answer(UNRELIABLE) == DOUBTED


def test_numbers_fit_into_32_bits():
    """Java's SDK reads them into an int, and versions of files are times."""
    history = History(LARGE)
    numbers = [history.journal.version]
    for n in range(3):
        history.apply(flag(f"f{n}", 2**31 - 2**20))
        numbers.append(history.journal.version)
    assert all(1 <= number < 2**31 for number in numbers)
    assert len(set(numbers)) == 4


def test_a_state_that_is_still_to_come_is_recognised_by_its_number():
    """Of another replica, which is ahead; also after the greatest number."""
    for items in ([flag("a", 1)], [flag("a", 2**31 - 5)]):
        ahead, behind = History(LARGE, *items), History(LARGE, *items)
        state = ahead.apply(flag("b", 7))
        assert behind.journal.is_behind(state)
        assert not ahead.journal.is_behind(state)
        assert not ahead.journal.is_behind(behind.journal.state)
        behind.apply(flag("b", 7))
        assert not behind.journal.is_behind(state)


@pytest.mark.parametrize("number", ["", "x", "-1", "1e3", "٣", "9" * 21, "9" * 10_000, "1:", "1))"])
def test_only_a_number_of_the_same_data_is_worth_waiting_for(number):
    history = History(LARGE)
    assert not history.journal.is_behind(f"(p:{history.journal.id}-x:{number})")
    assert history.journal.is_behind(f"(p:{history.journal.id}-x:99)")
    assert not history.journal.is_behind("(p:other-x:99)")


def test_a_restarted_relay_goes_on_where_it_was():
    """Clients of before get what they miss, also of what comes after."""
    history = History(LARGE, flag("a", 1), segment("s", 1))
    first = history.journal.state
    second = history.apply(flag("a", 2), gone("s", 9))
    history.restart()
    assert history.journal.state == second
    assert history.answer(second) == set()
    assert history.answer(first) == {flag("a", 2), gone("s", 9)}
    assert history.journal.latest == TOO_OLD  # of whoever is there already
    third = history.apply(LARGE, flag("a", 3), segment("s", 1), full=True)
    assert history.answer(second) == {flag("a", 3)}
    assert history.answer(third) == set()


def test_a_restart_forgets_neither_barriers_nor_tombstones():
    history = History(LARGE, flag("a", 5))
    first = history.journal.state
    second = history.apply(LARGE, full=True)  # deleted in version 6
    history.restart()
    assert history.answer(first) == {gone("a", 6)}
    history.apply(flag("a", 6))
    history.restart()
    assert history.answer(second) == TOO_OLD


def test_a_new_key_gives_the_environment_new_names():
    """And the former ones stay known."""
    history = History(LARGE, flag("a", 1))
    first = history.journal.state
    history.restart("other")
    assert history.journal.state != first
    assert history.answer(first) == set()
    assert history.answer(history.journal.state) == set()


def test_only_the_latest_states_are_saved():
    """The journal saved beside small data is small, too; older clients get everything."""
    history = History(LARGE, flag("a", 1), flag("b", 1))
    first = history.apply(flag("b", 2))
    states = [history.apply(flag("a", version)) for version in range(2, MAX_SAVED_STATES + 10)]
    saved = history.saved()
    assert len(saved.states) == MAX_SAVED_STATES
    assert saved.touched == {Kind.FLAG: [("a", history.journal.step)], Kind.SEGMENT: []}
    assert len(msgspec.json.encode(saved)) < 80_000
    history.restart()
    assert history.answer(first) == UNKNOWN
    for state in states[-MAX_SAVED_STATES:-1]:
        assert history.answer(state) == {flag("a", MAX_SAVED_STATES + 9)}


def test_a_journal_is_saved_with_its_own_data_only():
    history = History(LARGE)
    assert history.journal.saved(history.payload)
    assert history.journal.saved(Payload.of([LARGE])) is None
    journal = Journal("environment")
    journal.record(history.payload, Change((), (), replace=True), full=True)
    assert journal.saved(history.payload) is None  # the state has no name yet
    assert Journal("environment").saved(EMPTY) is None


UPSTREAM = Selector("(p:UP:7)", "UP", 7)


def test_upstreams_name_is_ours_if_clients_get_what_it_sent():
    history = History(LARGE)
    own = history.journal.state
    assert history.apply(LARGE, flag("a", 1), full=True, selector=UPSTREAM) == "(p:UP:7)"
    journal = history.journal
    assert (journal.id, journal.version, journal.upstream) == ("UP", 7, "(p:UP:7)")
    state = history.apply(flag("a", 2), selector=Selector("(p:UP:8)", "UP", 8))
    assert state == "(p:UP:8)"
    assert history.answer("(p:UP:7)") == {flag("a", 2)}
    assert history.answer(own) == {flag("a", 2)}


def test_another_protocol_of_upstream_ends_no_state():
    """Clients get deltas over the switch, and back."""
    history = History(LARGE)
    history.apply(LARGE, flag("a", 1), full=True, selector=UPSTREAM)
    own = history.apply(LARGE, flag("a", 1), full=True)
    assert own.startswith(f"(p:{Journal('environment').id}-")
    assert history.journal.upstream == ""
    history.apply(flag("a", 2))
    history.apply(LARGE, flag("a", 2), full=True, selector=Selector("(p:UP:8)", "UP", 8))
    assert history.journal.state == "(p:UP:8)"
    assert history.answer("(p:UP:7)") == history.answer(own) == {flag("a", 2)}


def test_the_same_data_may_get_another_name():
    """Whoever has them by the former is up to date."""
    history = History(LARGE)
    history.apply(LARGE, flag("a", 1), full=True, selector=UPSTREAM)
    step = history.journal.step
    assert history.apply(selector=Selector("(p:UP:9)", "UP", 9)) == "(p:UP:9)"
    assert history.journal.step == step
    assert history.answer("(p:UP:7)") == history.answer("(p:UP:9)") == set()


@pytest.mark.parametrize(
    "selector",
    [
        Selector("", "UP", 7),
        Selector("(p:U P:7)", "UP", 7),
        Selector("(p:UP:7)", "", 7),
        Selector("x" * 257, "UP", 7),
        Selector("(p:UP:7)", "UP", 0),
        Selector("(p:UP:7)", "UP", 1 << 53),
        Selector("(p:UP:7)", "UP", 7, verbatim=False),
    ],
)
def test_a_name_that_will_not_do_is_kept_for_upstream(selector):
    """Clients get an address of the content."""
    history = History(LARGE)
    history.apply(LARGE, flag("a", 1), full=True, selector=selector)
    assert history.journal.id == Journal("environment").id
    assert history.journal.upstream == selector.state
    assert history.answer(history.journal.state) == set()


def test_data_that_were_held_back_have_no_name_of_upstream_until_all_are_there():
    """Over restarts, too."""
    history = History(LARGE)
    history.apply(LARGE, full=True, selector=Selector("(p:UP:7)", "UP", 7, verbatim=False))
    history.restart()
    state = history.apply(flag("a", 1), selector=Selector("(p:UP:8)", "UP", 8))
    assert state != "(p:UP:8)"
    history.restart()
    assert history.journal.upstream == "(p:UP:8)"
    history.apply(LARGE, flag("a", 1), full=True, selector=Selector("(p:UP:9)", "UP", 9))
    history.restart()
    assert history.journal.state == "(p:UP:9)"
    assert history.answer(state) == set()


KEYS = st.sampled_from("abc")
LIVE = st.builds(flag, KEYS, st.integers(1, 4), st.sampled_from("st"))
ITEMS = st.one_of(LIVE, st.builds(gone, KEYS, st.integers(1, 5)))
STEPS = st.tuples(st.booleans(), st.lists(ITEMS, max_size=3, unique_by=lambda i: i.key))


class PlainClient:
    """Replaces what it gets, as most SDKs do."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}
        self.basis = ""

    def take(self, history: History, answer: Full | Delta, some: int | None = None) -> None:
        """Apply an answer; only its first items if the connection is cut."""
        if isinstance(answer, Full):
            if some is None:
                self.items = {i.key: i for i in history.payload.live(Kind.FLAG)}
        else:
            for item in answer.items[:some]:
                self.put(item)
        if some is None:
            self.basis = history.journal.state

    def put(self, item: Item) -> None:
        if item.deleted:
            self.items.pop(item.key, None)
        else:
            self.items[item.key] = item


class ComparingClient(PlainClient):
    """Ignores what is not newer than what it has, tombstones included, as Node's SDK does."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: dict[str, int] = {}

    def take(self, history: History, answer: Full | Delta, some: int | None = None) -> None:
        if isinstance(answer, Full) and some is None:
            self.versions = {i.key: i.version for i in history.payload.live(Kind.FLAG)}
        super().take(history, answer, some)

    def put(self, item: Item) -> None:
        if item.version > self.versions.get(item.key, -1):
            self.versions[item.key] = item.version
            super().put(item)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    steps=st.lists(STEPS, max_size=12),
    visits=st.lists(st.booleans(), min_size=12, max_size=12),
    cuts=st.lists(st.integers(0, 2), min_size=12, max_size=12),
    restarts=st.sets(st.integers(0, 11), max_size=2),
)
def test_after_an_answer_a_client_holds_exactly_the_data(steps, visits, cuts, restarts):
    """Whatever happened, whichever answers were cut, and however long it was away."""
    history = History(LARGE, flag("a", 1))
    plain, comparing, hasty = PlainClient(), ComparingClient(), PlainClient()
    for n, ((full, items), visit, cut) in enumerate(zip(steps, visits, cuts, strict=False)):
        if n in restarts:
            history.restart()
        history.apply(*([LARGE, *items] if full else items), full=full)
        data = {i.key: i for i in history.payload.live(Kind.FLAG)}
        # One keeps a part of each answer, and comes back with the state that it had before.
        hasty.take(history, history.journal.answer(hasty.basis), cut)
        if visit:
            for client in (plain, comparing, hasty):
                client.take(history, history.journal.answer(client.basis))
                assert client.items == data, client


@settings(max_examples=EXAMPLES, deadline=None)
@given(steps=st.lists(STEPS, max_size=12))
def test_clients_that_stay_hold_exactly_the_data(steps):
    """Each step alone is enough for whoever had the data before it."""
    history = History(LARGE, flag("a", 1))
    plain, comparing = PlainClient(), ComparingClient()
    for client in (plain, comparing):
        client.take(history, MISSING)
    for full, items in steps:
        before = history.journal.step
        history.apply(*([LARGE, *items] if full else items), full=full)
        if history.journal.step == before:
            continue
        for client in (plain, comparing):
            client.take(history, history.journal.latest)
            assert client.items == {i.key: i for i in history.payload.live(Kind.FLAG)}


@settings(max_examples=EXAMPLES, deadline=None)
@given(steps=st.lists(STEPS, max_size=8), restarts=st.sets(st.integers(0, 7)))
def test_a_state_names_one_content(steps, restarts):
    """Followed from change to change, or made of the result, it is the same."""
    history = History(LARGE, flag("a", 1), flag("b", 1))
    for number, (full, items) in enumerate(steps):
        history.apply(*([LARGE, *items] if full else items), full=full)
        if number in restarts:
            history.restart()
    fresh = History(*Payload.of(history.payload.live(Kind.FLAG)))
    assert history.journal.state == fresh.journal.state


def test_answers_are_counted_with_what_they_spare():
    """By kind and reason; a full transfer spares nothing, and who is up to date needs nothing."""
    history = History(LARGE)
    before = history.journal.state
    after = history.apply(flag("small", 1))
    size, small = history.payload.size, len(flag("small", 1).json or b"")
    for basis in ("", before, after, after):
        history.journal.counter(history.journal.answer(basis)).add()
    answers = history.journal.answers
    assert {key: count.value for key, count in answers.numbers.items()} == {
        (Full.kind, MISSING.cause): 1,
        ("delta", "stale"): 1,
        ("none", "up-to-date"): 2,
    }
    assert answers.saved.value == size - small + 2 * size
    assert repr(answers) == "<AnswerCounts [4 answers]>"


@pytest.mark.parametrize("verbatim", [True, False])
def test_the_selector_of_upstream_is_known_also_if_clients_do_not_get_it(verbatim):
    """A fleet passes it on, so that another relay can go on from there."""
    history = History(LARGE)
    assert history.journal.upstream_selector is None
    selector = Selector("(p:x:7)", "x", 7, verbatim=verbatim)
    history.apply(LARGE, full=True, selector=selector)
    known = history.journal.upstream_selector
    assert known is not None
    assert known.state == "(p:x:7)"
    assert history.journal.client_selector == (selector if verbatim else None)
