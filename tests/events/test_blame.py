"""Blame for rejections: a table of upstream's answers and the verdicts that follow from them."""

from __future__ import annotations

import pytest

from relay.events import blame
from relay.events.blame import Evidence


def judged(story):
    """Play a story of `x` and others; return the number of the rejection that convicts `x`.

    `+` upstream accepts another batch; `x` it rejects x alone; `y`, `z` others alone; `*` it rejects a
    batch for the first time; `/` a batch with x in it, which is split. `X` is x that it may have.
    """
    evidence, rejections = Evidence(), 0
    for number, step in enumerate(story):
        if step == "+":
            evidence.accept(f"good {number}")
        elif step == "*":
            evidence.doubt(f"batch {number}")
        elif step == "/":
            evidence.split(f"batch {number}", ["x", "other half"])
        else:
            name = step.lower()
            guilty = evidence.reject(name, maybe_delivered=step == "X")
            rejections += name == "x"
            if guilty and name == "x":
                return rejections
    return None


@pytest.mark.parametrize(
    ("story", "convicted"),
    [
        # Upstream accepts others between its rejections.
        ("x+x+x", 3),
        ("/x+x+x", 3),
        ("/+x+x", 2),
        ("x++++x+x", 3),
        # Nothing else comes afterwards: one more rejection, with nothing else rejected.
        ("/+xx", 2),
        ("x+xx", 3),
        ("+xxx+xx", 5),
        # Upstream rejects everything, or there is nothing to compare with.
        ("xxxxxxxxxx", None),
        ("+xxxxxxxxx", None),
        ("++/xxxxxxx", None),
        ("xyxyxyxyxy", None),
        ("+xyzxyzxyz", None),
        # The first moment of an outage; afterwards others are rejected, too.
        ("/+xyxyxyxy", None),
        ("/+x*x*x*x*", None),
        ("x+y+y", None),
        # Two bad ones among good ones.
        ("xy+x+y+x+y", 3),
        ("xy+x+xy", 3),
        ("xy+xyxyxy+xy", 5),
        # It may have arrived: every strike needs others that are accepted.
        ("X+X+X+X", 4),
        ("X+XXX+X+X", 6),
        ("X+X+XXXXXXX", None),
        ("+XXXXXXX", None),
        ("X+y+X+X", None),
        ("X+*X+X+X+X", 5),
    ],
)
def test_a_payload_is_convicted_by_others_that_are_accepted_meanwhile(story, convicted):
    """Only by two rejections after others were accepted; in an outage never."""
    assert judged(story) == convicted


def test_an_outage_is_several_rejected_and_none_accepted():
    """One payload alone is none; the first accepted one ends it."""
    evidence = Evidence()
    for payload, outage in (("x", False), ("x", False), ("y", True), ("z", True)):
        assert not evidence.reject(payload)
        assert evidence.outage is outage
        assert not evidence.accepting
    evidence.accept("good")
    assert not evidence.outage
    assert evidence.accepting


def test_the_number_of_known_batches_is_bounded(monkeypatch):
    """The oldest are forgotten, and retried like new ones."""
    monkeypatch.setattr(blame, "MAX_KNOWN", 3)
    evidence = Evidence()
    for number in range(5):
        evidence.doubt(str(number))
    assert [number for number in range(5) if evidence.knows(str(number))] == [2, 3, 4]
    evidence.accept("4")
    assert not evidence.knows("4")


def test_a_debugger_shows_the_verdict():
    """Accepting, in an outage, or neither."""
    evidence = Evidence()
    assert repr(evidence) == "<Evidence: undecided, 0 known rejections>"
    for payload in "xy":
        evidence.reject(payload)
    assert repr(evidence) == "<Evidence: outage, 2 known rejections>"
    evidence.accept("good")
    assert repr(evidence) == "<Evidence: accepting, 2 known rejections>"
