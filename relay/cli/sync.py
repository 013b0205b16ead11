"""`relay sync`: bring database and documents up to date once, and print what changed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import partial

import uvloop

from relay.build.commands import sync_targets
from relay.config.schema import Config
from relay.config.types import DOCUMENT_URI, HTTP_URI
from relay.errors import ConfigError
from relay.model.item import Kind
from relay.model.text import one_line
from relay.server.run import until_signal
from relay.sync import SyncOptions, SyncResult, synchronise

MAX_LISTED = 20
"""Maximum number of items that a dry run lists by key per kind of change; the rest are counted."""

FAILED, UNUSABLE = 1, 2
"""Exit codes: an environment is not up to date; the configuration is unusable."""

_log = logging.getLogger("relay")


def sync(
    config: Config,
    environments: Collection[str],
    relay_url: str,
    to: str = "",
    *,
    dry_run: bool = False,
) -> int:
    """Bring the database and published documents up to date once; return the exit code.

    Args:
        config: of LaunchDarkly, the destinations and the environments.
        environments: names of the environments to sync; empty for all.
        relay_url: URL of a running relay to read from; empty to read from LaunchDarkly.
        to: URL of the only place to publish documents in; empty for all that is configured.
        dry_run: print what would change, and write nothing.
    """
    for warning in config.warnings:
        _log.warning("%s", warning)
    try:
        url = HTTP_URI.parse(relay_url) if relay_url else ""
        session, targets = sync_targets(
            config, environments, url, DOCUMENT_URI.parse(to) if to else ""
        )
    except (ConfigError, ValueError) as e:
        _log.error("Configuration error: %s", e)
        return UNUSABLE
    options = SyncOptions(config.main.init_timeout, dry_run=dry_run)
    report = partial(_print_result, dry_run=dry_run)
    results = uvloop.run(until_signal(synchronise(targets, session, options, report)))
    if results is None or any(result.problem for result in results.values()):
        return FAILED
    return 0


def _print_result(result: SyncResult, *, dry_run: bool) -> None:
    """Print the result for one environment; a dry run lists the changed items."""
    counts, changes = result.changes.counts(), result.changes
    if result.problem:
        text = f"failed: {result.problem}"
    elif changes:
        numbers = ", ".join(f"{n} {kind}" for kind, n in counts.items() if kind != "kept")
        text = f"{'would change' if dry_run else 'brought up to date'}: {numbers}"
    else:
        text = "is up to date"
    if counts["kept"] and not result.problem:
        text += f"; {counts['kept']} newer than upstream left as they are"
    name = f"{result.name}, {result.label}" if result.label else result.name
    print(one_line(f"{name}: {text} ({result.items} items upstream)"), flush=True)
    if dry_run:
        for kind in counts:
            _print_keys(kind, getattr(changes, kind))


def _print_keys(change: str, keys: Sequence[tuple[Kind, str]]) -> None:
    for noun, key in sorted((kind.noun, key) for kind, key in keys[:MAX_LISTED]):
        print(f"  {change}: {noun} {key!r}")
    if len(keys) > MAX_LISTED:
        print(f"  {change}: {len(keys) - MAX_LISTED} more")
