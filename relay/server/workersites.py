"""Composition of what feeder and workers serve: the two halves of a site."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable
from functools import partial

from relay.build.relay import build_with_parts
from relay.build.workers import FeederParts, build_worker
from relay.config.schema import Config
from relay.events.intake import DiscardingAcceptor
from relay.events.usage import UsageReporter, reported_names
from relay.housekeeping import Housekeeping
from relay.protocol.workers import Answer, PageRequest, WebhookRequest
from relay.reload import Reload
from relay.server.handlers import make_handlers
from relay.server.options import ServerOptions
from relay.server.site import RelaySite, Site, log_environments, log_events, use_options
from relay.telemetry.traffic import RequestMetrics
from relay.web.app import make_app, make_exporter
from relay.web.endpoints.webhooks import WebhooksHandler
from relay.web.fastpath.shared import FastPath
from relay.web.pages import Pages
from relay.web.responses import PreparedResponse
from relay.web.routes import POLLS
from relay.workers.counts import SharedCounts
from relay.workers.feeder import Feeder
from relay.workers.figures import FiguresReporter
from relay.workers.link import FeederLink


class FeederSite(RelaySite, frozen=True, kw_only=True):
    """The relay of a feeder."""

    feeder: Feeder


def build_feeder_site(
    config: Config,
    options: ServerOptions,
    memory: mmap.mmap,
    read: Callable[[], Config],
    hangups: asyncio.Event,
) -> FeederSite:
    """Return the site of a feeder.

    Args:
        config: configuration of the relay.
        options: of the workers' servers, whose certificate it checks for all.
        memory: shared by one feeder after the other.
        read: reads the configuration again.
        hangups: is set when it shall be read again.

    Raises:
        ConfigError: a resource that the configuration names is unusable.
    """
    relay, parts = build_with_parts(config, FeederParts)
    log_environments(config, relay)
    log_events(config)
    traffic = RequestMetrics()
    forwarder = relay.events if config.events.send_events else None
    acceptor = forwarder if config.uses_launchdarkly else DiscardingAcceptor(traffic.discarded)
    pages = Pages(relay, traffic)
    counts = SharedCounts(memory, relay, traffic)
    webhooks = WebhooksHandler(relay.environments, config.webhook.secrets)

    def respond(request: PageRequest | WebhookRequest) -> Answer:
        if isinstance(request, PageRequest):
            counts.write()  # the next feeder must not show less
            response = pages.response(request.path, request.query)
        else:
            response = webhooks.respond(request.content, request.signature)
        return Answer(0, response.status, response.headers, response.body)

    def carry_out(config: Config) -> None:
        webhooks.secrets = config.webhook.secrets

    reload = Reload(
        relay, config, read, hangups, parts=parts, carry_out=carry_out, certificate=options.tls
    )
    background = [
        Housekeeping(relay, (traffic.forget,)).run,
        reload.run,
        webhooks.run,
        counts.run,
    ]
    if relay.events:
        names = partial(reported_names, relay.registry)
        background.append(UsageReporter(names, traffic, relay.events.accept, POLLS).run)
    return FeederSite(
        relay=relay,
        exporter=make_exporter(relay, traffic, config.prometheus.prefix),
        background=background,
        feeder=Feeder(relay, traffic, acceptor, respond),
    )


def build_worker_site(
    config: Config,
    options: ServerOptions,
    read: Callable[[], Config],
    hangups: asyncio.Event,
    *,
    address: str | bytes,
    number: int,
) -> Site:
    """Return the site of a worker.

    Args:
        config: configuration of the relay.
        options: options of the server.
        read: reads the configuration again.
        hangups: is set when it shall be read again.
        address: of the feeder's socket.
        number: of the worker.

    Raises:
        ConfigError: a resource that the configuration names is unusable.
    """
    relay, link = build_worker(config, address, number)
    traffic = RequestMetrics()
    sender = link.posts if config.events.send_events else None
    acceptor = sender if config.uses_launchdarkly else DiscardingAcceptor(traffic.discarded)
    ask = partial(_ask_about_webhook, link)
    handlers = make_handlers(config, relay, traffic, acceptor, ask)
    forget = (traffic.forget, handlers.events.intake.forget, link.posts.forget)
    carry_out = partial(use_options, handlers)
    figures = FiguresReporter(relay, traffic, link.send)
    link.on_figures_request = figures.report
    background = [
        Housekeeping(relay, forget).run,
        figures.run,
        Reload(relay, config, read, hangups, carry_out=carry_out, certificate=options.tls).run,
    ]
    return Site(
        relay=relay,
        app=make_app(handlers, partial(_ask, link)),
        fast_path=FastPath(handlers, options.limits),
        background=background,
        ready=link.ready,
        ends_last=True,
    )


async def _ask(link: FeederLink, path: str, query: bytes) -> PreparedResponse | None:
    """Return the feeder's response to a request for a page; None if it does not answer."""
    return _response(await link.requests.page(path, query))


async def _ask_about_webhook(
    link: FeederLink, content: bytes, signature: str
) -> PreparedResponse | None:
    """Return the feeder's response to a webhook; None if it does not answer."""
    return _response(await link.requests.webhook(content, signature))


def _response(answer: Answer | None) -> PreparedResponse | None:
    return PreparedResponse(answer.status, answer.headers, answer.body) if answer else None
