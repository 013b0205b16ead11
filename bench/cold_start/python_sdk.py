"""Functions with the Python SDK: forked from a process that has imported everything.

Run as a program, with a setup of `bench.cold_start.burst` as JSON. Each process says "ready",
waits for a byte or the end of its standard input, and then says on a line how it fared.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import redis.exceptions  # noqa: F401 - the SDK's store would import it within the time measured
from ldclient import Context, LDClient
from ldclient.config import Config
from ldclient.feature_store import CacheConfig
from ldclient.integrations import Redis

MISSING = "(none)"
"""The fallback value: to get it means that flags did not arrive."""
FLAGS_THREAD = "ldclient.datasource"
"""Beginning of the name of the thread that gets flags."""


def main() -> None:
    """Fork, let every process run once, and wait for them all."""
    setup = json.loads(sys.argv[1])
    children = [_fork(setup, number) for number in range(setup["count"])]
    for child in children:
        os.waitpid(child, 0)


def _fork(setup: Mapping[str, Any], number: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        _say("ready")
        os.read(0, 1)
        _say(json.dumps(_run(setup, number)))
    except BaseException:  # noqa: BLE001 - it is told, and this process ends in any case
        traceback.print_exc()
    finally:
        os._exit(0)


def _run(setup: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Do the work of one function: get a flag, track an event, close the client."""
    context = Context.create(f"user-{number}")
    queued, cpu, start = _queued(), time.process_time(), time.monotonic()
    client = LDClient(_config(setup), start_wait=setup["limit"])
    value = client.variation(setup["flag"], context, MISSING)
    first = time.monotonic() - start
    queued, cpu = _queued() - queued, time.process_time() - cpu
    client.track(f"{setup['event']}{number:08}", context)
    closed = _closes(client.close)
    return {
        "number": number,
        "first": first,
        "queued": queued,
        "cpu": cpu,
        "total": time.monotonic() - start,
        "error": "" if value != MISSING else "no flag",
        "closed": closed,
    }


def _config(setup: Mapping[str, Any]) -> Config:
    options: dict[str, Any] = {}
    if setup["redis"]:
        store = Redis.new_feature_store(setup["redis"], caching=CacheConfig.default())
        options = {"use_ldd": True, "feature_store": store}
    return Config(
        setup["sdk_key"],
        base_uri=setup["flags_url"],
        stream_uri=setup["flags_url"],
        events_uri=setup["events_url"],
        stream=setup["stream"],
        diagnostic_opt_out=True,
        **options,
    )


def _queued() -> float:
    """Seconds for which a thread had no core, of those one of which works while the other waits."""
    threads = [
        thread.native_id for thread in threading.enumerate() if thread.name.startswith(FLAGS_THREAD)
    ]
    threads.append(os.getpid())  # the main thread, whose `native_id` is from before the fork
    files = (Path(f"/proc/self/task/{thread}/schedstat") for thread in threads)
    return sum(int(file.read_text().split()[1]) for file in files) / 1e9


def _closes(close: Callable[[], None]) -> bool:
    try:
        close()
    except Exception as error:  # noqa: BLE001 - whatever an SDK raises, this run counts as failed
        sys.stderr.write(f"close failed: {error!r}\n")
        return False
    return True


def _say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


if __name__ == "__main__":
    main()
