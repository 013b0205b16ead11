"""Quick imports: half of a start is the import of libraries, and some of that can be left out.

`relay health` loads this module too, so it needs next to nothing itself.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause the garbage collector, and exempt from it whatever exists at the end.

    Imports leave hardly any garbage, nor does the start of environments, and looking for it takes a
    tenth of the time. They live as long as the process, as a rule, so later collections need not
    look at them either; whoever removes a part of them calls `gc.unfreeze`.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def system_authorities_skipped() -> Iterator[None]:
    """Let TLS contexts made meanwhile trust nobody, instead of reading the system's authorities.

    It is for libraries that make contexts at import which are never used.
    """
    from ssl import SSLContext  # noqa: PLC0415 - see above

    original = SSLContext.set_default_verify_paths
    SSLContext.set_default_verify_paths = lambda _: None  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        SSLContext.set_default_verify_paths = original  # type: ignore[method-assign]
