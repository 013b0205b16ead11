"""File and environment are merged first and validated after; all problems come at once."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from relay.config.load import load
from relay.config.schema import Config
from relay.errors import ConfigError


def from_env(variables: Mapping[str, str]) -> Config:
    return load("", True, False, variables)


def problems(variables: Mapping[str, str]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        from_env(variables)
    return caught.value.problems


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"PORT": "x"}, "PORT: not a valid integer"),
        ({"PORT": "0"}, "PORT: value must be greater than zero"),
        ({"STREAM_URI": "x"}, "STREAM_URI: must be an absolute URL/URI"),
        ({"LOG_LEVEL": "x"}, 'LOG_LEVEL: "x" is not a valid log level'),
        ({"TLS_MIN_VERSION": "2"}, 'TLS_MIN_VERSION: "2" is not a valid TLS version'),
        ({"TLS_ENABLED": "1"}, "TLS cert and key are required if TLS is enabled"),
        ({"EVENTS_MAX_INBOUND_PAYLOAD_SIZE": "x"}, "EVENTS_MAX_INBOUND_PAYLOAD_SIZE: not a valid base-2 byte size"),
        ({"EVENTS_MAX_INBOUND_PAYLOAD_SIZE": "0B"}, "max inbound payload size must be greater than zero"),
        ({"LD_ENV_a": ""}, 'SDK key is required for environment "a"'),
        ({"LD_ENV_a": "k", "LD_TTL_MINUTES_a": "1"}, "LD_TTL_MINUTES_a: this variable is no longer supported; use LD_TTL_a"),
        ({"USE_REDIS": "1", "REDIS_TTL": "1s"}, "REDIS_TTL: this variable is no longer supported; use CACHE_TTL"),
        ({"USE_REDIS": "1", "REDIS_PORT": "tcp://h:x"}, "REDIS_PORT: not a valid integer"),
        ({"USE_REDIS": "1", "REDIS_URL": "redis://h", "REDIS_HOST": "h"}, "please specify Redis URL or host/port, but not both"),
        ({"EVENTS_SAMPLING_INTERVAL": "1"}, "EVENTS_SAMPLING_INTERVAL: this variable is no longer supported"),
        ({"AUTO_CONFIG_KEY": "k"}, "[AutoConfig] key (AUTO_CONFIG_KEY) is not supported in this release"),
        ({"USE_CONSUL": "1"}, "[Consul] host (USE_CONSUL) is not supported in this release"),
        ({"WORKERS": "2"}, "[Main] workers: this release runs as one process only"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_as_the_reference_says_it(
    variables: dict[str, str], problem: str
) -> None:
    """Each rule has its sentence."""
    assert problems(variables) == (problem,)


def test_all_problems_come_at_once() -> None:
    """Nobody has to start the relay once for each mistake."""
    assert len(problems({"PORT": "x", "LOG_LEVEL": "y", "INIT_TIMEOUT": "30"})) == 3


def test_a_variable_completes_a_section_of_the_file(tmp_path: Path) -> None:
    """The file may leave the SDK key to the environment; the environment stands above the file."""
    path = tmp_path / "relay.conf"
    path.write_text('[main]\nport = 1\n[Environment "Shop"]\nprefix = "p"\nallowedOrigin = a\n')
    variables = {"LD_ENV_Shop": "sdk-1", "PORT": "2", "LD_ALLOWED_ORIGIN_Shop": "b,c"}
    config = load(str(path), True, False, variables)
    (shop,) = config.environments
    assert (config.main.port, shop.name, shop.prefix) == (2, "Shop", "p")
    assert (shop.sdk_key.reveal(), shop.allowed_origin) == ("sdk-1", ("a", "b", "c"))
    assert config.given["Main.port"] == "PORT"
    assert config.given['Environment "Shop".prefix'] == f"{path}:4"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[Nonsense]", 'PATH:1: unsupported or misspelled section "Nonsense"'),
        ("[Main]\nx = 1", 'PATH:2: unsupported or misspelled section "Main", variable "x"'),
        ('[Main "x"]', 'PATH:1: unsupported or misspelled section "Main", subsection "x"'),
        ("[Main]\nport", "PATH:2: port: blank value not supported for type"),
        ("[Main]\nexitAlways = x", "PATH:2: exitAlways: failed to parse bool `x`"),
        ('[Main]\nlogLevel = "', 'failed to read configuration file "PATH": PATH:2:13: string not terminated'),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_name_their_line(tmp_path: Path, text: str, problem: str) -> None:
    """Each problem of the file tells where it is."""
    path = tmp_path / "relay.conf"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(str(path), False, False, {})
    assert caught.value.problems == (problem.replace("PATH", str(path)),)


def test_a_missing_file_is_an_error_unless_allowed(tmp_path: Path) -> None:
    """`--allow-missing-file` starts without it."""
    path = str(tmp_path / "none")
    with pytest.raises(ConfigError, match="does not exist"):
        load(path, False, False, {})
    assert load(path, False, True, {}) == Config(main=from_env({}).main)


def test_a_hundred_environments() -> None:
    """The number of environments has no limit."""
    variables = {f"LD_ENV_{i}": f"sdk-{i}" for i in range(100)}
    assert [each.sdk_key.reveal() for each in from_env(variables).environments] == list(
        variables.values()
    )


def test_what_a_later_release_brings_is_accepted_with_a_warning() -> None:
    """Nothing is ignored in silence."""
    warnings = from_env({"USE_EVENTS": "true"}).warnings
    assert warnings == ("[Events] sendEvents (USE_EVENTS) takes effect in a later release",)


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({"USE_REDIS": "1"}, "redis://localhost:6379"),
        ({"USE_REDIS": "1", "REDIS_PORT": "tcp://h:1"}, "redis://h:1"),
        ({"USE_REDIS": "1", "REDIS_TLS": "1"}, "rediss://localhost:6379"),
    ],
)
def test_redis_is_found(variables: dict[str, str], url: str) -> None:
    """Host and port become a URL."""
    redis = from_env(variables).redis
    assert redis
    assert redis.url == url
