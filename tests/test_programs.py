"""Programs are compiled on demand, in slices, once for all waiters."""

import asyncio
import json
import time

import pytest

from relay import clock
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import parse_context
from relay.model.item import Item, Kind, parse
from relay.model.payload import EMPTY, ChangeSet, Payload
from relay.programs import ProgramCache
from tests.support.data import flag

ANNA = parse_context(b'{"kind":"user","key":"anna"}')
MANY = 3000
"""Flags that take several slices to compile."""


def make_item(key: str, version: int = 1, **members: object) -> Item:
    """A flag as it arrives."""
    return parse(
        Kind.FLAG, key, json.dumps(flag(key, version, clientSide=True, **members)).encode()
    )


def many(version: int = 1) -> Payload:
    """A payload that takes a while."""
    return Payload.of(make_item(f"flag-{number:04}", version) for number in range(MANY))


@pytest.fixture
def quick_machine():
    """Compiling takes no time, so that programs are ready at once."""
    clock.use(lambda: 0.0)
    yield
    clock.use()


async def test_without_data_there_is_no_program():
    """Without data, callers get None at once instead of waiting for data."""
    cache = ProgramCache()
    assert cache.current(SDKKind.SERVER) is None
    assert await cache.ready(SDKKind.SERVER) is None


async def test_a_small_payload_is_ready_at_once():
    """Few flags need no waiting, and the program stays the same until the data change."""
    cache = ProgramCache()
    payload = Payload.of([make_item("lamp")])
    cache.update(payload)
    program = cache.current(SDKKind.SERVER)
    assert program is not None
    assert b'"lamp":{"value":true' in program.all(ANNA, with_reasons=False)
    cache.update(payload)
    assert cache.current(SDKKind.SERVER) is program
    assert await cache.ready(SDKKind.SERVER) is program


async def test_a_large_payload_is_compiled_in_slices():
    """Other tasks run while thousands of flags are compiled; a patch then needs no waiting."""
    cache = ProgramCache()
    payload = many()
    cache.update(payload)
    assert cache.current(SDKKind.SERVER) is None
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    program = await cache.ready(SDKKind.SERVER)
    task.cancel()
    assert turns > 3
    assert program is not None
    assert len(json.loads(program.all(ANNA, with_reasons=False))) == MANY
    patched, _ = payload.apply(ChangeSet((make_item("flag-0007", 2),)))
    cache.update(patched)
    newer = await cache.ready(SDKKind.SERVER)
    assert newer is not None
    assert newer.flags_touched_by(program) == {"flag-0007"}


async def test_current_compiles_no_second_slice():
    """Many requests in one turn of the loop hold it for one slice, not each for one."""
    cache = ProgramCache()
    cache.update(many())
    assert cache.current(SDKKind.SERVER) is None
    since = time.process_time()
    assert all(cache.current(SDKKind.SERVER) is None for _ in range(100))
    assert time.process_time() - since < 0.02


async def test_all_waiters_share_one_program():
    """The program is compiled once; cancelling one waiter does not affect the others."""
    cache = ProgramCache()
    cache.update(many())
    first, *others = [asyncio.create_task(cache.ready(SDKKind.SERVER)) for _ in range(5)]
    await asyncio.sleep(0)
    first.cancel()
    programs = await asyncio.gather(*others)
    assert programs[0] is not None
    assert all(program is programs[0] for program in programs)
    with pytest.raises(asyncio.CancelledError):
        await first


@pytest.mark.usefixtures("quick_machine")
async def test_kinds_of_sdk_share_compiled_flags():
    """A flag that several kinds of SDK see is compiled once for all of them."""
    cache = ProgramCache()
    cache.update(Payload.of([make_item("lamp")]))
    programs = [cache.current(sdk_kind) for sdk_kind in SDKKind]
    assert None not in programs
    assert all(a.flags_touched_by(b) == frozenset() for a in programs for b in programs)


async def test_waiters_get_the_newest_payload():
    """Data that arrive during compilation are in the program that waiters get."""
    cache = ProgramCache()
    cache.update(many())
    waiting = asyncio.create_task(cache.ready(SDKKind.SERVER))
    await asyncio.sleep(0)
    assert not waiting.done()
    cache.update(Payload.of([make_item("lamp")]))
    program = await waiting
    assert program is not None
    assert json.loads(program.all(ANNA, with_reasons=False)).keys() == {"lamp"}


