"""Work on a large payload lets others have their turn."""

from __future__ import annotations

import asyncio
import json

import pytest

from relay import aio
from relay.aio import run_in_slices
from relay.errors import InvalidData
from relay.protocol import fdv1
from tests.support.data import flag

FLAGS = {f"flag-{n}": flag(f"flag-{n}") for n in range(50)}
PUT = json.dumps({"path": "/", "data": {"flags": FLAGS, "segments": {}}}).encode()


@pytest.mark.parametrize(("slice_seconds", "least", "most"), [(0.0, 50, 60), (60.0, 0, 1)])
async def test_others_have_their_turn_whenever_a_slice_is_over(
    monkeypatch, slice_seconds, least, most
):
    """After each item, if that takes so long; within one slice nobody else runs."""
    monkeypatch.setattr(aio, "SLICE", slice_seconds)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    changes = await run_in_slices(fdv1.in_steps("put", PUT))
    counted = turns
    beside.cancel()
    assert changes == fdv1.parse("put", PUT)
    assert least <= counted <= most


async def test_what_is_wrong_is_told_as_it_would_be_at_once():
    with pytest.raises(InvalidData, match="put message"):
        await run_in_slices(fdv1.in_steps("put", b"{"))
