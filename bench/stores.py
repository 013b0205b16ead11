"""From LaunchDarkly to SDKs in daemon mode: a database that a relay keeps current."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from bench.data import PATCH_BYTES, SIZES, flag, flag_key
from bench.databases import DATABASES, Database, until_stored
from bench.measures import Measured, as_relay, upstream_of, with_variables
from bench.polls import quantile_ms
from bench.servers import SDK_KEY, Certificate, Server, Session

DATASET = "570k"
PREFIX = "bench-main"
PUTS = 3
PATCHES = 100
PATCHED = flag_key(0)
SMALL = "2k"
ENVIRONMENTS = 100
SETTLING_SECONDS = 5
IDLE_SECONDS = 120
"""So long that each kind of look at the database comes in, but for one that comes once an hour."""
HOUR = 3600


@contextmanager
def kept(name: str, server: Server, **variables: str) -> Iterator[tuple[Session, Database]]:
    """Run a relay that keeps a new database of a name in `DATABASES`."""
    given = {"LD_PREFIX_main": PREFIX, "LD_PREFIX_small": "bench-small", **variables}
    with DATABASES[name]() as database:
        relay = with_variables(as_relay(server), **database.variables, **given)
        with relay.serve(DATASET) as session:
            until_stored(database, PREFIX, map(flag_key, range(SIZES[DATASET].flags)), 1)
            yield session, database


def written(name: str, server: Server, _: Certificate) -> Measured:
    """Send whole data sets, then single changes; wait until the database has them."""
    keys = [flag_key(index) for index in range(SIZES[DATASET].flags)]
    puts, patches = [], []
    with kept(name, server) as (session, database):
        for version in range(2, 2 + PUTS):
            sent = upstream_of(session).put(SDK_KEY, DATASET, version)
            until_stored(database, PREFIX, keys, version)
            puts.append(time.monotonic() - sent)
        own = [_own_round_trip(database, version) for version in range(1, 1 + PATCHES)]
        for version in range(2 + PUTS, 2 + PUTS + PATCHES):
            changed = flag(PATCHED, version, PATCH_BYTES)
            sent = upstream_of(session).change(SDK_KEY, changed)
            while database.version(PREFIX, PATCHED) < version:
                pass
            patches.append(time.monotonic() - sent)
    figures: Measured = {f"put of 1000 flags written: {name}": median(puts) * 1e3}
    for label, quantile in (("p50", 0.5), ("p99", 0.99)):
        took, needed = (quantile_ms(sorted(times), quantile) for times in (patches, own))
        figures |= {
            f"one patch → readable: {name}, {label}": took,
            f"{name}: a write and a read, {label}": needed,
            f"one patch → readable: {name}, beyond a write and a read, {label}": took - needed,
        }
    return figures


def _own_round_trip(database: Database, version: int) -> float:
    """Time that the database needs for a write and a read of one flag, without any relay."""
    began = time.monotonic()
    database.write("bench-own", PATCHED, version)
    while database.version("bench-own", PATCHED) < version:
        pass
    return time.monotonic() - began


def idle(name: str, server: Server, _: Certificate) -> Measured:
    """Leave many environments in peace, and count what the database is asked."""
    with DATABASES[name]() as database:
        given = {"ENV_DATASTORE_PREFIX": "$CID"}
        relay = with_variables(as_relay(server), **database.variables, **given)
        with relay.serve(SMALL, automatic=ENVIRONMENTS):
            flags = [flag_key(index) for index in range(SIZES[SMALL].flags)]
            keys = [SDK_KEY, *(f"sdk-bench-{number}" for number in range(1, ENVIRONMENTS))]
            for key in keys:
                until_stored(database, f"id-{key}", flags, 1)
            time.sleep(SETTLING_SECONDS)
            before = database.requests()
            time.sleep(IDLE_SECONDS)
            asked = database.requests() - before
    figure = f"idle, per environment and hour: {name}"
    return {figure: asked / ENVIRONMENTS * HOUR / IDLE_SECONDS}
