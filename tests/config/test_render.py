"""Code, `config/relay.conf` and docs agree, and no secret is ever printed."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from relay.config import load as loading
from relay.config.load import load
from relay.config.options import Option
from relay.config.render import effective, quoted, reference, secrets, table
from relay.config.schema import NAMED_SECTIONS, SECTIONS, Config, options
from relay.config.syntax import parse
from relay.config.types import SECRET
from relay.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
RENEW = "run: .venv/bin/python scripts/write-options"
ALL = [option for section in [*SECTIONS, *NAMED_SECTIONS] for option in options(section)]


def from_file(path: Path, text: str, **variables: str) -> Config:
    path.write_text(text)
    return load(str(path), bool(variables), False, variables)


def uncommented() -> str:
    """Return the text of the file with every section and every option in effect."""
    return re.sub(r"(?m)^#(?=\[|\w+ = )", "", reference())


def test_the_file_agrees_with_the_code() -> None:
    """`config/relay.conf` shows exactly the declared options."""
    assert (ROOT / "config/relay.conf").read_text() == reference(), RENEW


def test_the_page_agrees_with_the_code() -> None:
    """The table shows exactly the declared options."""
    marked = "<!-- configuration table -->\n(.*?)<!-- end -->"
    match = re.search(marked, (ROOT / "docs/configuration.md").read_text(), re.DOTALL)
    assert match
    assert match[1] == table(), RENEW


def test_the_file_as_it_is_changes_nothing(tmp_path: Path) -> None:
    """All options are commented out."""
    assert from_file(tmp_path / "relay.conf", reference()) == from_file(tmp_path / "relay.conf", "")


def test_every_option_of_the_file_can_be_uncommented(tmp_path: Path) -> None:
    """Each has a value of its type: the default, if it has one."""
    path = tmp_path / "relay.conf"
    path.write_text(uncommented())
    raw = loading._RawOptions()
    loading._read_file(raw, str(path), allow_missing=False)
    assert raw.problems == []
    assert len(raw.values) == len(ALL)
    for option in ALL:
        name = {"Environment": "Production", "Filters": "shop"}.get(option.section)
        value = raw.values[option.section, name, option.attribute]
        assert value == option.default or (option.example and not option.default), option


@pytest.mark.parametrize("option", ALL, ids=lambda option: f"{option.section}.{option.name}")
def test_every_option_is_documented(option: Option) -> None:
    """It has a help sentence, and is in the file with its variable, and in docs/configuration.md."""
    assert re.fullmatch(r"[A-Z`].*\.", option.help)
    assert re.search(rf"(?m)^#{option.name} = .+$", reference())
    assert option.variable in reference()
    assert f"`{option.name}`" in table() or f"all of `[{option.section}]`" in table()


def test_the_table_is_a_table() -> None:
    """Each row has five cells."""
    rows = [line for line in table().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {6}


def test_options_that_were_set_carry_their_source(tmp_path: Path) -> None:
    """Defaults are commented out."""
    path = tmp_path / "relay.conf"
    text = '[Main]\nport = 9000\n[Environment "Shop"]\nsdkKey = sdk-5ca1ab1e-a001\n'
    shown = effective(from_file(path, text, LD_ENV_b="k", LD_TTL_b="90s", LD_PREFIX_b="a;b"))
    assert re.search(rf"(?m)^port = 9000 +# {path}:2$", shown)
    assert "# initTimeout = 10s\n" in shown
    assert "# [Redis] is not used." in shown
    assert re.search(rf'\[Environment "Shop"\]\nsdkKey = \.\.\.a001 +# {path}:4\n', shown)
    assert re.search(r'\[Environment "b"\]\nsdkKey = \*{8} +# LD_ENV_b\n', shown)
    assert re.search(
        r'prefix = "a;b" +# LD_PREFIX_b\n# tableName =\nttl = 90s +# LD_TTL_b\n', shown
    )
    assert "with 2 environments" in shown


FILTERED = {"LD_PROJ_KEY_a": "p", "LD_FILTER_KEYS_p": "north"}


@pytest.mark.parametrize(
    ("variables", "lines"),
    [
        ({}, ["by FDv1 ([Main] dataSystem): a stream of streamUri, which begins with everything."]),
        (
            {"DATA_SOURCE": "polling", "POLL_INTERVAL": "90s"},
            ["by FDv1 ([Main] dataSystem): polls of baseUri every 90 s, which begins with"],
        ),
        (
            {"DATA_SYSTEM": "fdv2"},
            [
                "by FDv2 ([Main] dataSystem): a poll of baseUri, then a stream of streamUri; polls",
                "polls of baseUri every 30 s while that fails.",
                "by FDv1 instead while upstream asks for it, or does not know FDv2.",
            ],
        ),
        (
            {"DATA_SYSTEM": "fdv2", "DATA_SOURCE": "polling", **FILTERED},
            [
                "by FDv2 ([Main] dataSystem): polls of baseUri every 30 s.",
                "So do filtered environments if upstream filters: LaunchDarkly does by FDv1 only.",
            ],
        ),
        (
            {"DATA_SYSTEM": "fdv2", "FLEET": "true", "USE_REDIS": "true", "LD_PREFIX_a": "p"},
            ["by FDv2 ([Main] dataSystem)", "In the fleet only the leader asks; the others follow"],
        ),
    ],
)
def test_the_way_of_flags_is_explained(variables: dict[str, str], lines: list[str]) -> None:
    """The protocol, what is asked, and what happens where it is not known."""
    shown = effective(load("", True, False, {"LD_ENV_a": "sdk-1", **variables}))
    for line in lines:
        assert line in shown
    assert ("FDv1 instead" in shown) == (variables.get("DATA_SYSTEM") == "fdv2")
    assert ("filtered" in shown) == ("LD_FILTER_KEYS_p" in variables)
    assert ("the leader asks" in shown) == ("FLEET" in variables)


def test_a_file_of_flags_has_no_upstream() -> None:
    assert "FDv" not in effective(load("", True, False, {"FLAGS_FILE": "flags.yaml"})).replace(
        "`fdv1`", ""
    )


def test_warnings_come_last() -> None:
    """Each on a line of its own."""
    config = load(
        "",
        True,
        False,
        {
            "LD_ENV_x": "sdk-1",
            "LD_PREFIX_x": "p",
            "EXIT_ON_ERROR": "1",
            "CACHE_TTL": "1s",
            "USE_REDIS": "1",
        },
    )
    *_, first, second = effective(config).splitlines()
    assert [first, second] == [f"# Warning: {warning}" for warning in config.warnings]


def test_the_url_of_redis_is_shown_as_it_is_used() -> None:
    """Host and port are not shown, since they are merged into the URL."""
    shown = effective(load("", True, False, {"USE_REDIS": "1", "REDIS_PORT": "tcp://h:1"}))
    assert re.search(r"(?m)^url = redis://h:1 +# REDIS_PORT$", shown)
    assert "host =" not in shown


def test_the_servers_of_a_cluster_are_shown_without_passwords() -> None:
    """Each URL of the list is masked, and its password is a secret of the configuration."""
    url = "redis://:geheim@a:1,redis://:geheim@b:2"
    variables = {"USE_REDIS": "1", "REDIS_CLUSTER": "1", "REDIS_URL": url}
    config = load("", True, False, variables)
    assert re.search(
        r"(?m)^url = redis://:\*+@a:1,redis://:\*+@b:2 +# REDIS_URL$", effective(config)
    )
    assert "geheim" in secrets(config)


def test_with_sentinels_there_is_no_url() -> None:
    """They name the server; what is shown is a file that can be used."""
    variables = {"REDIS_SENTINELS": "a:1", "REDIS_SENTINEL_MASTER": "m"}
    shown = effective(load("", True, False, {"USE_REDIS": "1", **variables}))
    assert re.search(r"(?m)^sentinels = a:1 +# REDIS_SENTINELS$", shown)
    assert not re.search("(?m)^(# )?(url|host|port) = redis", shown)


def test_the_output_is_a_file_of_the_same_meaning(tmp_path: Path) -> None:
    """Except for secrets, which are masked."""
    variables = {
        "USE_REDIS": "1",
        "REDIS_HOST": "h",
        "REDIS_TLS": "1",
        "INIT_TIMEOUT": "1h1ns",
        "EVENTS_MAX_INBOUND_PAYLOAD_SIZE": "1.5MiB",
        "PROXY_CA_CERTS": "a b,#c",
        'LD_ENV_q"\\': "",
        "LD_ENV_b": "",
        'LD_PREFIX_q"\\': ' "x" ',
        "LD_PREFIX_b": "\\",
        "LD_LOG_LEVEL_b": "WARN",
        'LD_PROJ_KEY_q"\\': "p",
        "LD_PROJ_KEY_b": "p",
        "LD_FILTER_KEYS_p": "north,a;b",
    }
    for name in [name for name in variables if name.startswith("LD_ENV_")]:
        variables[name] = f"key{len(name)}"
    before = load("", True, False, variables)
    text = re.sub(r"sdkKey = \*+", "sdkKey = key", effective(before))
    after = from_file(tmp_path / "relay.conf", text)
    for section in ("main", "events", "proxy", "http", "webhook", "prometheus"):
        assert getattr(after, section) == getattr(before, section)
    assert before.redis
    assert after.redis == replace(before.redis, host="")  # it has become part of the URL
    assert after.filters == before.filters
    names = ("name", "prefix", "log_level", "ttl")
    facts = [[tuple(getattr(e, n) for n in names) for e in c.environments] for c in (before, after)]
    assert facts[0] == facts[1]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_quoting_is_undone_by_reading(text: str) -> None:
    """A file can contain any value."""
    assert parse(f"[a]\nb = {quoted(text)} # c\nd = e")[1].value == text


secret_texts = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=6, max_size=40)


@given(st.data())
def test_no_secret_is_ever_printed(data: st.DataObject) -> None:
    """Keys and passwords, also those in URLs, are masked, and known to the log's mask."""
    parts = [f"7{i}{data.draw(secret_texts)}" for i in range(14)]
    variables = {
        "LD_ENV_a": parts[0],
        "LD_MOBILE_KEY_a": parts[1],
        "LD_ENV_b": parts[2],
        "WEBHOOK_SECRET": parts[3],
        "PROXY_AUTH_PASSWORD": parts[4],
        "PROXY_URL": f"http://user:{parts[5]}%40@proxy:1",
        "STREAM_URI": f"https://user:{parts[6]}@relay",
        "REDIS_PASSWORD": parts[7],
        "REDIS_URL": f"redis://:{parts[8]}@h/1",
        "USE_REDIS": "1",
        "LD_PREFIX_a": "a",
        "LD_PREFIX_b": "b",
        "LD_CLIENT_SIDE_ID_a": "a",
        "LD_CLIENT_SIDE_ID_b": "b",
        "PUBLISH_TO": f"s3://b,https://u:{parts[9]}@h/{{key}},https://h/{{key}}?sig={parts[10]}",
        "PUBLISH_TOKEN": parts[11],
        "BOOTSTRAP_FROM": f"https://h/{{key}}?X-Amz-Security-Token={parts[12]}",
        "BOOTSTRAP_TOKEN": parts[13],
    }
    config = load("", True, False, variables)
    shown = effective(config) + repr(config.sources)
    for part in parts:
        assert part not in shown
        assert any(part in secret for secret in secrets(config))
    assert f"{parts[5]}@" in secrets(config)
    assert f"{parts[5]}%40" in secrets(config)


