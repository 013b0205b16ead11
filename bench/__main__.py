"""The command line: `python -m bench`."""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench import rotation
from bench.axes import Axis, axes
from bench.machine import LOAD_CORE, allow_many_files, pinned
from bench.servers import (
    OWN_COMMAND,
    Certificate,
    Nginx,
    Relay,
    Server,
    has_nginx,
    make_certificate,
)
from bench.table import NGINX, OURS, PEER, Figures, markdown

STREAMS = 15_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, and print the table.

    Returns:
        The exit code: 1 when something could not be measured.
    """
    options = _parser().parse_args(arguments)
    chosen = [axis for axis in axes(options.rotation_streams) if _chosen(axis.name, options.only)]
    if options.list:
        print(listed(chosen))
        return 0
    servers = _servers(options)
    if allow_many_files() < STREAMS + 100:
        print(f"the limit of open files is too low for {STREAMS} streams", file=sys.stderr)
    gc.disable()
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, pinned(LOAD_CORE):
        Path(folder).chmod(0o755)
        certificate = make_certificate(Path(folder))
        failures = sum(_run(axis, servers, options.rounds, certificate, figures) for axis in chosen)
    print(markdown((row for axis in chosen for row in axis.rows), figures))
    if options.json:
        Path(options.json).write_text(json.dumps(figures.as_json(), indent=1))
    return 1 if failures else 0


def _run(
    axis: Axis,
    servers: Mapping[str, Server],
    rounds: int,
    certificate: Certificate,
    figures: Figures,
) -> int:
    """Measure one axis: all servers in turn, then all again. Return how often that failed."""
    failures = 0
    for number in range(1, rounds + 1):
        for name, server in servers.items():
            if name == NGINX and not axis.on_nginx:
                continue
            try:
                measured = axis.measure(server, certificate)
            except (OSError, RuntimeError) as error:
                notes = "\n".join(getattr(error, "__notes__", ()))
                print(f"{axis.name}: {name}: failed: {error}\n{notes}", file=sys.stderr)
                failures += 1
                continue
            figures.add(name, measured)
            shown = ", ".join(f"{figure} {value:.4g}" for figure, value in measured.items())
            print(f"{axis.name} {number}/{rounds} {name}: {shown}", file=sys.stderr, flush=True)
            gc.collect()
    return failures


def _servers(options: argparse.Namespace) -> Mapping[str, Server]:
    servers: dict[str, Server] = {}
    if options.peer:
        servers[PEER] = Relay(PEER, options.peer)
    if options.relay:
        servers[OURS] = Relay(OURS, options.relay)
    if has_nginx() and not options.no_nginx:
        servers[NGINX] = Nginx()
    return servers


def listed(chosen: Iterable[Axis]) -> str:
    """Return names of axes, each above its figures with their units and goals."""
    lines = []
    for axis in chosen:
        lines.append(axis.name)
        for row in axis.rows:
            goals = " and ".join(goal.text(row.unit) for goal in row.goals)
            lines.append(f"    {row.figure} ({row.unit})" + (f": {goals}" if goals else ""))
    return "\n".join(lines)


def _chosen(name: str, prefixes: Sequence[str]) -> bool:
    return not prefixes or any(name.startswith(prefix) for prefix in prefixes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--peer", metavar="CMD", help="command line of a relay to compare with")
    parser.add_argument(
        "--relay", metavar="CMD", default=OWN_COMMAND, help="ours (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        metavar="AXIS",
        action="append",
        default=[],
        help="only axes whose name begins so; may be repeated: "
        + ", ".join(axis.name for axis in axes()),
    )
    parser.add_argument("--list", action="store_true", help="list axes and rows, measure nothing")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--rotation-streams", type=int, default=rotation.STREAMS, help="(default: %(default)s)"
    )
    parser.add_argument("--no-nginx", action="store_true", help="do not measure nginx")
    parser.add_argument("--json", metavar="FILE", help="write every round's figures there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
