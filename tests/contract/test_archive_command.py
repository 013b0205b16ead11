"""`relay archive`: what it writes is served by a relay in offline mode, as by the original."""

from __future__ import annotations

import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relay.protocol import archive
from tests.support.data import all_data, flag, segment
from tests.support.process import RelayProcess
from tests.support.serving import SDK_KEY, ask
from tests.support.upstream import ScriptedUpstream, status

OTHER_KEY = "sdk-5ca1ab1e-0001-4000-8000-00000000a002"
DATA = all_data(flag(value="one"), flag("gone", deleted=True), segment())


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, DATA)
        upstream.serve(OTHER_KEY, all_data(flag(value="other")))
        yield upstream


def variables(upstream: ScriptedUpstream) -> dict[str, str]:
    return {
        "STREAM_URI": upstream.url,
        "BASE_URI": upstream.url,
        "INIT_TIMEOUT": "6s",
        "LD_ENV_main": SDK_KEY,
        "LD_CLIENT_SIDE_ID_main": "id-main",
        "LD_MOBILE_KEY_main": "mob-main",
        "LD_PROJ_KEY_main": "shop",
        "LD_TTL_main": "90s",
        "LD_SECURE_MODE_main": "1",
        "LD_ENV_other": OTHER_KEY,
        "LD_CLIENT_SIDE_ID_other": "id-other",
    }


async def write(output: Path, *arguments: str, **given: str) -> tuple[int, str]:
    """Run the command; return exit code and log."""
    asked = ("archive", "--from-env", "--output", str(output), *arguments)
    command = RelayProcess(output.parent, *asked, **given)
    await command.spawn()
    return await command.ended(), command.log


@pytest.mark.parametrize("source", ["streaming", "polling"])
async def test_an_archive_is_served_like_its_origin(source, upstream, tmp_path):
    """Flags, segments, keys and settings; with both ways to fetch them it has the same bytes."""
    output = tmp_path / "archive.tar.gz"
    given = variables(upstream)
    code, said = await write(output, DATA_SOURCE=source, **given)
    assert code == 0, said
    assert f"Wrote {output} with 2 environments" in said
    assert SDK_KEY not in said
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    async with RelayProcess(tmp_path, FILE_DATA_SOURCE=str(output)) as relay:
        await relay.said("Initialized", 2)
        for key, value in ((SDK_KEY, "one"), (OTHER_KEY, "other")):
            reply = await ask(relay.address, "/sdk/latest-all", [("Authorization", key)])
            flags = json.loads(reply.body)["flags"]
            assert [lamp["variations"][0] for lamp in flags.values()] == [value]
        members = json.loads((await ask(relay.address, "/status")).body)["environments"]["id-main"]
        assert (members["envName"], members["projKey"]) == ("main", "shop")
    (main, _) = archive.read(output.read_bytes())
    environment = main.metadata().environment
    assert (environment.ttl, environment.secure_mode) == (120, True)
    first = output.read_bytes()
    await write(output, DATA_SOURCE="polling", **given)
    assert output.read_bytes() == first


async def test_a_relay_may_be_the_origin(upstream, tmp_path):
    """Its flags are those that it serves, also while LaunchDarkly is away."""
    given = variables(upstream)
    async with RelayProcess(tmp_path, **given) as relay:
        await relay.said("Initialized", 2)
        upstream.always(SDK_KEY, status(503))
        output = tmp_path / "archive"
        code, said = await write(output, "--from", relay.url, "--environment", "main", **given)
    assert code == 0, said
    (main,) = archive.read(output.read_bytes())
    assert main.name == "id-main"
    assert {item.key for item in main.data().items} == {"lamp", "crowd"}


async def test_a_change_changes_version_or_data_id_and_nothing_else_does(upstream, tmp_path):
    """So that relays take what has changed, and leave alone what has not."""
    output, given = tmp_path / "archive", variables(upstream)

    async def written() -> list[tuple[int, str]]:
        await write(output, **given)
        found = [entry.metadata() for entry in archive.read(output.read_bytes())]
        return [(each.environment.version, each.data_id) for each in found]

    first = await written()
    given["LD_MOBILE_KEY_main"] = "mob-new"
    upstream.serve(OTHER_KEY, all_data(flag(value="news", version=2)))
    (version, data_id), (other_version, other_id) = await written()
    assert version != first[0][0]
    assert data_id == first[0][1]
    assert other_version == first[1][0]
    assert other_id != first[1][1]


async def test_nothing_is_written_if_an_environment_cannot_be_read(upstream, tmp_path):
    """An archive without it would remove it from relays."""
    output = tmp_path / "archive"
    output.write_bytes(b"before")
    upstream.always(OTHER_KEY, status(401))
    code, said = await write(output, **variables(upstream))
    assert code == 1
    assert 'Environment "other" cannot be read' in said
    assert output.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".archive")] == []


@pytest.mark.parametrize(
    ("arguments", "given", "problem"),
    [
        (("--environment", "nobody"), {}, 'there is no environment "nobody"'),
        ((), {"LD_CLIENT_SIDE_ID_main": ""}, '"main" has no client-side ID (envId)'),
        (("stray",), {}, "unknown argument stray"),
        (("--from", "x"), {}, "Configuration error"),
    ],
)
async def test_what_cannot_be_right_ends_it(arguments, given, problem, upstream, tmp_path):
    code, said = await write(tmp_path / "a", *arguments, **{**variables(upstream), **given})
    assert (code, problem in said) == (2, True), said


async def test_a_place_that_cannot_be_written_is_named(upstream, tmp_path):
    output = tmp_path / "nowhere" / "archive"
    asked = ("archive", "--from-env", "--output", str(output))
    command = RelayProcess(tmp_path, *asked, **variables(upstream))
    await command.spawn()
    assert await command.ended() == 1
    assert f"The archive {output} cannot be written: No such file or directory" in command.log
