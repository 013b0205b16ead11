"""The relay as a member of a fleet."""

# ruff: noqa: PLC0415 - implementations are imported where they are chosen

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from msgspec import structs

from relay import randomness
from relay.config.schema import Config, Redis
from relay.environment import Environment
from relay.errors import StoreUnavailable
from relay.model.environment import EnvironmentSpec
from relay.sources import DataSource
from relay.stores import Mirror
from relay.telemetry.log import Log

if TYPE_CHECKING:
    from relay.fleet.member import Member
    from relay.fleet.source import FleetSource

_log = logging.getLogger("relay.fleet")

MAX_READERS = 10_000
"""Connections to one server for feeds: in a cluster each environment has one, all the time."""


def make_member(config: Config) -> Member | None:
    """Return this relay as a member of the configured fleet; None without one."""
    if not config.fleet.enabled or config.redis is None or not config.uses_launchdarkly:
        return None
    from relay.fleet.feed import Feed
    from relay.fleet.member import Member
    from relay.fleet.timings import FleetTimings
    from relay.stores.redis.connect import connect

    timings, options = FleetTimings(), config.redis
    quick = _quick(options, timings.answer)
    wait = timings.wait if options.cluster else timings.poll
    waiting = structs.replace(options, read_timeout=wait + options.read_timeout)
    readers = connect(waiting, MAX_READERS)
    feed = Feed(connect(quick), connect(options), readers, in_cluster=options.cluster)
    name = f"{socket.gethostname()}-{randomness.new_id()[:8]}"
    return Member(feed, name, _log, timings)


async def eviction_warning(config: Config) -> str | None:
    """Return what is wrong with the policy of the fleet's Redis; None if nothing, or unknown.

    It is unknown if there is no fleet, or the server does not answer at once, or not that.
    """
    if not config.fleet.enabled or config.redis is None:
        return None
    from relay.fleet.feed import Feed
    from relay.fleet.member import EVICTS
    from relay.fleet.timings import FleetTimings
    from relay.stores.redis.connect import connect

    options = _quick(config.redis, FleetTimings().answer)
    feed = Feed(*(connect(options) for _ in range(3)), in_cluster=options.cluster)
    prefix = next((each.prefix for each in config.all_environments), "")
    try:
        policy = await feed.evicting_policy(feed.keys(prefix, ""))
    except StoreUnavailable:
        return None
    finally:
        await feed.aclose()
    return None if policy is None else EVICTS % policy


def _quick(options: Redis, seconds: float) -> Redis:
    """Return options for small commands, which must be answered in some seconds."""
    return structs.replace(options, connect_timeout=seconds, read_timeout=seconds)


def fleet_source(
    member: Member, spec: EnvironmentSpec, upstream: DataSource, log: Log
) -> FleetSource:
    """Return what takes an environment's data from upstream or from the fleet."""
    from hashlib import blake2b

    from relay.fleet.source import FleetSource

    identity = blake2b(spec.lineage.encode(), digest_size=9).hexdigest()
    return FleetSource(member, member.feed.keys(spec.prefix, identity), upstream, log)


def join(environment: Environment, source: FleetSource) -> None:
    """Let an environment that has this source take part in the fleet."""
    source.held = lambda: environment.payload
    source.selector = lambda: environment.journal.upstream_selector
    environment.fleet = source


def fleet_source_of(environment: Environment) -> FleetSource | None:
    """Return the part of this relay in an environment's fleet; None without a fleet."""
    return cast("FleetSource | None", environment.fleet)


def fleet_mirror(
    member: Member,
    environment: Environment,
    plain: Callable[[], Mirror],
    *,
    server: str,
) -> Mirror:
    """Return the mirror that publishes an environment in the fleet's Redis.

    Args:
        member: this relay.
        environment: whose data are published; it has joined.
        plain: makes the mirror of a relay without a fleet.
        server: address of Redis, without secrets.
    """
    from relay.fleet.mirror import FleetMirror

    source = cast("FleetSource", environment.fleet)
    programs, log = environment.programs, environment.log
    return FleetMirror(member, source, lambda: programs.version, plain, log, server=server)
