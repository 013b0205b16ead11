"""Responses of the fast path: bytes on the wire, and their cache by request head."""

from __future__ import annotations

from relay.model.metrics import MetricValue
from relay.web.fastpath import cache
from relay.web.fastpath.cache import JOINED_BODY, HeadCache, WireResponse
from relay.web.fastpath.heads import MAX_HEAD
from tests.support.serving import Served

HEAD = b"GET / HTTP/1.1\r\nX-LaunchDarkly-Instance-Id: %b\r\nHost: x\r\n\r\n"


def response(served: Served, body: bytes = b"ab", *, closes: bool = False) -> WireResponse:
    environment = served.environment
    head = b"HTTP/1.1 200 OK\r\n"
    return WireResponse(environment, None, head, (body,), MetricValue(), closes, size=len(body))


def test_bytes_are_assembled_once_for_each_date():
    """Small bodies are joined with their head, large ones are not copied."""
    one = response(Served())
    date = b"date: x\r\n\r\n"
    parts = one.to_wire(date)
    assert parts == (b"HTTP/1.1 200 OK\r\ndate: x\r\n\r\nab",)
    assert one.to_wire(date) is parts
    assert one.to_wire(b"date: y\r\n\r\n") == (b"HTTP/1.1 200 OK\r\ndate: y\r\n\r\nab",)
    body = b"x" * (JOINED_BODY + 1)
    assert response(Served(), body).to_wire(date)[2] is body
    [closing] = response(Served(), closes=True).to_wire(date)
    assert closing == b"HTTP/1.1 200 OK\r\nconnection: close\r\ndate: x\r\n\r\nab"


def test_instances_of_a_client_share_a_response():
    """Values that differ between instances are not part of the key; everything else is."""
    served = Served()
    heads = HeadCache(served.relay.registry)
    heads.keep(HEAD % b"1", one := response(served))
    assert heads.get_similar(HEAD % b"2") is one
    assert heads.get_similar(HEAD.replace(b"Host: x", b"Host: y") % b"1") is None
    plain = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    heads.keep(plain, two := response(served))
    assert heads.get(plain) is two


def test_evaluations_are_kept_by_the_head_as_it_is():
    """An evaluation is found without normalisation, which would cost more than it helps."""
    served = Served()
    heads = HeadCache(served.relay.registry)
    head = HEAD.replace(b"GET /", b"GET /sdk/evalx/contexts/x") % b"1"
    heads.keep(head, one := response(served))
    assert heads.get(head) is one


def test_the_cache_is_bounded(monkeypatch):
    """Sizes of responses and heads count; overlong heads, and what has no size, are not kept."""
    monkeypatch.setattr(cache, "MAX_CACHED", 100 * 1024)
    served = Served()
    heads = HeadCache(served.relay.registry)
    plain = [b"GET /%d HTTP/1.1\r\n\r\n" % n for n in range(100)]
    for head in plain:
        heads.keep(head, response(served, b"x" * 16 * 1024))
        assert heads.size <= 100 * 1024
    assert len(heads) == 6
    overlong = b"GET / HTTP/1.1\r\nA: " + b"x" * MAX_HEAD + b"\r\n\r\n"
    heads.keep(overlong, response(served))
    heads.keep(b"GET / HTTP/1.1\r\n\r\n", response(served, b""))
    assert len(heads) == 6
