"""Announce a server to other commands, by a name in the kernel's table of Unix sockets."""

from __future__ import annotations

import os
import socket

SOCKETS = "/proc/net/unix"
"""The kernel's table of Unix sockets of this container or host, on Linux only."""


Announced = tuple[str, str, str, str]
"""PID namespace, process ID, scheme and port of a running server."""


def announce(port: int, *, tls: bool) -> socket.socket | None:
    """Announce the port of this process to `relay health`.

    Args:
        port: port that the process listens on.
        tls: True if it serves TLS there.

    Returns:
        A socket that holds the name until it is closed; None on systems without such names.
    """
    name = "/".join(("relay", namespace(), str(os.getpid()), "https" if tls else "http", str(port)))
    try:
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except (AttributeError, OSError):
        return None
    try:
        holder.bind(f"\0{name}".encode())
    except OSError:
        holder.close()
        return None
    return holder


def announced(table: str = SOCKETS) -> list[Announced]:
    """Return the announced servers; empty on systems without such names."""
    try:
        with open(table, encoding="latin-1") as file:  # noqa: PTH123 - pathlib is slow to import
            names = [line.rstrip("\n").partition(" @relay/")[2] for line in file]
    except OSError:
        return []
    servers: list[Announced] = []
    for name in names:
        match name.split("/"):
            case [space, process, ("http" | "https") as scheme, port] if port.isdecimal():
                servers.append((space, process, scheme, port))
    return servers


def has_announced(process: int) -> bool | None:
    """Return whether a process is a server that has announced itself, here or in a container.

    Args:
        process: its ID in this PID namespace.

    Returns:
        None on systems without such names.

    Raises:
        PermissionError: it belongs to another user.
        ProcessLookupError: it does not exist.
    """
    if not os.path.exists(SOCKETS):  # noqa: PTH110 - pathlib is slow to import
        return None
    folder = f"/proc/{process}"
    try:
        # Its own table and IDs: a container has others than its host.
        space = os.readlink(f"{folder}/ns/pid")  # noqa: PTH115 - see above
        with open(f"{folder}/status", encoding="latin-1") as file:  # noqa: PTH123 - see above
            ids = [line.split()[-1] for line in file if line.startswith(("Pid:", "NSpid:"))]
    except FileNotFoundError as e:
        raise ProcessLookupError from e
    return any(each[:2] == (space, ids[-1]) for each in announced(f"{folder}/net/unix"))


def namespace() -> str:
    """Return the PID namespace, which differs between containers; empty if the system has none."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - pathlib is slow to import
    except OSError:
        return ""
