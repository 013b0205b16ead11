"""The measuring clients and the scripted upstream understand each other."""

import json
from urllib.parse import urlsplit

import pytest

from bench import data
from bench.axes import axes
from bench.crowd import Crowd
from bench.polls import Client
from bench.table import NGINX, OURS, PEER, Figures, Row, at_least, at_most, markdown
from bench.upstream import Upstream


def test_a_crowd_sees_puts_and_patches_of_its_environment() -> None:
    """Every client of a crowd has the first put, and later the last patch of a burst."""
    with Upstream({"sdk-one": "100k", "sdk-two": "2k"}) as upstream:
        port = urlsplit(upstream.url).port
        assert port
        with Crowd(port, "sdk-one", 20) as crowd:
            assert crowd.connect(timeout=10) > 0
            upstream.patch("sdk-two", 2, "not-for-this-crowd")
            sent = upstream.patch("sdk-one", 2, "the-marker", count=5)
            times = crowd.expect("the-marker", timeout=10)
            assert len(times) == 20
            assert times[-1] > sent


def test_a_stream_with_an_unknown_key_is_refused() -> None:
    """The scripted upstream answers 401 for a key that it was not given."""
    with Upstream({"sdk-one": "2k"}) as upstream:
        client = Client(upstream.url, {"Authorization": "sdk-other"})
        assert client.get("/all").status == 401
        client.close()


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("2k", 1_900, 2_300),
        ("100k", 95_000, 105_000),
        ("570k", 550_000, 590_000),
        ("2m", 2_000_000, 2_200_000),
        ("2m-known", 2_000_000, 2_200_000),
    ],
)
def test_data_sets_have_the_size_in_their_name(name: str, least: int, most: int) -> None:
    """A put is as long as its data set's name says, and holds the flags under their keys."""
    put = data.put(name)
    assert least <= len(put) <= most
    flags = json.loads(put)["data"]["flags"]
    assert all(flag["key"] == key for key, flag in flags.items())


def test_every_axis_has_a_name_and_figures_of_its_own() -> None:
    """No figure of one axis overwrites another's."""
    figures = [row.figure for axis in axes() for row in axis.rows]
    assert len(figures) == len(set(figures))
    assert len({axis.name for axis in axes()}) == len(axes())


def test_goals_are_judged_on_medians_and_only_where_both_sides_were_measured() -> None:
    """A missed goal shows as **no**, an unmeasured one as a dash."""
    rows = [
        Row("polls", "req/cpu-s", (at_least(5, PEER), at_least(0.9, NGINX))),
        Row("memory", "MB", (at_most(90),)),
        Row("patch", "ms", (at_most(0.75, PEER),)),
    ]
    figures = Figures()
    for polls in (1.0, 60.0, 55.0):
        figures.add(OURS, {"polls": polls, "memory": 91, "patch": 3})
    figures.add(PEER, {"polls": 10})
    figures.add(NGINX, {"polls": 50})
    polls, memory, patch = markdown(rows, figures).splitlines()[2:]
    assert polls.split(" | ")[2:] == ["10", "55", "5.5×", "50", "≥ 5× and ≥ 0.9× nginx", "yes |"]
    assert memory.endswith("| ≤ 90 MB | **no** |")
    assert patch.endswith("| ≤ 0.75× | – |")
