"""Compressed bodies assembled from fragments."""

from __future__ import annotations

import gzip
import json

import pytest

from relay.evaluation.compiled.program import FlagCompiler, Program
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import parse_context
from relay.web import compression
from relay.web import resources as resources_module
from relay.web.compression import EvaluationResource
from tests.evaluation.strategies import payload_of
from tests.support.data import flag

HALVES = {"rollout": {"variations": [{"variation": n, "weight": 50_000} for n in (0, 1)]}}
RULE = {"variation": 1, "clauses": [{"attribute": "plan", "op": "in", "values": ["pro"]}]}
KINDS = {"fixed": {}, "ruled": {"rules": [RULE]}, "drawn": {"fallthrough": HALVES}}


def program_of(*kinds: str) -> Program:
    """Return a program with twenty flags of each kind."""
    names = [f"{kind}-{n}" for kind in kinds for n in range(20)]
    flags = {name: flag(name, value=name * 50, **KINDS[name.split("-")[0]]) for name in names}
    compiler = FlagCompiler(payload_of({"flags": flags, "segments": {}}))
    visible = ((name, compiler.seen(SDKKind.SERVER, name)) for name in sorted(names))
    return Program({name: compiled for name, compiled in visible if compiled}, 1)


def resource_for(program: Program, key: str, plan: str) -> EvaluationResource:
    context = parse_context(json.dumps({"kind": "user", "key": key, "plan": plan}).encode())
    return EvaluationResource(program.body(context, with_reasons=False), ())


@pytest.mark.parametrize(
    "kinds", [(), ("fixed",), ("ruled",), ("drawn",), ("fixed", "drawn"), tuple(KINDS)]
)
def test_gzip_restores_the_body(kinds):
    """Any combination of fragments is valid gzip, including shared ones."""
    program = program_of(*kinds)
    for key, plan in [("a", "pro"), ("b", "pro"), ("c", "free"), ("a", "pro")]:
        resource = resource_for(program, key, plan)
        response = resource.compress()
        assert gzip.decompress(response.body) == resource.body
        assert (b"content-encoding", b"gzip") in response.headers
        assert len(response.body) < max(100, len(resource.body) / 3)


def test_shared_fragments_are_not_compressed_again():
    """After a context with the same features, only the unshared fragment is compressed."""
    program = program_of(*KINDS)
    first, second = resource_for(program, "a", "pro"), resource_for(program, "b", "pro")
    assert first.to_compress == first.size
    first.compress()
    assert second.to_compress == len(second.pieces[0]) < second.size / 2


def test_compressed_fragments_live_as_long_as_the_program():
    """Compressed fragments are freed with their program."""
    program = program_of(*KINDS)
    resource_for(program, "a", "pro").compress()
    assert len(compression._deflated) == 2
    del program
    assert len(compression._deflated) == 0


async def test_only_the_first_large_body_is_compressed_in_a_thread(monkeypatch):
    """Later bodies need no thread for the fragments that they share."""
    program = program_of(*KINDS)
    first, second = resource_for(program, "a", "pro"), resource_for(program, "b", "pro")
    monkeypatch.setattr(resources_module, "MAX_COMPRESSED_AT_ONCE", len(first.pieces[0]) * 2)
    assert first.variant(b"", b"gzip") is None
    await first.compress_in_thread()
    response = second.variant(b"", b"gzip")
    assert response is not None
    assert gzip.decompress(response.body) == second.body
