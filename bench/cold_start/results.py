"""Results of the measurements, the tables that show them, and their goals."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import inf, isnan
from statistics import median
from typing import NamedTuple

from bench.cold_start.burst import Run
from bench.cold_start.ways import (
    DAEMON,
    DIRECT_POLL,
    DIRECT_STREAM,
    PEER_STREAM,
    RELAY_POLL,
    RELAY_STREAM,
)
from bench.polls import quantile_ms

WAYS = (DIRECT_STREAM, DIRECT_POLL, PEER_STREAM, RELAY_STREAM, RELAY_POLL, DAEMON)
"""In the order of the table."""
CPU_SHARE = 0.2
"""Of the reference's CPU time Relay shall need no more."""


class Scene(NamedTuple):
    """SDK, flags and processes of a burst, whatever the way."""

    sdk: str
    flags: int
    processes: int

    def __str__(self) -> str:
        return f"{self.sdk}, {self.processes} × {self.flags} flags"


class Burst(NamedTuple):
    """Figures of one burst."""

    p50_ms: float
    """Median time from an SDK's construction to the first flag's value."""
    p99_ms: float
    total_p99_ms: float
    """Until `close` had returned."""
    errors: int
    """Processes without the flag's value, and those whose `close` failed or that said nothing."""
    asked: int
    """Requests for flags that arrived at LaunchDarkly."""
    events: int
    """Distinct events that arrived there."""
    sent: int
    """Those whose sender's `close` had returned."""
    cpu: float
    """CPU seconds of the relay until the last event had arrived; NaN without a relay."""


TIMES = 3
"""The first so many members of a burst are times."""


class Starts(NamedTuple):
    """Figures of functions that had a core of their own each, while others asked as they did."""

    p50_ms: float
    """Median time from an SDK's construction to the first flag's value."""
    p99_ms: float
    count: int
    """Those that got the flag's value."""
    errors: int
    """All others."""
    cpu_ms: float
    """CPU time of the relay for one of them and those who ask beside it; NaN without a relay."""


def judged(runs: Sequence[Run], count: int, asked: int, events: int, cpu: float) -> Burst:
    """Sum up a burst of `count` processes."""
    first = [run.first for run in runs if not run.error]
    total = [run.total for run in runs if run.closed]
    return Burst(
        p50_ms=quantile_ms(first, 0.5),
        p99_ms=quantile_ms(first, 0.99),
        total_p99_ms=quantile_ms(total, 0.99),
        errors=count - sum(run.closed and not run.error for run in runs),
        asked=asked,
        events=events,
        sent=len(total),
        cpu=cpu,
    )


@dataclass
class Results:
    """All rounds: bursts, and starts one by one."""

    rounds: dict[tuple[Scene, str], list[Burst]] = field(default_factory=dict)
    single: dict[tuple[Scene, str], list[float]] = field(default_factory=dict)
    """Seconds to the first flag's value; infinite where it did not come."""
    cpu: dict[tuple[Scene, str], list[float]] = field(default_factory=dict)
    """CPU seconds of the relay for each round's starts."""

    def add(self, scene: Scene, way: str, burst: Burst) -> None:
        """Keep what one round gave."""
        self.rounds.setdefault((scene, way), []).append(burst)

    def add_starts(
        self, scene: Scene, way: str, runs: Sequence[Run], count: int, cpu: float
    ) -> None:
        """Keep how `count` functions fared that started one by one, and the relay's CPU seconds."""
        times = [run.unhindered for run in runs if not run.error]
        times += [inf] * (count - len(times))
        self.single.setdefault((scene, way), []).extend(times)
        self.cpu.setdefault((scene, way), []).append(cpu)

    def scenes(self) -> list[Scene]:
        """Those that were measured, in their order."""
        return list(dict.fromkeys(scene for scene, _ in (*self.single, *self.rounds)))

    def starts(self, scene: Scene, way: str) -> Starts | None:
        """All rounds' starts together."""
        times = self.single.get((scene, way))
        if not times:
            return None
        errors = times.count(inf)
        p50, p99 = quantile_ms(times, 0.5), quantile_ms(times, 0.99)
        cpu_ms = sum(self.cpu[scene, way]) / len(times) * 1000
        return Starts(p50, p99, len(times) - errors, errors, cpu_ms)

    def middle(self, scene: Scene, way: str) -> Burst | None:
        """Times as medians of the rounds, and what is counted as sums."""
        bursts = self.rounds.get((scene, way))
        if not bursts:
            return None
        columns = Burst(*map(list, zip(*bursts, strict=True)))
        return Burst(
            *(median(times) for times in columns[:TIMES]),
            *(sum(counts) for counts in columns[TIMES:-1]),
            median(columns.cpu),
        )

    def as_json(self) -> list[dict[str, object]]:
        """All that was measured."""
        bursts = [
            {**scene._asdict(), "way": way, **burst._asdict()}
            for (scene, way), bursts in self.rounds.items()
            for burst in bursts
        ]
        starts = [
            {**scene._asdict(), "way": way, "starts": times, "cpu": self.cpu[scene, way]}
            for (scene, way), times in self.single.items()
        ]
        return [*starts, *bursts]


