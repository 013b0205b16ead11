"""`relay archive`: write the environments to an archive, for relays in offline mode."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path

import uvloop

from relay.build.commands import archive_sources
from relay.config.schema import Config
from relay.config.types import HTTP_URI
from relay.errors import ConfigError, ErrorKind, UpstreamUnavailable
from relay.files import write_private
from relay.model.environment import EnvironmentSpec
from relay.model.payload import EMPTY, ChangeSet
from relay.protocol.archive import Entry, entry_of, write
from relay.reasons import describe
from relay.server.run import until_signal
from relay.sources import DataSource, Interrupted

MAX_CONCURRENT = 16
"""Maximum number of environments that are read at a time."""

FAILED, UNUSABLE = 1, 2
"""Exit codes: nothing was written; the configuration is unusable."""

_log = logging.getLogger("relay")


def write_archive(
    config: Config, environments: Collection[str], relay_url: str, output: str
) -> int:
    """Write an archive, or nothing if an environment is missing; return the exit code.

    Args:
        config: of LaunchDarkly and the environments.
        environments: names of the environments to write; empty for all.
        relay_url: URL of a running relay to read from; empty to read from LaunchDarkly.
        output: path of the archive, which is replaced at once.
    """
    try:
        url = HTTP_URI.parse(relay_url) if relay_url else ""
        session, sources = archive_sources(config, environments, url)
    except (ConfigError, ValueError) as e:
        _log.error("Configuration error: %s", e)
        return UNUSABLE
    reading = _read_all(session, sources, config.main.init_timeout)
    entries = uvloop.run(until_signal(reading))
    if entries is None or None in entries:
        _log.error("No archive was written: it would lack an environment")
        return FAILED
    content = write(entry for entry in entries if entry)
    try:
        write_private(Path(output), content)
    except OSError as e:
        _log.error("The archive %s cannot be written: %s", output, describe(e))
        return FAILED
    _log.info("Wrote %s with %d environments (%d bytes)", output, len(entries), len(content))
    return 0


async def _read_all(
    session: AbstractAsyncContextManager[object],
    sources: Sequence[tuple[EnvironmentSpec, DataSource]],
    limit: float,
) -> list[Entry | None]:
    """Return the entries of all environments; None for one that cannot be read."""
    semaphore = asyncio.Semaphore(MAX_CONCURRENT)

    async def read(spec: EnvironmentSpec, source: DataSource) -> Entry | None:
        async with semaphore:
            try:
                changes = await _all_data(source, limit)
            except UpstreamUnavailable as e:
                _log.error('Environment "%s" cannot be read: %s', spec.name, e)
                return None
        for item in changes.invalid:
            _log.error('Environment "%s" has an unusable %s; it is left out', spec.name, item)
        payload, _ = EMPTY.apply(changes)
        return entry_of(spec, payload)

    async with session:
        return await asyncio.gather(*(read(spec, source) for spec, source in sources))


async def _all_data(source: DataSource, limit: float) -> ChangeSet:
    """Return the first complete data of a source.

    Raises:
        UpstreamUnavailable: there are none in time, or the key is refused.
    """
    last = UpstreamUnavailable(ErrorKind.UNKNOWN, "no answer in time")
    try:
        async with asyncio.timeout(limit), aclosing(source.updates()) as updates:
            async for update in updates:
                if isinstance(update, ChangeSet) and update.full:
                    return update
                if isinstance(update, Interrupted):
                    last = UpstreamUnavailable(update.kind, update.reason, update.status)
                    if update.refused:
                        break
    except TimeoutError:
        pass
    raise last
