"""Relay without the journal: what that costs is the difference."""

from relay.__main__ import main
from relay.model.journal import Journal


def _record(*_: object, **__: object) -> None:
    """Record nothing."""


Journal.record = _record  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
