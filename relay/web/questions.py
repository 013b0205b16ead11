"""Contexts that ask for their flags at the front door: plain GETs, without the application."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from relay.environment import Environment
from relay.evaluation.audience import Audience
from relay.model.count import Count
from relay.relay import Relay
from relay.web.answers import Answer
from relay.web.auth import by_plain_key
from relay.web.cors import cors_lines
from relay.web.endpoint import BROWSER, MOBILE, SERVER, Access
from relay.web.evaluation import Evaluation
from relay.web.traffic import Series, Traffic, client

METHODS = ("GET", "OPTIONS")
"""Of the routes of browsers, as they are told."""

_BROWSERS = re.compile(rb"/sdk/evalx/([0-9A-Za-z_-]+)/(contexts|users)")


class Route(NamedTuple):
    """Where a kind of client asks."""

    template: str
    audience: Audience
    access: Access


_BY_KEY: Mapping[bytes, Route] = {
    b"/%b/evalx/%b" % (root, name): Route(
        f"/{root.decode()}/evalx/{name.decode()}/{{context}}", audience, access
    )
    for root, audience, access in (
        (b"sdk", Audience.SERVER, SERVER),
        (b"msdk", Audience.MOBILE, MOBILE),
    )
    for name in (b"contexts", b"users")
}
_BY_ID: Mapping[bytes, Route] = {
    name: Route(f"/sdk/evalx/{{envId}}/{name.decode()}/{{context}}", Audience.BROWSER, BROWSER)
    for name in (b"contexts", b"users")
}


class Questions:
    """What answers them.

    Args:
        relay: whose environments are served.
        evaluation: evaluates; the application has the same.
        traffic: counts requests; the application has the same.
    """

    def __init__(self, relay: Relay, evaluation: Evaluation, traffic: Traffic) -> None:
        self._relay = relay
        self._evaluation = evaluation
        self._traffic = traffic

    def answer(self, url: bytes, headers: Mapping[bytes, bytes]) -> tuple[Answer, Count] | None:
        """Return the answer to a GET and what counts it; None if it is the application's.

        Args:
            url: as on the wire.
            headers: of the request, each once.
        """
        path, _, query = url.partition(b"?")
        prefix, _, segment = path.rpartition(b"/")
        route, environment = self._found(prefix, headers)
        if route is None or environment is None:
            return None
        answer = self._evaluation.answer(
            environment,
            route.audience,
            segment,
            query,
            if_none_match=headers.get(b"if-none-match", b""),
            accept_encoding=headers.get(b"accept-encoding", b""),
        )
        if answer is None:
            return None
        spec, access = environment.spec, route.access
        agent = client(self._traffic, headers)
        series = Series(spec.name, route.template, "GET", access.platform, agent)
        if access is BROWSER:
            origin = headers.get(b"origin", b"")
            answer = answer.with_headers(*cors_lines(spec, origin, METHODS, access.exposed))
        return answer, self._traffic.requests[series]

    def _found(
        self, prefix: bytes, headers: Mapping[bytes, bytes]
    ) -> tuple[Route | None, Environment | None]:
        route = _BY_KEY.get(prefix)
        if route is not None:
            mobile = route.access is MOBILE
            known = self._relay.by_mobile_key if mobile else self._relay.by_sdk_key
            return route, by_plain_key(known, headers)
        match = _BROWSERS.fullmatch(prefix)
        if match is None:
            return None, None
        return _BY_ID[match[2]], self._relay.by_environment_id.get(match[1].decode())
