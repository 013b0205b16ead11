"""Secrets by reference: `X_FILE`, and `nameFile` in the file, name a file that holds the value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from relay.config.load import load
from relay.config.references import MAX_SIZE, variable_target
from relay.config.render import effective, secrets
from relay.config.schema import NAMED_SECTIONS, SECTIONS, Config, options
from relay.config.types import KEY, SECRET
from relay.errors import ConfigError

SDK_KEY = "sdk-5ca1ab1e-0001-4000-8000-00000000a001"
KEY_RULE = "a key has ASCII characters only, no blanks and no quotation marks"
Write = Callable[..., str]


@pytest.fixture(name="write")
def file_writer(tmp_path: Path) -> Write:
    """Write a file; return its path."""

    def write(name: str, content: str | bytes = SDK_KEY) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def from_env(**variables: str) -> Config:
    return load("", True, False, variables)


def from_file(write: Write, text: str, **variables: str) -> Config:
    return load(write("relay.conf", text), bool(variables), False, variables)


def problems(call: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call()
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("variable", "value", "target"),
    [
        ("REDIS_PASSWORD_FILE", "/x", ("Redis", "password", None)),
        ("REDIS_PASSWORD_FILE", "x", ("Redis", "password", None)),
        ("REDIS_PASSWORD_FILE", "", None),
        ("REDIS_PASSWORD", "/x", None),
        ("REDIS_URL_FILE", "/x", ("Redis", "url", None)),
        ("PROXY_URL_FILE", "/x", ("Proxy", "url", None)),
        ("PUBLISH_TO_FILE", "/x", ("Publish", "to", None)),
        ("PUBLISH_TOKEN_FILE", "/x", ("Publish", "token", None)),
        ("BOOTSTRAP_FROM_FILE", "/x", ("Main", "bootstrap_from", None)),
        ("WEBHOOK_SECRET_FILE", "/x", ("Webhook", "secret", None)),
        ("AUTO_CONFIG_KEY_FILE", "/x", ("AutoConfig", "key", None)),
        ("CONSUL_TOKEN_FILE", "/x", None),
        ("CONSUL_TOKEN_FILE_FILE", "/x", None),
        ("PORT_FILE", "/x", None),
        ("SSL_CERT_FILE", "/x", None),
        ("LD_ENV_a_FILE", "/x", ("Environment", "sdk_key", "a")),
        ("LD_ENV_a_FILE", "./x", ("Environment", "sdk_key", "a")),
        ("LD_ENV_a_FILE", SDK_KEY, None),
        ("LD_ENV_a_FILE_FILE", "/x", ("Environment", "sdk_key", "a_FILE")),
        ("LD_MOBILE_KEY_a_FILE", "/x", ("Environment", "mobile_key", "a")),
        ("LD_CLIENT_SIDE_ID_a_FILE", "/x", None),
        ("LD_ENV__FILE", "/x", None),
    ],
)
def test_variables_that_are_references(variable, value, target):
    """Keys, secrets and URLs; the names of environments that end with `_FILE` are kept."""
    found = variable_target(variable, value)
    assert (found and (found[0].section, found[0].attribute, found[1])) == target


def test_every_secret_can_be_named_by_a_file():
    """In all sections, and only one of them has an option of its own for that."""
    for section in [*SECTIONS, *NAMED_SECTIONS]:
        for option in options(section):
            if option.type in (KEY, SECRET):
                assert option.type.by_reference
                name = option.variable + ("a" if section in NAMED_SECTIONS else "")
                expected = option.variable != "CONSUL_TOKEN"
                assert (variable_target(f"{name}_FILE", "/x") is not None) is expected


def test_variables(write):
    """Line ends and blanks around the value do not count; the environment is as with its key."""
    config = from_env(
        LD_ENV_a="sdk-a",
        LD_ENV_main_FILE=write("sdk", f"\ufeff{SDK_KEY}\r\n"),
        LD_MOBILE_KEY_main_FILE=write("mob", ' "mob-1"\n\n'),
        LD_ENV_KEY_main="production",
        LD_ENV_odd_FILE="sdk-odd",
        USE_REDIS="1",
        LD_PREFIX_main="m",
        LD_PREFIX_a="a",
        LD_PREFIX_odd_FILE="o",
        REDIS_URL_FILE=write("url", "redis://:secret@host:1\n"),
        REDIS_PASSWORD="",
        REDIS_PASSWORD_FILE=write("password", "two words\n"),
        WEBHOOK_SECRET_FILE=write("webhook", "one,two\n"),
    )
    a, main, odd = config.environments
    assert (a.name, main.name, odd.name) == ("a", "main", "odd_FILE")
    assert (main.sdk_key.reveal(), main.mobile_key.reveal()) == (SDK_KEY, "mob-1")
    assert main.env_key == "production"
    assert config.redis
    assert config.redis.url == "redis://:secret@host:1"
    assert config.redis.password.reveal() == "two words"
    assert [secret.reveal() for secret in config.webhook.secrets] == ["one", "two"]
    assert {SDK_KEY, "mob-1", "secret", "two words", "one", "two"} <= set(secrets(config))


def test_options_of_the_file(write):
    """`nameFile`, in any case, as the names of options; a variable overrides it."""
    text = f"""
        [Environment "main"]
        sdkKeyFile = {write("sdk")}
        MOBILEKEYFILE = "{write("mob", "mob-1")}"
        [Webhook]
        secretFile = {write("webhook", "one")}
    """
    config = from_file(write, text, LD_ENV_main="sdk-2")
    (main,) = config.environments
    assert (main.sdk_key.reveal(), main.mobile_key.reveal()) == ("sdk-2", "mob-1")
    assert config.webhook.secret.reveal() == "one"


def test_the_source_is_shown_and_the_value_is_not(write):
    """`relay check` names the file."""
    path = write("sdk")
    shown = effective(from_env(LD_ENV_main_FILE=path, WEBHOOK_SECRET_FILE=write("w", "s3cret")))
    assert f"LD_ENV_main_FILE={path}" in shown
    assert SDK_KEY not in shown
    assert "s3cret" not in shown


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b" \r\n", "the file is empty"),
        (b"sdk-\xff-key", "not UTF-8"),
        (b"x" * (MAX_SIZE + 1), f"longer than {MAX_SIZE} bytes"),
        (
            b"sdk-1\nsdk-2",
            f"{KEY_RULE}, but character 6 is a line end",
        ),
    ],
)
def test_files_without_a_value(write, content, reason):
    """The message names variable and path; nothing that only follows from it is reported."""
    path = write("sdk", content)
    variables = {"LD_ENV_main_FILE": path, "LD_PROJ_KEY_main": "p", "LD_FILTER_KEYS_p": "f"}
    assert problems(lambda: from_env(**variables)) == [f"LD_ENV_main_FILE={path}: {reason}"]
    text = f'[Environment "main"]\nsdkKeyFile = {path}'
    conf = write("relay.conf", text)
    problem = f"{conf}:2: sdkKeyFile={path}: {reason}"
    assert problems(lambda: load(conf, False, False, {})) == [problem]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"LD_ENV_main_FILE": "/none/x"},
            ["LD_ENV_main_FILE=/none/x: No such file or directory"],
        ),
        ({"LD_ENV_main_FILE": "/"}, ["LD_ENV_main_FILE=/: Is a directory"]),
        (
            {"LD_ENV_main": "sdk-1", "WEBHOOK_SECRET_FILE": "hunter2"},
            ["WEBHOOK_SECRET_FILE: No such file or directory"],
        ),
        (
            {"LD_ENV_main": "sdk-1", "LD_ENV_main_FILE": "/none/x"},
            ["LD_ENV_main_FILE: LD_ENV_main is set, too; only one of them may be"],
        ),
        (
            {"LD_ENV_main": "sdk-1", "REDIS_PASSWORD": "x", "REDIS_PASSWORD_FILE": "/none/x"},
            ["REDIS_PASSWORD_FILE: REDIS_PASSWORD is set, too; only one of them may be"],
        ),
    ],
)
def test_references_that_cannot_be_used(variables, expected):
    """Text that may be the secret itself, by mistake, is not repeated."""
    assert problems(lambda: from_env(**variables)) == expected


@pytest.mark.parametrize(("first", "second"), [("sdkKey", "sdkKeyFile"), ("sdkKeyFile", "sdkKey")])
def test_a_file_that_has_both(write, first, second):
    """In any order."""
    path = write("sdk")
    values = {"sdkKey": "sdk-1", "sdkKeyFile": path}
    lines = [f"{name} = {values[name]}" for name in (first, second)]
    conf = write("relay.conf", "\n".join(['[Environment "main"]', *lines]))
    (problem,) = problems(lambda: load(conf, False, False, {}))
    label = f"sdkKeyFile={path}" if second == "sdkKeyFile" else second
    assert problem == f"{conf}:3: {label}: {first} is set, too; only one of them may be"


def test_a_path_in_place_of_an_environment_without_a_slash_is_a_key_and_a_warning():
    """The name of an environment may end with `_FILE`."""
    config = from_env(LD_ENV_main_FILE="key.txt")
    assert [each.name for each in config.environments] == ["main_FILE"]
    text = 'LD_ENV_main_FILE makes an environment "main_FILE"; a path to a file would have a /'
    assert text in config.warnings


def test_files_are_read_at_each_load(write):
    """A secret that Kubernetes has replaced counts from the next one."""
    path = write("sdk", "sdk-1")
    assert from_env(LD_ENV_main_FILE=path).environments[0].sdk_key.reveal() == "sdk-1"
    write("sdk", "sdk-2")
    assert from_env(LD_ENV_main_FILE=path).environments[0].sdk_key.reveal() == "sdk-2"
