"""`relay …` and `python -m relay …`."""

# ruff: noqa: PLC0415 - `relay health` must not pay for what the other commands import

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["health"]:
        from relay import health

        sys.exit(health.main(arguments[1:], os.environ))

    from relay import cli

    sys.exit(cli.main(arguments))


if __name__ == "__main__":
    main()
