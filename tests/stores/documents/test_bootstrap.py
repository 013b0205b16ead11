"""A document from which a relay starts."""

from __future__ import annotations

import asyncio
import logging

import pytest

from relay.backoff import Backoff
from relay.model.credential import Secret
from relay.model.payload import Payload
from relay.protocol import document
from relay.stores.documents.bootstrap import Bootstrap
from tests.stores.contract import flag
from tests.stores.documents.conftest import LOG, NAME, SPEC
from tests.support.keyvalue import TOKEN

ONE = Payload.of([flag("lamp", 1), flag("gone", 2, None)])
QUICK = Backoff(0.01, 0.01)


@pytest.fixture
def bootstrap(places):
    return lambda url: Bootstrap(places.place(url, Secret(TOKEN), SPEC), LOG, QUICK)


@pytest.mark.parametrize("make", [bytes, document.compressed])
async def test_a_document_is_loaded_wherever_it_lies(bootstrap, make, values, bucket, tmp_path):
    """Plain or in gzip, whatever its name says."""
    content = make(document.text(ONE))
    values.values[NAME] = content
    (tmp_path / NAME).write_bytes(content)
    bucket.put(NAME, content)
    for url in (values.url, f"file://{tmp_path}", bucket.url):
        mirror = bootstrap(url)
        stored = await mirror.load()
        assert set(stored.payload) == set(ONE)
        assert mirror.status is None
        await mirror._place.aclose()


async def test_it_waits_for_a_document_and_says_so_once_for_each_reason(
    bootstrap, tmp_path, caplog
):
    """Until there is one that can be read."""
    caplog.set_level(logging.INFO)
    mirror = bootstrap(f"file://{tmp_path}")
    loading = asyncio.create_task(mirror.load())
    await asyncio.sleep(0.1)
    (tmp_path / NAME).write_bytes(b"{")
    await asyncio.sleep(0.1)
    (tmp_path / "new").write_bytes(document.text(ONE))
    (tmp_path / "new").replace(tmp_path / NAME)
    async with asyncio.timeout(5):
        assert await loading
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert "there is none" in caplog.text
    assert "truncated" in caplog.text
    assert "has been read" in caplog.text


async def test_it_is_not_needed_once_upstream_has_delivered(bootstrap, tmp_path):
    """Nothing is written either."""
    mirror = bootstrap(f"file://{tmp_path}/none")
    loading = asyncio.create_task(mirror.load())
    running = asyncio.create_task(mirror.run())
    await asyncio.sleep(0.05)
    mirror.update(ONE, None, full=True)
    async with asyncio.timeout(5):
        assert await loading is None
        await mirror.flushed()
    mirror.suspend()
    running.cancel()
    await asyncio.wait([running])
    assert not (tmp_path / "none").exists()
    assert await mirror.load() is None


async def test_unusable_items_are_named(bootstrap, tmp_path, caplog):
    """The others are served."""
    (tmp_path / NAME).write_bytes(b'{"flags":{"lamp":{"version":"x"},"b":{"version":1}}}')
    stored = await bootstrap(f"file://{tmp_path}").load()
    assert [item.key for item in stored.payload] == ["b"]
    assert 'flag "lamp"' in caplog.text
