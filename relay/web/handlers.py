"""The handlers of one relay's endpoints, which the application and the fast path share."""

from __future__ import annotations

from msgspec import Struct

from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics
from relay.web.endpoints.evaluation import EvaluationHandler
from relay.web.endpoints.events import EventsHandler
from relay.web.endpoints.goals import GoalsHandler
from relay.web.endpoints.polling import PollingHandler
from relay.web.endpoints.webhooks import WebhooksHandler


class Handlers(Struct, frozen=True, eq=False, kw_only=True):
    """Handlers of all endpoints that have state."""

    relay: Relay
    traffic: RequestMetrics
    """Counts requests."""
    polling: PollingHandler
    evaluation: EvaluationHandler
    events: EventsHandler
    goals: GoalsHandler
    webhooks: WebhooksHandler | None = None
    """None if webhooks are disabled."""

    @classmethod
    def of(
        cls,
        relay: Relay,
        *,
        traffic: RequestMetrics | None = None,
        evaluation: EvaluationHandler | None = None,
        events: EventsHandler | None = None,
        goals: GoalsHandler | None = None,
        webhooks: WebhooksHandler | None = None,
    ) -> Handlers:
        """Return handlers for a relay; without others given, events are disabled and goals empty.

        Args:
            relay: to serve.
            traffic: counters that others share.
            evaluation: handler with settings of its own.
            events: handler with an acceptor.
            goals: handler with a session.
            webhooks: handler with a secret.
        """
        return cls(
            relay=relay,
            traffic=traffic or RequestMetrics(),
            polling=PollingHandler(),
            evaluation=evaluation or EvaluationHandler(relay.registry),
            events=events or EventsHandler(),
            goals=goals or GoalsHandler(),
            webhooks=webhooks,
        )
