"""Expectations of `/status` (newer-versions 10.3)."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.web import expectations
from relay.web.responses import json as response
from tests.support.serving import Served, ask, serving

PAGE = {
    "environments": {
        "main": {
            "status": "connected",
            "connectionStatus": {"state": "VALID", "stateSince": 1700000000000},
            "sdkKeys": [{"value": "sdk-1"}, {"value": "sdk-2", "expiry": 5}],
            "items": 3,
        },
        "EU (north.1)": {"status": "disconnected"},
    },
    "status": "degraded",
    "autoConfigStatus": {"stored": True},
}


def check(*clauses: str, page: dict = PAGE):
    """Return status code and body of the answer to expectations."""
    query = "&".join(f"expect={quote(clause)}" for clause in clauses)
    answer = expectations.check(response(200, page), query.encode(), expectations.OVERVIEW)
    return answer.status, json.loads(answer.body)


@pytest.mark.parametrize(
    ("clause", "code"),
    [
        ("status=degraded", 200),
        ("status!=healthy", 200),
        ("status=healthy", 412),
        ("status=", 412),
        ("environments.main.status=connected", 200),
        ("environments.main.connectionStatus.state=VALID", 200),
        ("environments.main.connectionStatus.stateSince=1700000000000", 200),
        ("environments.main.items=3", 200),
        ("environments.main.items!=3", 412),
        ("autoConfigStatus.stored=true", 200),
        ('environments["main"].status=connected', 200),
        ("environments['EU (north.1)'].status=disconnected", 200),
        ('environments["EU (north.1)"].status=connected', 412),
        ("environments.main.sdkKeys[1].expiry=5", 200),
        ("environments.main.sdkKeys[7].expiry=5", 412),
        ("environments.main.sdkKeys[value=sdk-2].expiry=5", 200),
        ("environments.main.sdkKeys[value=sdk-3].expiry=5", 412),
        # Known, but absent now: nothing is satisfied, whatever the operator.
        ("environments.other.status=connected", 412),
        ("environments.main.dataStoreStatus.state!=VALID", 412),
        ("status==degraded", 422),
        ("environments.main.items>=3", 422),
        ("environments.main.items<3", 422),
        ("status=~deg", 422),
        ("stat=degraded", 422),
        ("environments=main", 422),
        ("environments.main=connected", 422),
        ("environments.main.status.state=VALID", 422),
        ("environments[0].status=connected", 422),
        ("environments.main.sdkKeys[unknown=1].value=x", 422),
        ("environments.main.sdkKeys.value=x", 422),
        ("environments.main.bigSegmentStatus.available=true", 412),
        ("environments.main.sdkKeys=sdk-1", 422),
        ("status", 400),
        ("", 400),
        ("=connected", 400),
        ("environments[main=connected", 400),
        ("status[", 400),
    ],
)
def test_an_expectation(clause, code):
    """One fact becomes a status code; an absent value satisfies nothing."""
    status, body = check(clause)
    assert status == code, body
    assert body["satisfied"] == (code == 200)
    [result] = body["results"]
    assert result["expr"] == clause
    assert result["ok"] == (code == 200)
    if code in (400, 422):
        assert result["problem"]


def test_the_result_names_expected_and_actual_value():
    """People read it when a deployment waits."""
    _, body = check("status=healthy")
    assert body["results"] == [
        {"expr": "status=healthy", "expected": "healthy", "actual": "degraded", "ok": False}
    ]


@pytest.mark.parametrize(
    ("clauses", "code"),
    [
        (["status=degraded", "environments.main.items=3"], 200),
        (["status=degraded", "environments.main.items=4"], 412),
        (["status=healthy", "stat=x"], 422),
        (["stat=x", "status", "status=healthy"], 400),
    ],
)
def test_all_must_be_satisfied(clauses, code):
    """The most serious problem decides."""
    status, body = check(*clauses)
    assert status == code
    assert [each["expr"] for each in body["results"]] == clauses


@pytest.mark.parametrize("query", [b"expect=%zz", b"expect=%ff", b"expect=a%", b"expect=a;b"])
def test_a_query_that_cannot_be_decoded(query):
    answer = expectations.check(response(200, PAGE), query, expectations.OVERVIEW)
    assert answer.status == 400
    assert json.loads(answer.body) == {
        "satisfied": False,
        "error": "could not parse the query string",
    }


def test_without_expectations_the_page_is_as_it_was():
    """Other parameters are ignored, and errors come first."""
    page = response(200, PAGE)
    assert expectations.check(page, b"x=expect", expectations.OVERVIEW) is page
    escaped = expectations.check(page, b"%65xpect=status=healthy", expectations.OVERVIEW)
    assert escaped.status == 412
    missing = response(404, {"error": "x"})
    assert expectations.check(missing, b"expect=status=x", expectations.ENVIRONMENT) is missing


@given(st.text(max_size=40))
def test_any_text_has_an_answer(clause):
    assert check(clause)[0] in (200, 400, 412, 422)


def paths(value: object, path: str = "") -> list[str]:
    """Return the paths of all single values of a page."""
    if isinstance(value, dict):
        return [each for name, v in value.items() for each in paths(v, f'{path}["{name}"]')]
    if isinstance(value, list):
        return [each for n, v in enumerate(value) for each in paths(v, f"{path}[{n}]")]
    return [path]


async def test_every_value_of_the_pages_can_be_expected():
    """The schema is in step with what the pages say."""
    async with serving(Served()) as address:
        for target in ("/status", "/status/main"):
            page = json.loads((await ask(address, target)).body)
            for path in paths(page):
                answer = await ask(address, f"{target}?expect={quote(path + '!=nothing')}")
                assert answer.status == 200, (path, answer.body)
        answer = await ask(address, "/status/nobody?expect=status=connected")
        assert answer.status == 404
