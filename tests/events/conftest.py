"""Fixtures of the tests of events."""

from __future__ import annotations

import pytest

from tests.events.stores import DATABASES, recorded_connections
from tests.support.upstream import ScriptedUpstream


@pytest.fixture
def connections():
    """The connections to databases that the test opens."""
    with recorded_connections() as opened:
        yield opened


@pytest.fixture(autouse=True)
def closing_stores():
    """Close what `on_disk` has opened."""
    yield
    for database in DATABASES.values():
        database.close()
    DATABASES.clear()


@pytest.fixture
async def upstream():
    async with ScriptedUpstream() as scripted:
        yield scripted
