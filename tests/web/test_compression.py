"""Compressed bodies made of pieces are the same as those compressed in one."""

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
SORTS = {"fixed": {}, "ruled": {"rules": [RULE]}, "drawn": {"fallthrough": HALVES}}


def program_of(*sorts: str) -> Program:
    """A program with twenty flags of each sort."""
    names = [f"{sort}-{n}" for sort in sorts for n in range(20)]
    flags = {name: flag(name, value=name * 50, **SORTS[name.split("-")[0]]) for name in names}
    library = FlagCompiler(payload_of({"flags": flags, "segments": {}}))
    seen = ((name, library.seen(SDKKind.SERVER, name)) for name in sorted(names))
    return Program({name: each for name, each in seen if each}, 1)


def resource_of(program: Program, key: str, plan: str) -> EvaluationResource:
    context = parse_context(json.dumps({"kind": "user", "key": key, "plan": plan}).encode())
    return EvaluationResource(program.body(context, with_reasons=False), ())


@pytest.mark.parametrize(
    "sorts", [(), ("fixed",), ("ruled",), ("drawn",), ("fixed", "drawn"), tuple(SORTS)]
)
def test_any_gzip_reader_gets_the_body(sorts):
    """Whatever the pieces; also of contexts that share some with others."""
    program = program_of(*sorts)
    for key, plan in [("a", "pro"), ("b", "pro"), ("c", "free"), ("a", "pro")]:
        resource = resource_of(program, key, plan)
        answer = resource.compress()
        assert gzip.decompress(answer.body) == resource.body
        assert (b"content-encoding", b"gzip") in answer.headers
        assert len(answer.body) < max(100, len(resource.body) / 3)


def test_what_others_have_is_not_compressed_again():
    """Only the piece that is a context's own, once others with the same features have asked."""
    program = program_of(*SORTS)
    first, second = resource_of(program, "a", "pro"), resource_of(program, "b", "pro")
    assert first.to_compress == first.size
    first.compress()
    assert second.to_compress == len(second.pieces[0]) < second.size / 2


def test_pieces_that_nobody_has_any_more_are_let_go():
    """With the program go the compressed pieces."""
    program = program_of(*SORTS)
    resource_of(program, "a", "pro").compress()
    assert len(compression._deflated) == 2
    del program
    assert len(compression._deflated) == 0


async def test_large_bodies_are_compressed_aside_only_once(monkeypatch):
    """Later contexts need not wait for what they share."""
    program = program_of(*SORTS)
    first, second = resource_of(program, "a", "pro"), resource_of(program, "b", "pro")
    monkeypatch.setattr(resources_module, "MAX_COMPRESSED_AT_ONCE", len(first.pieces[0]) * 2)
    assert first.variant(b"", b"gzip") is None
    await first.compress_in_thread()
    answer = second.variant(b"", b"gzip")
    assert answer is not None
    assert gzip.decompress(answer.body) == second.body
