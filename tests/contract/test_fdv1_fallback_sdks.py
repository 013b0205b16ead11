"""LaunchDarkly's Python SDK led back to FDv1 by the relay, and how it returns (fdv2 13.4.1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.data import all_data, flag
from tests.support.overhearing import Overheard, overhearing
from tests.support.process import RelayProcess
from tests.support.sdk import PythonSDK, Setup, sees
from tests.support.serving import SDK_KEY, until
from tests.support.upstream import ScriptedUpstream


def asked(heard: Overheard) -> set[str]:
    """Paths that were asked for, without queries; then forget them."""
    lines = bytes(heard.asked).split(b"\r\n")
    heard.asked.clear()
    paths = (line.split()[1] for line in lines if line.startswith(b"GET "))
    return {path.partition(b"?")[0].decode() for path in paths}


@pytest.mark.parametrize("mode", ["default", "streaming", "polling"])
async def test_python_returns_when_it_starts_anew(mode: str, tmp_path: Path):
    """It has the data all the time, and asks by FDv1 only as long as it lives.

    The relay names an hour after which to return; the SDK (9.20) takes no notice of that. It cannot
    be kept over a restart of the relay: the first poll of FDv1 that finds no server is its last.
    """
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag("lamp", 1, "one")))
        given = {"STREAM_URI": upstream.url, "BASE_URI": upstream.url, "LD_ENV_main": SDK_KEY}
        relay = RelayProcess(tmp_path, **given, FDV1_FALLBACK="true")
        async with relay, overhearing(relay.address) as heard:
            setup = Setup(SDK_KEY, heard.url, fdv2=mode, poll_interval=0.1)
            async with PythonSDK(setup) as sdk:
                await sdk.ready()
                await sees(sdk, "lamp", "one")
                await until(lambda: b"GET /sdk/latest-all" in heard.asked)
                asked(heard)
                await upstream.connected(SDK_KEY)
                await upstream.patch(SDK_KEY, flag("lamp", 2, "two"))
                await sees(sdk, "lamp", "two")
                assert asked(heard) == {"/sdk/latest-all"}
        other = RelayProcess(tmp_path, **given)
        async with other, overhearing(other.address) as heard:
            setup = Setup(SDK_KEY, heard.url, fdv2=mode, poll_interval=0.1)
            async with PythonSDK(setup) as sdk:
                await sdk.ready()
                await sees(sdk, "lamp", "one")
                first = "/sdk/stream" if mode == "streaming" else "/sdk/poll"
                assert asked(heard) >= {first}
