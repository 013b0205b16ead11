"""Work beside the relay in its process."""

from __future__ import annotations

import asyncio
import gc

from relay.relay import Relay
from relay.server.run import _start_without_collections
from tests.test_relay import Stage, running


async def test_no_garbage_is_collected_while_a_relay_starts() -> None:
    """Afterwards it is, but nobody looks at what the start has made."""
    stage = Stage("a")
    before = gc.get_freeze_count()
    async with running(Relay([stage.environment], 5)) as relay:
        starting = asyncio.create_task(_start_without_collections(relay))
        await asyncio.sleep(0.02)
        assert not gc.isenabled()
        await stage.put()
        async with asyncio.timeout(5):
            await starting
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    gc.unfreeze()
