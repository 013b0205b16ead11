"""The simulation of deltas finds what it is there for: each of these defects, planted in the product.

A proof that nothing can refute proves nothing. Whoever changes the simulation sees here that it has
not gone blind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from relay.model import journal as journal_module
from relay.model.item import Item, Kind
from relay.model.journal import TOO_OLD, Journal, SavedJournal
from relay.model.payload import Change, Payload, Selector
from relay.web import bases
from tests.streams.test_delta_simulation import HISTORIES, run

MAX_HISTORIES = 3000
"""Each is found within some hundred histories, most within ten."""

SEEDS = {"saved with other data": 15, "forgotten without floor": 12, "newest occurrence": 12}
"""With which those that are rarer are found soon; it saves time, and no more."""


def planted(name: str) -> Callable[[Any], AbstractContextManager[Any]]:
    """Return a decorator of what takes the place of a method of the journal."""
    return lambda method: patch.object(Journal, name, method)


def after_restore(forget: Callable[[Journal], None]) -> AbstractContextManager[Any]:
    """Plant something that goes wrong as a journal is restored."""
    restore = Journal.restore

    def badly(self: Journal, saved: SavedJournal, payload: Payload) -> None:
        restore(self, saved, payload)
        forget(self)

    return patch.object(Journal, "restore", badly)


def restored_without_touches(journal: Journal) -> None:
    journal._touched = {kind: {} for kind in Kind}


def restored_without_its_step(journal: Journal) -> None:
    journal.step = 0


def restored_as_if_all_states_were_the_present_one(journal: Journal) -> None:
    journal._states = OrderedDict((state, journal.step) for state in journal._states)


_saved, _touch, _record, _take_name = (
    Journal.saved,
    Journal._touch,
    Journal.record,
    Journal._take_name,
)


def saved_with_other_data(self: Journal, payload: Payload) -> SavedJournal | None:
    return _saved(self, self._payload)


def named_as_upstream_did_before(self: Journal, selector: Selector | None, *, full: bool) -> None:
    before = self._selector
    _take_name(self, selector, full=full)
    self._selector = self._selector or before


def touched_but_for_some(self: Journal, before: Payload, item: Item) -> None:
    if item.kind is not Kind.SEGMENT or self.step % 3:
        _touch(self, before, item)


def touched_but_for_deletions(self: Journal, before: Payload, item: Item) -> None:
    if not item.deleted:
        _touch(self, before, item)


def state_counts_from_its_newest_occurrence(self: Journal, state: str, step: int) -> None:
    self._states[state] = step


def recorded_with_former_answers(
    self: Journal, payload: Payload, change: Change, **more: Any
) -> None:
    former = dict(self._answers)
    _record(self, payload, change, **more)
    self._answers.update(former)


def begun_anew_without_barrier(self: Journal, payload: Payload) -> None:
    for touched in self._touched.values():
        touched.clear()
    self._unnamed.clear()
    self._begin(payload)
    self.latest = TOO_OLD


def forgotten_without_floor(self: Journal) -> None:
    while len(self._vanished) > journal_module.MAX_VANISHED:
        (kind, key), _ = self._vanished.popitem(last=False)
        self._touched[kind].pop(key, None)


def address_of_keys_and_versions(item: Item) -> int:
    return 0 if item.deleted else hash((item.kind, item.key, item.version))


DEFECTS = {
    "restored without touches": lambda: after_restore(restored_without_touches),
    "restored without its step": lambda: after_restore(restored_without_its_step),
    "restored states": lambda: after_restore(restored_as_if_all_states_were_the_present_one),
    "saved with other data": lambda: planted("saved")(saved_with_other_data),
    "upstream's name kept": lambda: planted("_take_name")(named_as_upstream_did_before),
    "touches left out": lambda: planted("_touch")(touched_but_for_some),
    "deletions left out": lambda: planted("_touch")(touched_but_for_deletions),
    "newest occurrence": lambda: planted("_note_state")(state_counts_from_its_newest_occurrence),
    "answers kept": lambda: planted("record")(recorded_with_former_answers),
    "anew without barrier": lambda: planted("_begin_anew")(begun_anew_without_barrier),
    "forgotten without floor": lambda: planted("_forget_oldest")(forgotten_without_floor),
    "no barriers": lambda: planted("_supersedes")(lambda *_: True),
    "number of steps": lambda: planted("_address")(property(lambda self: f"(p:r-x:{self.step})")),
    "address of versions": lambda: patch.object(
        journal_module, "_digest", address_of_keys_and_versions
    ),
    "Node taken at its word": lambda: patch.object(bases, "_is_stale", lambda _: False),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("defect", DEFECTS)
def test_the_simulation_finds(defect: str) -> None:
    @seed(SEEDS.get(defect, 1))
    @settings(
        max_examples=MAX_HISTORIES,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(actions=HISTORIES, fdv2=st.booleans())
    def histories(actions: list[tuple[Any, ...]], fdv2: bool) -> None:
        run(actions, fdv2=fdv2)

    with DEFECTS[defect](), pytest.raises(AssertionError):
        histories()
