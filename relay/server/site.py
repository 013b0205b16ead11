"""Everything that one process serves, and how it is put together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp

from relay.config.render import MASK
from relay.config.schema import Config
from relay.model.credential import masked_url
from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics
from relay.web.fastpath.events import EventsFastPath
from relay.web.fastpath.shared import EvaluationResponder, PollResponder


@dataclass(frozen=True, slots=True)
class Site:
    """What is served: a relay, the application, and what the front door has in common with it."""

    relay: Relay
    app: ASGIApp
    poll: PollResponder | None = None
    traffic: RequestMetrics | None = None
    exporter: ASGIApp | None = None
    """What is served on a port of its own."""
    background: Sequence[Callable[[], Coroutine[object, object, None]]] = ()
    """What runs as long as the server does."""
    posts: EventsFastPath | None = None
    questions: EvaluationResponder | None = None


_log = logging.getLogger("relay")


INTRODUCED = 10
"""Environments that are named one by one at the start; of more, only the number is said."""


def _introduce(config: Config, relay: Relay) -> None:
    """Say in a few lines what is served, and where it comes from."""
    main = config.main
    if not config.environments:
        origin = f"flags file {main.flags_file}"
    elif main.data_source == "polling":
        origin = f"{_shown(main.base_uri)} (polled)"
    else:
        origin = _shown(main.stream_uri)
    if len(relay.environments) > INTRODUCED:
        _log.info("Serving %d environments from %s", len(relay.environments), origin)
        return
    for name, environment in relay.environments.items():
        key = environment.spec.sdk_key.masked
        _log.info('Serving environment "%s" (SDK key %s) from %s', name, key, origin)


def _introduce_events(config: Config) -> None:
    events = config.events
    if not config.environments:
        text = "Events will be accepted, but will be discarded, since flags come from a file"
        _log.info("%s", text)
    elif events.send_events:
        to, place = _shown(events.events_uri), events.spool_dir or "memory"
        _log.info("Forwarding events to %s; until then they wait in %s", to, place)


def _shown(url: str) -> str:
    """Return an address for a line: without password and query, where there may be secrets."""
    return masked_url(url.partition("?")[0], MASK)


def build_site(config: Config) -> Site:
    """Make what is served. Its imports are heavy, so they wait until the port is open."""
    from relay.build import build  # noqa: PLC0415
    from relay.events.usage import UsageReporter  # noqa: PLC0415
    from relay.telemetry.traffic import RequestMetrics  # noqa: PLC0415
    from relay.web.app import make_app, make_exporter  # noqa: PLC0415
    from relay.web.endpoints.evaluation import EvaluationHandler  # noqa: PLC0415
    from relay.web.endpoints.events import Discarder, EventsHandler  # noqa: PLC0415
    from relay.web.endpoints.goals import Goals  # noqa: PLC0415
    from relay.web.endpoints.polling import PollingHandler  # noqa: PLC0415
    from relay.web.endpoints.webhooks import Webhooks  # noqa: PLC0415
    from relay.web.fastpath.evaluation import EvaluationFastPath  # noqa: PLC0415
    from relay.web.fastpath.events import EventsFastPath  # noqa: PLC0415

    relay = build(config)
    _introduce(config, relay)
    _introduce_events(config)
    polling, traffic = PollingHandler(), RequestMetrics()
    forwarder = relay.events if config.events.send_events else None
    takes = forwarder if config.environments else Discarder(traffic.discarded)
    events = EventsHandler(takes, config.events.max_inbound_payload_size, traffic.unusable)
    evaluation = EvaluationHandler(config.main.max_client_request_body_size)
    goals = Goals(relay.fetch, config.main.client_side_base_uri)
    secrets = config.webhook.secrets
    webhooks = Webhooks(relay.environments.values(), secrets) if secrets else None
    app = make_app(relay, polling, traffic, events, webhooks, evaluation=evaluation, goals=goals)
    exporter = make_exporter(relay, traffic, config.prometheus.prefix)
    beside = (
        [UsageReporter(relay.environments, traffic, relay.events.accept).run]
        if relay.events
        else []
    )
    if webhooks:
        beside.append(webhooks.run)
    posts, questions = (
        EventsFastPath(relay, events, traffic),
        EvaluationFastPath(relay, evaluation, traffic),
    )
    return Site(relay, app, polling, traffic, exporter, beside, posts, questions)
