"""Environments for commands that end: what `relay sync` and `relay archive` read and write."""

# ruff: noqa: PLC0415 - implementations are imported where they are chosen

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING

from msgspec import structs

from relay.build.databases import make_databases, make_places
from relay.build.environments import log_for, spec_of
from relay.build.sources import Session, from_launchdarkly
from relay.config.schema import Config
from relay.errors import ConfigError
from relay.model.environment import EnvironmentSpec
from relay.sources import DataSource
from relay.telemetry.log import Log

if TYPE_CHECKING:
    from relay.sync import SyncTarget


def sync_targets(
    config: Config, names: Collection[str] = (), relay_url: str = "", to: str = ""
) -> tuple[Session, list[SyncTarget]]:
    """Return the upstream session and the sync targets: for each environment each destination.

    Args:
        config: configuration of LaunchDarkly, the database and the environments.
        names: names of the environments to sync; empty for all.
        relay_url: URL of a running relay to read from instead of LaunchDarkly.
        to: URL of the only place to publish documents in; empty for all that is configured.

    Raises:
        ConfigError: there is no destination, or no such environment; see also `build`.
    """
    from relay.stores import DOCUMENT, label_of
    from relay.sync import SyncTarget

    if to:
        config = structs.replace(config, publish=structs.replace(config.publish, to=(to,)))
    databases = () if to else make_databases(config)
    places = make_places(config)
    publish = config.publish
    problems = _missing(config, names)
    if not databases and not publish.to:
        text = "there is no database to bring up to date; USE_REDIS, USE_CONSUL or USE_DYNAMODB"
        text = f"{text} names one, and --to or PUBLISH_TO a place for documents"
        problems.append(text)
    problems += [
        f'environment "{each.name}" has no client-side ID (envId), which names its document'
        for each in config.all_environments
        if publish.to and not each.env_id and (not names or each.name in names)
    ]
    if problems:
        raise ConfigError(problems)
    session, sources = _sources(config, names, relay_url)
    targets: list[SyncTarget] = []
    for spec, make_source, log in sources:
        for number, each in enumerate(databases):
            store, kind, table = each.store_for(spec), each.kind, each.table_of(spec)
            label = label_of(kind, table or store.server) if number else ""
            targets.append(SyncTarget(spec, make_source(), store, log, kind, label, table))
        documents = places.stores(publish.to, publish.token, spec, log) if places else []
        targets += [
            SyncTarget(spec, make_source(), each, log, DOCUMENT, each.label) for each in documents
        ]
    return session, targets


def archive_sources(
    config: Config, names: Collection[str] = (), relay_url: str = ""
) -> tuple[Session, list[tuple[EnvironmentSpec, DataSource]]]:
    """Return the upstream session and the environments for an archive; arguments as above.

    Raises:
        ConfigError: an environment does not exist, or has no client-side ID or is filtered, which
            archives cannot hold; see also `build`.
    """
    problems = _missing(config, names)
    problems += [
        f'"{each.name}" is filtered, and archives hold whole environments only'
        for each in config.all_environments
        if each.filter_key and each.name in names
    ]
    problems += [
        f'environment "{each.name}" has no client-side ID (envId), which archives need'
        for each in config.environments
        if not each.env_id and not each.filter_key and (not names or each.name in names)
    ]
    if problems:
        raise ConfigError(problems)
    session, sources = _sources(config, names, relay_url)
    return session, [(spec, make()) for spec, make, _ in sources if not spec.payload_filter]


def _missing(config: Config, names: Collection[str]) -> list[str]:
    """Return problems with the environments that a command names."""
    known = [each.name for each in config.all_environments]
    problems = [f'there is no environment "{name}"' for name in names if name not in known]
    if not known:
        text = "there is no environment whose flags could be stored"
        if config.auto_config.key:
            text += "; those of automatic configuration are known to a running relay only"
        problems.append(text)
    return problems


def _sources(
    config: Config, names: Collection[str], relay_url: str
) -> tuple[Session, list[tuple[EnvironmentSpec, Callable[[], DataSource], Log]]]:
    """Return the upstream session, and the environments with what makes their sources."""
    if relay_url:
        main = structs.replace(
            config.main, data_source="polling", data_system="fdv1", base_uri=relay_url
        )
        config = structs.replace(config, main=main)
    session, make_source = from_launchdarkly(config)
    specs = [spec_of(each, config) for each in config.all_environments]
    chosen = [(spec, log_for(spec)) for spec in specs if not names or spec.name in names]
    return session, [(spec, partial(make_source, spec, log), log) for spec, log in chosen]
