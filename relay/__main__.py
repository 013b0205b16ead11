"""`relay …` and `python -m relay …`."""

# ruff: noqa: PLC0415 - `relay health` must not pay for what the other commands import, nor `eval`

from __future__ import annotations

import os
import signal
import sys
from typing import Never


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["health"]:
        from relay.cli import health

        sys.exit(health.main(arguments[1:], os.environ))

    # Until the server takes signals over: as process 1 of a container we would not even get them.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    if arguments[:1] not in (["check"], ["eval"], ["sync"]):
        # The kernel keeps it until the server says what comes of it. Others end by it, as usual.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    if arguments[:1] == ["eval"]:
        from relay.cli.eval import main as evaluate

        sys.exit(evaluate(arguments[1:]))
    from relay.cli import main

    sys.exit(main.main(arguments))


def _end(number: int, _frame: object) -> Never:
    """End with the exit code that a shell gives to what a signal has ended."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
