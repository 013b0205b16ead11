"""A mirror keeps a published document: it heals, gathers changes, and stops without upstream."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from relay.model.payload import ChangeSet, Payload
from relay.protocol import document
from relay.stores import DOCUMENT, StoreState
from relay.stores.mirror import DatabaseMirror, MirrorTimings
from tests.stores.contract import flag, segment
from tests.stores.documents.conftest import LOG, NAME
from tests.support.serving import until

START = Payload.of([flag("lamp", 3), flag("gone", 4, None), segment("crowd", 5)])
QUICK = MirrorTimings(probe=0.05, compare=3600, pause=0.0)
HARMS = {
    "removed": None,
    "damaged": b"<html>",
    "emptied": b'{"flags":{},"segments":{}}',
    "cut off": document.text(START)[:-5],
    "an older backup": document.text(Payload.of([flag("lamp", 1)])),
}


@contextlib.asynccontextmanager
async def published(store, payload=START, timings=QUICK):
    mirror = DatabaseMirror(store, DOCUMENT, lambda: None, LOG, timings, label=store.label)
    running = asyncio.create_task(mirror.run())
    mirror.update(payload, None, full=True)
    try:
        async with asyncio.timeout(10):
            await mirror.flushed()
        yield mirror
    finally:
        running.cancel()
        await asyncio.wait([running])


@pytest.mark.parametrize("harm", HARMS)
async def test_a_harmed_document_heals(values, open_store, harm):
    """By a probe, whatever has happened to it."""
    async with published(open_store(values.url)) as mirror:
        assert values.values[NAME] == document.text(START)
        values.values.pop(NAME)
        if HARMS[harm] is not None:
            values.values[NAME] = HARMS[harm]
        await until(lambda: values.values.get(NAME) == document.text(START))
        assert mirror.status.state is StoreState.VALID


@pytest.mark.parametrize("name", [NAME, f"{NAME}.gz"])
async def test_each_form_heals(tmp_path, open_store, name):
    """Also if only one of them is removed."""
    async with published(open_store(f"file://{tmp_path}")):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        await until((tmp_path / name).exists)
        assert (tmp_path / name).read_bytes() == before


async def test_without_upstream_nothing_is_written(values, open_store):
    """Until it is back."""
    async with published(open_store(values.url)) as mirror:
        mirror.suspend()
        await asyncio.sleep(0.1)
        values.values.clear()
        puts = values.count("PUT")
        await asyncio.sleep(0.3)
        assert values.count("PUT") == puts
        mirror.update(START, None)
        await until(lambda: NAME in values.values)


async def test_an_idle_document_costs_one_cheap_question_at_a_time(values, open_store):
    """It is neither read nor written."""
    async with published(open_store(values.url)):
        await until(lambda: values.requests[-1] == ("GET", 304))
        values.requests.clear()
        await until(lambda: len(values.requests) >= 5)
        assert set(values.requests) == {("GET", 304)}


async def test_changes_gather_during_the_pause(values, open_store):
    """All of them are written together."""
    timings = MirrorTimings(probe=60, pause=0.5)
    payload = START
    async with published(open_store(values.url), timings=timings) as mirror:
        await asyncio.sleep(0.6)
        began, puts = time.monotonic(), values.count("PUT")
        for version in range(4, 40):
            payload, change = payload.apply(ChangeSet((flag("lamp", version),)))
            mirror.update(payload, change)
            await asyncio.sleep(0.01)
        await until(lambda: values.values[NAME] == document.text(payload))
        assert values.count("PUT") - puts <= 2 + (time.monotonic() - began) / 0.5
