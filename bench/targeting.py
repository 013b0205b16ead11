"""Made-up flags and segments that many rules decide, and the contexts that ask for them.

Names and values are of the kind that teams have. Few rules match any one context, and most contexts
match another set of rules than those before.
"""

import random
from collections.abc import Iterable
from itertools import permutations
from typing import Any

CODES = """
ar at au be bg br ca ch cl cn co cz de dk ee eg es fi fr gb gr hk hr hu id ie il in is it jp ke
kr lt lu lv ma mx my ng nl no nz pe ph pk pl pt ro rs sa se sg si sk th tr tw ua us vn za
"""
WORDS = """
alder amber birch cedar cobalt ember fjord granit harbor indigo linden maple
bank care data energy foods games health labs logistics media motors soft
"""
COUNTRIES = tuple(CODES.split())
COMPANIES = tuple(f"{one}{other}.example" for one, other in permutations(WORDS.split(), 2))[::3]
VERSIONS = tuple(f"{major}.{minor}." for major in range(3, 9) for minor in range(20))
"""Beginnings of an app's versions; a last number follows."""
PATCHES = 10
VALUES = 4
"""Of each clause."""
SEGMENTS = 20
MEMBERS = 100
"""Keys that a segment lists."""


def rules(index: int) -> list[dict[str, Any]]:
    """Two rules of a flag: one clause, then two, over three attributes in turn."""
    made = clauses(f"flag-{index}")
    made = made[index % 3 :] + made[: index % 3]
    return [
        {"variation": 1, "id": "rule-0", "clauses": made[:1]},
        {"variation": 1, "id": "rule-1", "clauses": made[1:]},
    ]


def segment_rules(index: int) -> list[dict[str, Any]]:
    """A rule of a flag that asks for one of the segments."""
    named = clause("", "segmentMatch", [segment_key(index % SEGMENTS)])
    return [{"variation": 1, "id": "rule-0", "clauses": [named]}]


def segments(version: int) -> dict[str, Any]:
    """Segments by key; each lists some keys, and has rules besides."""
    return {
        segment_key(index): {
            "key": segment_key(index),
            "version": version,
            "included": [f"user-{number:09}" for number in range(index, index + MEMBERS)],
            "excluded": [],
            "salt": f"salt-{index}",
            "rules": [{"id": "rule", "clauses": [each]} for each in clauses(f"segment-{index}")],
            "deleted": False,
        }
        for index in range(SEGMENTS)
    }


def segment_key(index: int) -> str:
    """The key of segment number `index`."""
    return f"segment-{index:03}"


def clauses(seed: str) -> list[dict[str, Any]]:
    """One clause for each of three attributes."""
    chance = random.Random(seed)
    return [
        clause("country", "in", chance.sample(COUNTRIES, VALUES)),
        clause("email", "endsWith", ["@" + name for name in chance.sample(COMPANIES, VALUES)]),
        clause("appVersion", "startsWith", chance.sample(VERSIONS, VALUES)),
    ]


def clause(attribute: str, operator: str, values: Iterable[Any]) -> dict[str, Any]:
    """A clause of a rule."""
    return {"attribute": attribute, "op": operator, "values": list(values), "negate": False}


def _shuffled(texts: Iterable[str]) -> tuple[str, ...]:
    given = list(texts)
    random.Random(2).shuffle(given)
    return tuple(given)


CONTEXT_MIDDLES = tuple(f'","country":"{each}","email":"anna.b.' for each in _shuffled(COUNTRIES))
"""Between a context's key and the number in its e-mail address."""
CONTEXT_ENDS = tuple(
    f'@{company}","appVersion":"{version}{patch}"}}'
    for company, version, patch in zip(
        _shuffled(COMPANIES * 6),
        _shuffled(VERSIONS * 9),
        random.Random(3).choices(range(PATCHES), k=997),
        strict=False,
    )
)
"""997 of them, so that all pairs of a middle and an end come in turn."""
