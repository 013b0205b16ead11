"""`relay reload`: let the running relay of this container or host read its configuration again.

It sends SIGHUP to the process that has announced itself, as `relay health` finds it, and to no
other: most programs end with that signal. It imports next to nothing, and so does not need the
configuration.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence

from relay.announcement import Announced, announced, has_announced, namespace

USAGE = """Usage: relay reload [--pid N]

Let a running relay read its configuration again, as SIGHUP does. Its log says what has changed, or
all that is wrong with the configuration; then nothing changes. Without --pid it is the relay of
this container or host; the variable PORT chooses one of several. A process that is no relay gets no
signal.
"""


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Ask a relay to reload; return 1, and print the reason, if that is not possible.

    Args:
        arguments: none, or `--pid N`.
        environ: environment variables.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        sys.stdout.write(USAGE)
        return 0
    try:
        process = _process(arguments, environ)
        if has_announced(process) is False:
            return _failed(f"process {process} is no running relay, so SIGHUP might end it")
        os.kill(process, signal.SIGHUP)
    except ProcessLookupError:
        return _failed(f"there is no process {process}")
    except PermissionError:
        return _failed(f"process {process} belongs to another user")
    except ValueError as e:
        return _failed(str(e))
    sys.stdout.write(f"process {process} reloads its configuration; its log tells the outcome\n")
    return 0


def _failed(reason: str) -> int:
    sys.stderr.write(f"not reloaded: {reason}\n")
    return 1


def _process(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Return the ID of the process to ask. Raises ValueError if it is not clear."""
    if not arguments:
        return running(environ, announced())
    name, _, value = arguments[0].lstrip("-").partition("=")
    values = [value, *arguments[1:]] if "=" in arguments[0] else arguments[1:]
    if not arguments[0].startswith("-") or name != "pid" or len(values) != 1:
        raise ValueError(f"unknown argument {arguments[0]}; the only one is --pid N")
    if not (values[0].isascii() and values[0].isdecimal()) or int(values[0]) < 1:
        raise ValueError("--pid takes the ID of a process")
    return int(values[0])


def running(environ: Mapping[str, str], servers: Sequence[Announced]) -> int:
    """Return the process ID of the relay of this container or host.

    Args:
        environ: `PORT` chooses one of several relays.
        servers: the announced servers.

    Raises:
        ValueError: there is none, or there are several; the message says what to do.
    """
    own = [each for each in servers if each[0] == namespace()]
    port = environ.get("PORT", "").strip()
    # Process 1 is the container's own command, which need not have read the image's variables.
    for chosen in ([s for s in own if s[1] == "1"], [s for s in own if s[3] == port], own):
        if len(chosen) == 1:
            return int(chosen[0][1])
    if not own:
        raise ValueError("no relay runs here; --pid names the process of one elsewhere")
    listed = ", ".join(f"{process} (port {port})" for _, process, _, port in own)
    raise ValueError(f"several relays run here, so choose one with --pid: {listed}")