@pytest.mark.usefixtures("quick_machine")
async def test_deleted_flags_are_gone():
    """A tombstone is no flag, and the deleted flag is touched."""
    cache = ProgramCache()
    payload = Payload.of([make_item("lamp"), make_item("door")])
    cache.update(payload)
    before = cache.current(SDKKind.SERVER)
    after, _ = payload.apply(ChangeSet((Item(Kind.FLAG, "lamp", 2, None),)))
    cache.update(after)
    program = cache.current(SDKKind.SERVER)
    assert program is not None
    assert program.flags_touched_by(before) == {"lamp"}
    assert program.some(ANNA, ["lamp"], with_reasons=False) == {}
    cache.update(EMPTY)
    program = cache.current(SDKKind.SERVER)
    assert program is not None
    assert program.all(ANNA, with_reasons=True) == b"{}"


@pytest.mark.usefixtures("quick_machine")
async def test_changed_rules_count_at_once_and_old_ones_no_more(monkeypatch):
    """Rules that many patches change, one after the other, each hold from then on."""
    monkeypatch.setattr("relay.programs.AT_ONCE", 60.0)  # however slow the machine is
    cache = ProgramCache()
    clause = {"attribute": "key", "op": "in", "values": ["anna"]}
    rule = {"clauses": [clause], "variation": 1}
    payload = Payload.of(make_item(f"flag-{number:02}", rules=[rule]) for number in range(20))
    for version in range(2, 40):
        key = f"flag-{version % 20:02}"
        other = rule | {"clauses": [clause | {"values": ["anna" if version % 3 else "ben", key]}]}
        changed = make_item(key, version, rules=[other])
        payload, _ = payload.apply(ChangeSet((changed,)))
        cache.update(payload)
        program = cache.current(SDKKind.SERVER)
        assert program is not None
        entries = program.some(ANNA, payload.flags, with_reasons=True)
        body = json.loads(program.all(ANNA, with_reasons=True))
        assert body == {name: json.loads(entry) for name, entry in entries.items()}
        assert body[key]["variation"] == (1 if version % 3 else 0)


@pytest.mark.usefixtures("quick_machine")
async def test_versions_grow_with_each_payload_and_fit_32_bits():
    """Versions are those of the data: equal for all kinds of SDK, greater with each new payload."""
    cache = ProgramCache()
    versions = []
    for version in range(1, 6):
        cache.update(Payload.of([make_item("lamp", version)]))
        versions_of_kinds = {cache.current(sdk_kind).version for sdk_kind in SDKKind}
        assert len(versions_of_kinds) == 1
        versions += versions_of_kinds
    assert versions == sorted(set(versions))
    assert time.time() - 60 < versions[0]
    assert versions[-1] < 2**31


@pytest.mark.usefixtures("quick_machine")
async def test_a_fleet_names_the_version():
    """All relays of a fleet show clients the same version, unless one would go back."""
    cache = ProgramCache()
    cache.update(Payload.of([make_item("lamp", 1)]), 2**30)
    assert cache.current(SDKKind.BROWSER).version == cache.version == 2**30
    cache.update(Payload.of([make_item("lamp", 2)]), 2**30 + 7)
    assert cache.version == 2**30 + 7
    cache.update(Payload.of([make_item("lamp", 3)]), 2**30)
    assert cache.version == 2**30 + 8


@pytest.mark.usefixtures("quick_machine")
async def test_versions_fit_whatever_the_clock_says():
    """They still grow."""
    cache = ProgramCache()
    versions = []
    for version, now in enumerate((2**40, 0.0, 1e9, 2**40), 1):
        clock.use(lambda: 0.0, lambda now=now: now)
        cache.update(Payload.of([make_item("lamp", version)]))
        versions.append(cache.current(SDKKind.SERVER).version)
    assert versions == sorted(set(versions))
    assert versions[-1] < 2**31


@pytest.mark.usefixtures("quick_machine")
async def test_a_cache_prints_its_state():
    """In a debugger it says for which kinds of SDK programs are ready, and no content."""
    cache = ProgramCache()
    assert repr(cache) == "<ProgramCache version 0, ready: none>"
    cache.update(Payload.of([make_item("lamp")]))
    program = cache.current(SDKKind.SERVER)
    assert program is not None
    assert repr(cache) == f"<ProgramCache version {program.version}, ready: server>"
