"""Composition of everything that one process serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial

from msgspec import Struct
from starlette.types import ASGIApp

from relay.config.render import MASK
from relay.config.schema import Config
from relay.model.credential import masked_url
from relay.relay import Relay
from relay.server.options import Certificate
from relay.web.fastpath.shared import ConnectionLimits, FastPath
from relay.web.handlers import Handlers


class RelaySite(Struct, frozen=True, kw_only=True):
    """A relay and what goes on beside it."""

    relay: Relay
    exporter: ASGIApp | None = None
    """Application for metrics on a separate port."""
    background: Sequence[Callable[[], Coroutine[object, object, None]]] = ()
    """Coroutine functions that run as long as the server does."""


class Site(RelaySite, frozen=True, kw_only=True):
    """A relay and both of its paths."""

    app: ASGIApp
    fast_path: FastPath
    ready: Callable[[], Coroutine[object, object, None]] | None = None
    """Waits until connections can be accepted; None if they can at once."""
    ends_last: bool = False
    """True if requests in flight need the relay, as a worker's do."""


_log = logging.getLogger("relay")


MAX_NAMED = 10
"""Maximum number of environments to log by name at startup; beyond it, only the count is logged."""


def log_environments(config: Config, relay: Relay) -> None:
    """Log the environments and their data source in a few lines."""
    main = config.main
    if config.auto_config.key:
        return  # none is known yet, and the log will name each
    if config.offline_mode.file_data_source:
        origin = f"archive {config.offline_mode.file_data_source}"
    elif not config.environments:
        origin = f"flags file {main.flags_file}"
    elif main.data_source == "polling":
        origin = f"{_without_secrets(main.base_uri)} (polled)"
    else:
        origin = _without_secrets(main.stream_uri)
    if main.data_system == "fdv2" and config.uses_launchdarkly:
        origin += " by FDv2"
    if len(relay.environments) > MAX_NAMED:
        _log.info("Serving %d environments from %s", len(relay.environments), origin)
        return
    for name, environment in relay.environments.items():
        key = environment.spec.sdk_key.masked
        _log.info('Serving environment "%s" (SDK key %s) from %s', name, key, origin)


def log_events(config: Config) -> None:
    """Log where events go."""
    events = config.events
    if config.offline_mode.file_data_source:
        text = "Events will be accepted, but will be discarded, since offline mode is enabled"
        _log.info("%s", text)
    elif not config.uses_launchdarkly:
        text = "Events will be accepted, but will be discarded, since flags come from a file"
        _log.info("%s", text)
    elif events.send_events:
        target, place = _without_secrets(events.events_uri), events.spool_dir or "memory"
        _log.info("Forwarding events to %s; until then they wait in %s", target, place)


def use_options(handlers: Handlers, config: Config) -> None:
    """Use what a configuration that was read again says to others than the relay."""
    if handlers.webhooks:
        handlers.webhooks.secrets = config.webhook.secrets
    if handlers.traffic.follow_level():
        handlers.relay.registry.renew()  # what is cached would not be logged


def _without_secrets(url: str) -> str:
    """Return a URL for the log, without password and query, which may contain secrets."""
    return masked_url(url.partition("?")[0], MASK)


def build_site(
    config: Config,
    limits: ConnectionLimits,
    read: Callable[[], Config] | None = None,
    hangups: asyncio.Event | None = None,
    certificate: Certificate | None = None,
) -> Site:
    """Build the site. The imports are local because they are heavy: the port opens before them.

    Args:
        config: configuration of the relay.
        limits: limits of each connection.
        read: reads the configuration again; None if it is never reloaded.
        hangups: is set when it shall be read again.
        certificate: of the server, to be renewed then; None without TLS.
    """
    from relay.build.relay import build_with_parts  # noqa: PLC0415
    from relay.events.intake import DiscardingAcceptor  # noqa: PLC0415
    from relay.events.usage import UsageReporter, reported_names  # noqa: PLC0415
    from relay.housekeeping import Housekeeping  # noqa: PLC0415
    from relay.reload import Reload  # noqa: PLC0415
    from relay.server.handlers import make_handlers  # noqa: PLC0415
    from relay.telemetry.traffic import RequestMetrics  # noqa: PLC0415
    from relay.web.app import make_app, make_exporter  # noqa: PLC0415
    from relay.web.routes import POLLS  # noqa: PLC0415

    relay, parts = build_with_parts(config)
    log_environments(config, relay)
    log_events(config)
    traffic = RequestMetrics()
    forwarder = relay.events if config.events.send_events else None
    acceptor = forwarder if config.uses_launchdarkly else DiscardingAcceptor(traffic.discarded)
    handlers = make_handlers(config, relay, traffic, acceptor)
    background = [Housekeeping(relay, (traffic.forget, handlers.events.intake.forget)).run]
    if relay.events:
        accept = relay.events.accept
        names = partial(reported_names, relay.registry)
        background.append(UsageReporter(names, traffic, accept, POLLS).run)
    if handlers.webhooks:
        background.append(handlers.webhooks.run)
    if read and hangups:
        carry_out = partial(use_options, handlers)
        reload = Reload(
            relay,
            config,
            read,
            hangups,
            parts=parts,
            carry_out=carry_out,
            certificate=certificate,
        )
        background.append(reload.run)
    return Site(
        relay=relay,
        app=make_app(handlers),
        fast_path=FastPath(handlers, limits),
        exporter=make_exporter(relay, traffic, config.prometheus.prefix),
        background=background,
    )
