"""Figures, goals, and the table that compares them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

OURS, PEER, NGINX = "ours", "peer", "nginx"
SERVERS = (PEER, OURS, NGINX)


@dataclass(frozen=True)
class Goal:
    """A bound on our figure: as such, or as a multiple of another server's."""

    bound: float
    least: bool
    times: str = ""
    """The server whose figure `bound` multiplies; empty for a bound on the figure itself."""

    def met(self, medians: Mapping[str, float]) -> bool | None:
        """True if it is reached, None where something was not measured."""
        ours = medians.get(OURS)
        other = medians.get(self.times) if self.times else 1.0
        if ours is None or other is None:
            return None
        return ours >= self.bound * other if self.least else ours <= self.bound * other

    def text(self, unit: str) -> str:
        """As a reader sees it."""
        sign = "≥" if self.least else "≤"
        if not self.times:
            return f"{sign} {self.bound:g} {unit}"
        whose = " nginx" if self.times == NGINX else ""
        return f"{sign} {self.bound:g}×{whose}"


def at_least(bound: float, times: str) -> Goal:
    """Our figure is `bound` times the other server's or more."""
    return Goal(bound, least=True, times=times)


def at_most(bound: float, times: str = "") -> Goal:
    """Our figure is `bound` (times another server's) or less."""
    return Goal(bound, least=False, times=times)


@dataclass(frozen=True)
class Row:
    """One figure that an axis measures; without goals it is there to explain the others."""

    figure: str
    unit: str
    goals: tuple[Goal, ...] = ()


class Figures:
    """Every figure of every round: row → server → one value a round."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = {}

    def add(self, server: str, measured: Mapping[str, float]) -> None:
        """Keep what one round gave."""
        for figure, value in measured.items():
            self._values.setdefault(figure, {}).setdefault(server, []).append(value)

    def medians(self, figure: str) -> dict[str, float]:
        """The median of the rounds, by server."""
        return {name: median(rounds) for name, rounds in self._values.get(figure, {}).items()}

    def as_json(self) -> Mapping[str, Mapping[str, Sequence[float]]]:
        """All rounds, not only medians."""
        return self._values


def markdown(rows: Iterable[Row], figures: Figures) -> str:
    """Two tables: figures that have a goal, then the others."""
    measured = [row for row in rows if figures.medians(row.figure)]
    with_goal = [_cells(row, figures) for row in measured if row.goals]
    others = [_cells(row, figures)[:-2] for row in measured if not row.goals]
    head = ["axis", "unit", "reference", "ours", "ratio", "nginx", "goal", "met?"]
    tables = [(head, with_goal), (head[:-2], others)]
    return "\n\n".join(_table(names, cells) for names, cells in tables if cells)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Row, figures: Figures) -> list[str]:
    medians = figures.medians(row.figure)
    cells = [_number(medians.get(name)) for name in (PEER, OURS)]
    verdicts = [goal.met(medians) for goal in row.goals]
    met = "–" if None in verdicts else "yes" if all(verdicts) else "**no**"
    if False in verdicts:
        met = "**no**"
    goals = " and ".join(goal.text(row.unit) for goal in row.goals)
    ratio = _ratio(medians.get(OURS), medians.get(PEER))
    return [row.figure, row.unit, *cells, ratio, _number(medians.get(NGINX)), goals, met]


def _ratio(ours: float | None, peer: float | None) -> str:
    return f"{ours / peer:.3g}×" if ours is not None and peer else "–"


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
