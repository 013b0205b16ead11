"""Handlers of the endpoints, as configured: of a relay that is one process, and of a worker."""

from __future__ import annotations

from relay.config.schema import Config
from relay.events.intake import EventAcceptor
from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics
from relay.web.endpoints.evaluation import EvaluationHandler
from relay.web.endpoints.events import EventsHandler
from relay.web.endpoints.goals import GoalsHandler
from relay.web.endpoints.webhooks import Ask, WebhooksHandler
from relay.web.handlers import Handlers


def make_handlers(
    config: Config,
    relay: Relay,
    traffic: RequestMetrics,
    acceptor: EventAcceptor | None,
    ask: Ask | None = None,
) -> Handlers:
    """Return the handlers of a relay.

    Args:
        config: its configuration.
        relay: to serve.
        traffic: counts requests.
        acceptor: accepts events; None if they are disabled.
        ask: lets the feeder respond to webhooks, if this is a worker.
    """
    size, secrets = config.events.max_inbound_payload_size, config.webhook.secrets
    webhooks = WebhooksHandler(relay.environments, secrets, ask=ask) if secrets else None
    return Handlers.of(
        relay,
        traffic=traffic,
        evaluation=EvaluationHandler(relay.registry, config.main.max_client_request_body_size),
        events=EventsHandler(acceptor, size, traffic.unusable),
        goals=GoalsHandler(relay.fetch, config.main.client_side_base_uri),
        webhooks=webhooks,
    )