@pytest.mark.parametrize("option", [o for o in ALL if o.type is SECRET], ids=lambda o: o.variable)
def test_no_secret_is_printed_when_others_are_wrong(option: Option) -> None:
    """Problems name options, never their values."""
    name = "a" if option.variable.endswith("_") else ""
    variables = {option.variable + name: "hush-hush", "PORT": "x", "LD_ENV_b": ""}
    with pytest.raises(ConfigError) as caught:
        load("", True, False, {**variables, "USE_CONSUL": "1", "USE_DYNAMODB": "1"})
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user@h", "redis://********@h"),
        ("redis://u:p@[::1]:1/2", "redis://u:********@[::1]:1/2"),
        ("redis://h?password=hush&db=1", "redis://h?password=********&db=********"),
    ],
)
def test_secret_parts_of_a_url_are_masked(url: str, shown: str) -> None:
    """Passwords and query values are masked; host, port and user name are not."""
    config = load("", True, False, {"USE_REDIS": "1", "REDIS_URL": url})
    assert f"url = {shown}" in effective(config)


def test_short_words_in_urls_do_not_get_lost() -> None:
    """The user name in a URL is not masked in logs: it may be an ordinary word."""
    variables = {"USE_REDIS": "1", "REDIS_URL": "redis://default:hush@h?password=hush2"}
    assert secrets(load("", True, False, variables)) == ("hush", "hush2")


@pytest.mark.parametrize("url", ["redis://alone@h:1", "redis://:alone@h:1", "redis://:alone@h/1"])
def test_a_password_in_a_url_is_found_wherever_it_stands(url: str) -> None:
    """Redis takes user information without a colon for a password."""
    config = load("", True, False, {"LD_ENV_a": "sdk-1", "USE_REDIS": "1", "REDIS_URL": url})
    assert "one" not in effective(config)
