"""Figures of the workers of this relay, as the feeder knows them."""

from __future__ import annotations

from msgspec import Struct


class WorkerStatus(Struct):
    """A worker, as shown in `/status`.

    Args:
        number: of the worker, from 0.
        process: its process ID.
        since: time at which it connected, in Unix seconds.
        starts: number of processes that have been this worker, as far as this feeder knows.
        connected: False once its process has gone, until another one comes.
        streams: open streams.
        resident: bytes of memory; None if unknown.
        cpu: seconds of processor time, of all processes that have been this worker.
        former_cpu: those of all but the present one.
        files: open file descriptors; None if unknown.
        delayed: streams that wait until others have read all data.
        unread: bytes of all data that clients have not read.
        cut: streams that were closed because their clients did not read, by all processes that have
            been this worker.
        former_cut: those of all but the present one.
    """

    number: int
    process: int
    since: float
    starts: int = 1
    connected: bool = True
    streams: int = 0
    resident: int | None = None
    cpu: float = 0.0
    former_cpu: float = 0.0
    files: int | None = None
    delayed: int = 0
    unread: int = 0
    cut: int = 0
    former_cut: int = 0
