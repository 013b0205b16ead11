"""The command line: `python -m bench.cold_start`."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from math import nan
from pathlib import Path

from bench.cold_start.burst import SDKS, Run, standing_ready
from bench.cold_start.companions import Companions, Overheard, overhear
from bench.cold_start.plot import svg
from bench.cold_start.results import WAYS, Burst, Results, Scene, judged, markdown
from bench.cold_start.ways import DATASETS, Way, await_events, ways
from bench.machine import LOAD_CORE, Process, allow_many_files, pinned
from bench.measures import SILENCE_SECONDS
from bench.servers import OWN_COMMAND

PAUSE = 0.03
"""Seconds between two functions, in which the former ends."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, and print the tables.

    Returns:
        The exit code: 1 when something could not be measured.
    """
    options = _parser().parse_args(arguments)
    allow_many_files()
    results = Results()
    failures = 0
    chosen = [way for way in ways(options.relay, options.peer) if _chosen(way, options.way)]
    scenes = map(Scene._make, product(options.sdk, options.flags, options.n))
    with pinned(LOAD_CORE):
        for scene, number, way in product(scenes, range(1, options.rounds + 1), chosen):
            told = f"{scene} {number}/{options.rounds} {way.name}"
            try:
                if options.starts:
                    runs, cpu = measure_starts(scene, way, options.starts)
                    results.add_starts(scene, way.name, runs, options.starts, cpu)
                    print(f"{told}: {results.starts(scene, way.name)}", file=sys.stderr, flush=True)
                if options.bursts:
                    burst = measure(scene, way)
                    results.add(scene, way.name, burst)
                    print(f"{told}: {burst}", file=sys.stderr, flush=True)
            except (OSError, RuntimeError) as error:
                notes = "\n".join(getattr(error, "__notes__", ()))
                print(f"{told}: failed: {error}\n{notes}", file=sys.stderr)
                failures += 1
    print(markdown(results))
    if options.json:
        Path(options.json).write_text(json.dumps(results.as_json(), indent=1))
    if options.plot:
        Path(options.plot).write_text(svg(results))
    return 1 if failures else 0


def measure(scene: Scene, way: Way) -> Burst:
    """One burst with a place of its own."""
    with way.open(DATASETS[scene.flags]) as place:
        relay, upstream = place.relay, place.upstream
        with standing_ready(scene.sdk, place.setup, scene.processes) as standing:
            asked = upstream.asked()
            cpu = _cpu_seconds(relay)
            runs = standing.let_all_go()
            asked = upstream.asked() - asked
        sent = sum(run.closed for run in runs)
        events = await_events(upstream, sent, SILENCE_SECONDS)
        cpu = _cpu_seconds(relay) - cpu
        return judged(runs, scene.processes, asked, events, cpu)


def measure_starts(scene: Scene, way: Way, count: int) -> tuple[list[Run], float]:
    """Start `count` functions one by one, each beside companions that make up the scene's number.

    Daemon mode asks no server, and has no companions.

    Returns:
        How the functions fared, and the CPU seconds of the relay; NaN without a relay.
    """
    with way.open(DATASETS[scene.flags]) as place:
        relay, setup = place.relay, place.setup
        others = 0 if setup.redis else scene.processes - 1
        overheard = overhear(scene.sdk, setup) if others else Overheard(b"", 0)
        companions = Companions(setup.flags_url, overheard, others)
        runs = []
        with standing_ready(scene.sdk, setup, count) as standing:
            cpu = _cpu_seconds(relay)
            for _ in range(count):
                standing.let_one_go()
                companions.ask()
                runs += standing.one()
                time.sleep(PAUSE)
            cpu = _cpu_seconds(relay) - cpu
        return runs, cpu


def _cpu_seconds(relay: Process | None) -> float:
    """Return what the relay has used until now; NaN without a relay."""
    return relay.cpu_seconds() if relay else nan


def _chosen(way: Way, prefixes: Sequence[str]) -> bool:
    return not prefixes or any(way.name.startswith(prefix) for prefix in prefixes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.cold_start", description=__doc__)
    parser.add_argument(
        "--peer", metavar="CMD", default="", help="command line of a relay to compare with"
    )
    parser.add_argument(
        "--relay", metavar="CMD", default=OWN_COMMAND, help="ours (default: %(default)s)"
    )
    parser.add_argument("--n", type=_numbers, default=[1, 50, 200], help="processes: 1,50,200")
    parser.add_argument("--flags", type=_flags, default=[10, 1000], help="flags: 10,1000")
    parser.add_argument("--sdk", type=_sdks, default=list(SDKS), help="SDKs: python,node")
    parser.add_argument(
        "--way",
        metavar="NAME",
        action="append",
        default=[],
        help="only ways whose name begins so; may be repeated: " + "; ".join(WAYS),
    )
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument(
        "--starts",
        type=int,
        default=50,
        help="of single functions in each round; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--bursts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether all processes start together, too",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the times there, as SVG")
    parser.add_argument("--json", metavar="FILE", help="write every round's figures there")
    return parser


def _numbers(text: str) -> list[int]:
    numbers = [int(each) for each in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("not a number of processes")
    return numbers


def _flags(text: str) -> list[int]:
    numbers = [int(each) for each in text.split(",")]
    if not DATASETS.keys() >= set(numbers):
        raise argparse.ArgumentTypeError(f"there are {sorted(DATASETS)}")
    return numbers


def _sdks(text: str) -> list[str]:
    names = text.split(",")
    if not set(SDKS) >= set(names):
        raise argparse.ArgumentTypeError(f"there are {SDKS}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
