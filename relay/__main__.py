"""`relay …` and `python -m relay …`."""

# ruff: noqa: PLC0415 - `relay health` and the like must not pay for the imports of others

from __future__ import annotations

import os
import signal
import sys
from typing import Never

from relay.imports import garbage_collection_paused


def main() -> None:
    """Run the command, and exit with its exit code."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["health"]:
        from relay.cli import health

        sys.exit(health.main(arguments[1:], os.environ))
    if arguments[:1] == ["reload"]:
        from relay.cli import reload

        sys.exit(reload.main(arguments[1:], os.environ))

    # Until the server installs its handlers: process 1 of a container ignores unhandled signals.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_on_signal)
    if arguments[:1] not in (["archive"], ["check"], ["eval"], ["sync"]):
        # It stays pending until the server handles it. Other commands are ended by it, as usual.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    if arguments[:1] == ["eval"]:
        from relay.cli.eval import main as evaluate

        sys.exit(evaluate(arguments[1:]))
    with garbage_collection_paused():
        from relay.cli import main
    sys.exit(main.main(arguments))


def _exit_on_signal(number: int, _frame: object) -> Never:
    """Exit with the code that a shell reports for a process ended by a signal."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