def markdown(results: Results) -> str:
    """The starts, the bursts, then the goals."""
    scene_head = ["SDK", "flags", "at once", "way"]
    starts = [
        [*_named(scene, way), *_starts_cells(own)]
        for scene, way in product(results.scenes(), WAYS)
        if (own := results.starts(scene, way))
    ]
    bursts = [
        [*_named(scene, way), *_cells(burst)]
        for scene, way in product(results.scenes(), WAYS)
        if (burst := results.middle(scene, way))
    ]
    goals = [[goal, worst, "yes" if met else "**no**"] for goal, worst, met in verdicts(results)]
    burst_head = ["p50 ms", "p99 ms", "closed p99 ms"]
    burst_head += ["errors", "flag requests", "events", "relay CPU s"]
    tables = [
        ([*scene_head, "p50 ms", "p99 ms", "starts", "errors", "relay CPU ms"], starts),
        ([*scene_head, *burst_head], bursts),
        (["goal", "measured", "met?"], goals),
    ]
    return "\n\n".join(_table(names, cells) for names, cells in tables if cells)


def _named(scene: Scene, way: str) -> list[str]:
    return [scene.sdk, f"{scene.flags}", f"{scene.processes}", way]


def _starts_cells(starts: Starts) -> list[str]:
    cpu = "–" if isnan(starts.cpu_ms) else _time(starts.cpu_ms)
    return [_time(starts.p50_ms), _time(starts.p99_ms), f"{starts.count}", f"{starts.errors}", cpu]


def _cells(burst: Burst) -> list[str]:
    times = [_time(each) for each in burst[:TIMES]]
    cpu = f"{burst.cpu:.2f}" if not isnan(burst.cpu) else "–"
    events = f"{burst.events} of {burst.sent}"
    return [*times, str(burst.errors), str(burst.asked), events, cpu]


def _time(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Verdict(NamedTuple):
    """A goal, what of all that was measured comes nearest to missing it, and whether it is met."""

    goal: str
    worst: str
    met: bool


def verdicts(results: Results) -> Iterator[Verdict]:
    """Judge what was measured; what was not is left out."""
    others = {
        RELAY_STREAM: (PEER_STREAM, DIRECT_STREAM),
        RELAY_POLL: (PEER_STREAM, DIRECT_POLL),
    }
    for way, compared in others.items():
        for other in compared:
            yield from _faster(results, way, other)
    yield from _less_cpu(results)
    relayed = [
        (scene, way, burst)
        for scene in results.scenes()
        for way in others
        if (burst := results.middle(scene, way))
    ]
    if relayed:
        asked = sum(burst.asked for _, _, burst in relayed)
        yield Verdict("Relay: requests for flags upstream during bursts: 0", str(asked), asked == 0)
        lost = sum(max(0, burst.sent - burst.events) for _, _, burst in relayed)
        sent = sum(burst.sent for _, _, burst in relayed)
        goal = "Relay: events lost whose `close` had returned: 0"
        yield Verdict(goal, f"{lost} of {sent}", lost == 0)
        errors = sum(burst.errors for _, _, burst in relayed)
        yield Verdict("Relay: processes that failed: 0", str(errors), errors == 0)


def _faster(results: Results, way: str, other: str) -> Iterator[Verdict]:
    """Judge how late the last of a hundred functions is, each of which had a core of its own."""
    for place in ("alone", "among others"):
        ratios = [
            (ours.p99_ms / theirs.p99_ms, scene)
            for scene in results.scenes()
            if (scene.processes > 1) == (place != "alone")
            and (ours := results.starts(scene, way))
            and (theirs := results.starts(scene, other))
        ]
        if ratios:
            ratio, scene = max(ratios)
            goal = f"{way}, {place}: p99 < {other}"
            yield Verdict(goal, f"{ratio:.2f}× ({scene})", ratio < 1)


def _less_cpu(results: Results) -> Iterator[Verdict]:
    """Judge the largest scene of each SDK: in small ones the clock's ticks are too coarse."""
    largest = {scene.sdk: scene for scene in sorted(results.scenes(), key=lambda s: s[1:])}
    for scene in largest.values():
        for way in (RELAY_STREAM, RELAY_POLL):
            goal = f"{way}: CPU ≤ {CPU_SHARE}× reference, {scene}"
            theirs = _cpu_costs(results, scene, PEER_STREAM)
            for how, cost in _cpu_costs(results, scene, way).items():
                if theirs.get(how):
                    ratio = cost / theirs[how]
                    yield Verdict(f"{goal}, {how}", f"{ratio:.2f}×", ratio <= CPU_SHARE)


def _cpu_costs(results: Results, scene: Scene, way: str) -> dict[str, float]:
    """The relay's CPU time by how functions came together, where that was measured."""
    costs = {}
    if starts := results.starts(scene, way):
        costs["at the same moment"] = starts.cpu_ms
    if burst := results.middle(scene, way):
        costs["on one core"] = burst.cpu
    return costs
