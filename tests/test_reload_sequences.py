"""Any sequence of configurations that a running relay reads."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from relay.build.relay import build_with_parts
from relay.config.load import load
from relay.model.credential import CredentialKind
from relay.relay import Relay
from relay.reload import Reload
from relay.telemetry.log import set_environment_level
from tests.support.serving import until

EXAMPLES = int(os.environ.get("EXAMPLES", "1000")) // 20
KEYS = [f"sdk-{n}-key" for n in range(5)]
MOBILE_KEYS = ["mob-1-key", "mob-2-key"]
IDS = ["id-1", "id-2", "id-of-a", "id-of-b", "id-of-c"]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, str]:
    """Variables of some environments, which may share everything but the name."""
    variables = {"STREAM_URI": "http://127.0.0.1:9", "LOG_LEVEL": "none"}
    names = draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True))
    for name in names:
        key = draw(st.sampled_from(KEYS))
        variables |= {f"LD_ENV_{name}": key, f"LD_PROJ_KEY_{name}": draw(st.sampled_from("pq"))}
        for option, values in (
            ("LD_MOBILE_KEY_", MOBILE_KEYS),
            ("LD_CLIENT_SIDE_ID_", IDS[:2]),
            ("LD_TTL_", ["1s", "2s"]),
            ("LD_PREFIX_", ["x", "y"]),
            ("LD_EVAL_STREAMS_", ["0", "1"]),
            ("LD_LOG_LEVEL_", ["warn", "error"]),
        ):
            if value := draw(st.sampled_from([None, *values])):
                variables[option + name] = value
        if draw(st.booleans()):
            variables[f"LD_FILTER_KEYS_{variables[f'LD_PROJ_KEY_{name}']}"] = draw(
                st.sampled_from(["north", "north,south"])
            )
    database = draw(st.sampled_from(["", "REDIS", "CONSUL"]))
    if database:
        host = draw(st.sampled_from(["one", "two"]))
        variables |= {f"USE_{database}": "1", f"{database}_HOST": host}
        variables |= {f"LD_PREFIX_{name}": f"of-{name}" for name in names}
    if draw(st.integers(0, 3)) == 0:
        variables |= {f"LD_CLIENT_SIDE_ID_{name}": f"id-of-{name}" for name in names}
        variables["PUBLISH_TO"] = draw(st.sampled_from(["file:///one", "file:///one,file:///two"]))
    if draw(st.booleans()):
        variables["EVAL_STREAMS"] = "0"
    return variables


def served(relay: Relay) -> dict[object, object]:
    """Settings with which each credential's environment is served and stored, by credential."""
    opened = {}
    kinds = [CredentialKind.SDK_KEY, CredentialKind.MOBILE_KEY, CredentialKind.ENVIRONMENT_ID]
    for kind, values in zip(kinds, (KEYS, MOBILE_KEYS, IDS), strict=True):
        for value, payload_filter in itertools.product(values, ("", "north", "south")):
            environment = relay.registry.find(kind, value, payload_filter)
            if environment is None:
                continue
            stores = [
                (each.status.database, each.status.server, each.status.prefix)
                for each in environment.mirrors
                if each.status is not None
            ]
            spec = replace(environment.spec, mobile_key=None, environment_id=None)
            level = logging.getLogger(f"relay.env.{spec.name}").level
            opened[kind, value, payload_filter] = spec, stores, level
    return opened


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(configurations(), min_size=2, max_size=5))
def test_a_reload_leads_where_a_restart_does(variables):
    """Whatever the configurations were before: credentials, settings and databases are the same."""
    configs = [load("", True, False, each) for each in variables]

    async def run() -> None:
        relay, parts = build_with_parts(configs[0])
        upcoming = iter(configs[1:])
        requested = asyncio.Event()
        reload = Reload(relay, configs[0], lambda: next(upcoming), requested, parts=parts)
        running = asyncio.create_task(reload.run())
        for number, config in enumerate(configs[1:], 1):
            requested.set()
            await until(lambda n=number: sum(relay.reloads.results.values()) == n)
            reloaded = served(relay)
            names = set(relay.environments)
            assert names == {each.name for each in config.all_environments}
            restarted, _ = build_with_parts(config)
            for name in names:
                set_environment_level(name, restarted.environments[name].spec.log_level)
            assert reloaded == served(restarted)
        running.cancel()

    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in ("", "relay")]
    try:
        asyncio.run(run())
    finally:
        for logger, level in levels:
            logger.setLevel(level)
