"""Contract tests for data sources. A `Stage` adapts each kind of source to the suite."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Protocol

import pytest

from relay.model.item import Kind
from relay.model.payload import EMPTY, Payload
from relay.sources import ChangeSet, DataSource, Interrupted, UpToDate
from tests.support.data import all_data, flag, segment


class Stage(Protocol):
    """A source, and control over its upstream."""

    source: DataSource

    async def show(self, text: str) -> None:
        """Let upstream have this data set."""

    async def spoil(self) -> None:
        """Let upstream deliver unusable data."""

    async def restore(self, text: str) -> None:
        """Undo `spoil`."""


async def until(updates, condition, payload: Payload = EMPTY) -> Payload:
    """Apply updates until `condition(update, payload)`; return the payload."""
    async with asyncio.timeout(20):
        async for update in updates:
            if isinstance(update, ChangeSet):
                payload, _ = payload.apply(update)
            if condition(update, payload):
                return payload
    raise AssertionError


def has(value):
    return lambda _, payload: (
        (item := payload.get(Kind.FLAG, "lamp")) is not None and f'"{value}"'.encode() in item.json
    )


class SourceContract:
    """Subclass it with a fixture `stage` whose upstream has no data yet."""

    async def test_all_data_first_and_then_changes(self, stage):
        """Versions grow with changes, so that clients take them."""
        await stage.show(all_data(flag(value="one"), segment()))
        async with aclosing(stage.source.updates()) as updates:
            first = await until(updates, has("one"))
            assert first.get(Kind.SEGMENT, "crowd")
            await stage.show(all_data(flag(value="two", version=2), segment()))
            second = await until(updates, has("two"), first)
        lamps = [payload.get(Kind.FLAG, "lamp") for payload in (first, second)]
        assert lamps[0].version < lamps[1].version

    async def test_unusable_data_is_reported_and_changes_nothing(self, stage):
        """The source recovers by itself."""
        await stage.show(all_data(flag(value="one")))
        async with aclosing(stage.source.updates()) as updates:
            payload = await until(updates, has("one"))
            await stage.spoil()
            payload = await until(updates, lambda u, _: isinstance(u, Interrupted), payload)
            assert has("one")(None, payload)
            await stage.restore(all_data(flag(value="three", version=3)))
            await until(updates, has("three"), payload)

    async def test_a_resync_delivers_all_data_again(self, stage):
        """Even if nothing has changed."""
        await stage.show(all_data(flag(value="one")))
        async with aclosing(stage.source.updates()) as updates:
            await until(updates, has("one"))
            stage.source.resync()
            await until(updates, lambda u, _: isinstance(u, ChangeSet) and u.full)

    async def test_quiet_sources_confirm_their_data(self, stage):
        """So the age of the data stays correct."""
        await stage.show(all_data(flag(value="one")))
        async with aclosing(stage.source.updates()) as updates:
            await until(updates, has("one"))
            if hasattr(stage, "beat"):
                await stage.beat()
            await until(updates, lambda u, _: isinstance(u, UpToDate))

    @pytest.mark.parametrize("steps", range(0, 12, 3))
    async def test_cancelling_anywhere_leaves_nothing_open(self, stage, steps):
        """And the source can be run again."""
        await stage.show(all_data(flag(value="one")))

        async def listen():
            async with aclosing(stage.source.updates()) as updates:
                async for _ in updates:
                    pass

        task = asyncio.create_task(listen())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with aclosing(stage.source.updates()) as updates:
            await until(updates, has("one"))
