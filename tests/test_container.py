"""The image and the compose file keep the container contract (config 3.8)."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay.cli import health, main

ROOT = Path(__file__).parent.parent
REFERENCE_COMMAND = [
    "/usr/bin/ldr",
    "--config",
    "/ldr/ld-relay.conf",
    "--allow-missing-file",
    "--from-env",
]


@pytest.fixture(name="stages")
def parse_dockerfile() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, as pairs of a word and its argument."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text())
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    instructions = [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]
    starts = [i for i, (word, _) in enumerate(instructions) if word == "FROM"]
    ends = [*starts[1:], len(instructions)]
    return [instructions[start:end] for start, end in zip(starts, ends, strict=True)]


@pytest.fixture(name="image")
def last_stage(stages: list[list[tuple[str, str]]]) -> dict[str, str]:
    """The last stage: each instruction once, arguments of repeated ones joined."""
    image: dict[str, str] = {}
    for word, argument in stages[-1]:
        image[word] = f"{image[word]} {argument}" if word in image else argument
    return image


@pytest.fixture(name="compose")
def parse_compose() -> dict[str, Any]:
    """The compose file."""
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def test_changing_the_name_of_the_image_is_enough(image: dict[str, str]) -> None:
    """User, port and command are those of the image of the reference."""
    assert image["USER"] == "1000:1000"
    assert "--uid 1000 " in image["RUN"]
    assert "PORT=8030" in shlex.split(image["ENV"])
    assert image["EXPOSE"] == "8030"
    assert yaml.safe_load(image["ENTRYPOINT"]) == REFERENCE_COMMAND
    assert "ln -s /opt/relay/bin/relay /usr/bin/ldr" in image["RUN"]


def test_the_image_can_be_watched_and_stopped(image: dict[str, str]) -> None:
    """Docker asks `relay health`, and stops the relay with the signal that it drains on."""
    assert image["HEALTHCHECK"].endswith('CMD ["relay", "health"]')
    assert image["STOPSIGNAL"] == "SIGTERM"


STARTED_BY = "interval", "timeout", "start-period", "retries"
"""Options of a health check that engines of all versions in use know."""


@pytest.mark.parametrize("engine", [20, 25])
def test_a_container_is_soon_healthy(image: dict[str, str], engine: int) -> None:
    """One that is ready after a second is healthy within two; one that never is, after a while."""
    given = dict(re.findall(r"--([\w-]+)=([\d.]+)s?(?= )", image["HEALTHCHECK"]))
    assert set(given) <= set(STARTED_BY)
    interval, start_period = float(given["interval"]), float(given.get("start-period", 0))
    # Since version 25 the start period has an interval of its own, which is 5 s by default.
    first = 5 if engine >= 25 and start_period else interval
    assert 1 < first < 2
    assert start_period + interval * int(given["retries"]) >= 30
    assert float(given["timeout"]) > health.TIME_LIMIT


def test_the_image_writes_nowhere_but_in_its_volume(image: dict[str, str]) -> None:
    """With a read-only root there is still a place for snapshots, owned by the user."""
    assert image["VOLUME"] == "/data"
    environment = dict(pair.split("=", 1) for pair in shlex.split(image["ENV"]))
    assert environment["SNAPSHOT_DIR"].startswith("/data/")
    assert environment["EVENTS_SPOOL_DIR"].startswith("/data/")
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    # For its user, and for any that is in group 0, whatever either has made; for nobody else.
    assert "install -d -o 1000 -g 0 -m 2770 /data" in image["RUN"]


def test_the_image_is_built_from_locked_packages_and_without_a_compiler(
    stages: list[list[tuple[str, str]]],
) -> None:
    """Exactly the packages that the lock names are installed; nothing is built from source."""
    build = " ".join(argument for word, argument in stages[0] if word == "RUN")
    assert "--require-hashes -r requirements.lock" in build
    assert "--only-binary :all:" in build
    everything = " ".join(argument for stage in stages for _, argument in stage)
    assert not re.search(r"apt-get|\bapk\b|gcc|build-essential", everything)


def test_what_the_image_copies_is_sent_to_the_builder(
    stages: list[list[tuple[str, str]]],
) -> None:
    """`.dockerignore` lets through exactly what is copied."""
    copied = {
        source
        for stage in stages
        for word, argument in stage
        if word == "COPY" and not argument.startswith("--from")
        for source in argument.split()[:-1]
    }
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


def test_the_command_line_accepts_the_image_s_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The flags of the image's command are flags of ours; `--version` wins over all others."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        raise SystemExit(main.main([*REFERENCE_COMMAND[1:], "--version"]))
    assert exit_.value.code in {0, None}
    assert "LaunchDarkly relay version" in capfd.readouterr().out


def test_compose_waits_for_valkey(compose: dict[str, Any]) -> None:
    """The relay starts once the database answers, and the database's version is pinned."""
    services = compose["services"]
    assert services["relay"]["depends_on"]["valkey"]["condition"] == "service_healthy"
    assert services["valkey"]["healthcheck"]["test"][0] == "CMD"
    assert re.fullmatch(r"valkey/valkey:\d+\.\d+\.\d+.*", services["valkey"]["image"])


def test_compose_runs_the_relay_as_it_is_meant_to_run(compose: dict[str, Any]) -> None:
    """Read-only, without privileges, ended within ten seconds, snapshots kept in a volume."""
    service = compose["services"]["relay"]
    assert service["read_only"] is True
    assert service["stop_grace_period"] == "10s"
    assert service["cap_drop"] == ["ALL"]
    assert "data:/data" in service["volumes"]
    assert "data" in compose["volumes"]
    assert service["ports"] == ["${RELAY_PORT:-8030}:8030"]


def test_compose_has_a_fleet(compose: dict[str, Any]) -> None:
    """The profile adds two relays like the first and a balancer that knows all three."""
    services = compose["services"]
    first, further = services["relay"], [services["relay-2"], services["relay-3"]]
    assert "FLEET=true" in first["environment"]
    for service in further:
        assert service["profiles"] == ["fleet"]
        assert service["environment"] == first["environment"]
        assert "data:/data" not in service["volumes"], "a spool has one owner"
    balancer = compose["configs"]["balancer"]["content"]
    for name in ("relay", *services["balancer"]["depends_on"]):
        assert f" {name}:8030" in balancer
    port = services["balancer"]["ports"][0].rpartition(":")[2]
    assert f"bind :{port}\n" in balancer


def test_compose_passes_environments_on_and_has_demo_flags(compose: dict[str, Any]) -> None:
    """LD_ENV_… comes from outside; without any, the demo flags are served."""
    environment = dict(
        entry.partition("=")[::2] for entry in compose["services"]["relay"]["environment"]
    )
    assert environment["LD_ENV_Production"] == ""
    in_image = Path(environment["FLAGS_FILE"])
    assert (ROOT / in_image.relative_to("/opt/relay")).is_file()
    assert environment["REDIS_URL"] == "redis://valkey:6379"
    assert environment["USE_REDIS"] == "true"
