"""A real browser that opens one page, from an origin of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str:
    """The browser of this machine; without one the test is skipped, but not in CI."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and not os.environ.get("CI"):
        pytest.skip("no Chromium here; on Debian and Ubuntu: sudo apt-get install chromium")
    assert found, "Chromium is missing; .ci/run installs it"
    return found


@contextlib.asynccontextmanager
async def page(html: str, scripts: dict[str, Path], folder: Path) -> AsyncIterator[str]:
    """A browser shows a page until left; the page's origin is given.

    Args:
        html: of the page.
        scripts: path to file of what the page loads.
        folder: an empty folder for the browser's profile.
    """

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path in scripts:
            return web.FileResponse(
                scripts[request.path], headers={"Content-Type": "text/javascript"}
            )
        if request.path != "/":
            return web.Response(status=404)
        return web.Response(text=html, content_type="text/html")

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with browsing(f"http://localhost:{port}/", folder):
            yield f"http://localhost:{port}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def browsing(url: str, folder: Path, *more: str) -> AsyncIterator[None]:
    """A browser shows what is at an address until left.

    Args:
        url: of the page.
        folder: an empty folder for the browser's profile, and its log.
        more: options of the browser.
    """
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *more)
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update")
    with (folder / "browser.log").open("wb") as log:
        browser = await asyncio.create_subprocess_exec(
            *(executable(), *options, *quiet, f"--user-data-dir={folder}/profile"),
            *("--enable-logging=stderr", url),
            stdout=log,
            stderr=log,
        )
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                browser.kill()
            await browser.wait()
