"""File and environment are merged, then validated; all errors are reported together."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from relay.config.load import load
from relay.config.options import Option, Support
from relay.config.render import effective, quoted, secrets
from relay.config.schema import Config, options
from relay.config.types import ADDRESSES, BOOLEAN, HEADER_NAMES, ORIGINS, consul_url
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
        ({"PORT": "1.5"}, "PORT: not a valid integer"),
        ({"PORT": "99999999999999999999"}, "PORT: not a valid integer"),
        ({"PORT": "0"}, "PORT: value must be greater than zero"),
        ({"PORT": "-1"}, "PORT: value must be greater than zero"),
        ({"PORT": "65536"}, "port must not be greater than 65535 (PORT)"),
        ({"PROMETHEUS_PORT": "x"}, "PROMETHEUS_PORT: not a valid integer"),
        ({"PROMETHEUS_PORT": "0"}, "PROMETHEUS_PORT: value must be greater than zero"),
        ({"INIT_MAX_CONCURRENT": "-1"}, "INIT_MAX_CONCURRENT: value must not be negative"),
        ({"EXIT_ALWAYS": "on"}, "EXIT_ALWAYS: not a valid boolean value (must be true/false, yes/no, or 0/1)"),
        ({"INIT_TIMEOUT": "30"}, 'INIT_TIMEOUT: not a valid duration (must use format "1ms", "1s", "1m", etc.)'),
        ({"STREAM_URI": "x"}, "STREAM_URI: must be an absolute URL/URI"),
        ({"STREAM_URI": "http://[x"}, "STREAM_URI: not a valid URL/URI"),
        ({"STREAM_URI": "http://a b"}, "STREAM_URI: not a valid URL/URI"),
        ({"STREAM_URI": "localhost:8030"}, "STREAM_URI: must be a URL that begins with http:// or https:// and names a host"),
        ({"LOG_LEVEL": "x"}, 'LOG_LEVEL: "x" is not a valid log level'),
        ({"LOG_FORMAT": "x"}, 'LOG_FORMAT: "x" is not a valid value (must be text or json)'),
        ({"TLS_MIN_VERSION": "2"}, 'TLS_MIN_VERSION: "2" is not a valid TLS version'),
        ({"TLS_ENABLED": "1"}, "TLS cert and key are required if TLS is enabled (TLS_ENABLED)"),
        ({"TLS_ENABLED": "1", "TLS_CERT": "c"}, "TLS cert and key are required if TLS is enabled (TLS_ENABLED, TLS_CERT)"),
        ({"EXPIRED_CREDENTIAL_CLEANUP_INTERVAL": "99ms"}, "expired credential cleanup interval must be >= 100ms (EXPIRED_CREDENTIAL_CLEANUP_INTERVAL)"),
        ({"POLL_INTERVAL": "999ms"}, "poll interval must be >= 1s (POLL_INTERVAL)"),
        ({"MAX_CLIENT_REQUEST_BODY_SIZE": "0B"}, "max client request body size must be greater than zero (MAX_CLIENT_REQUEST_BODY_SIZE)"),
        ({"MAX_REQUEST_HEAD_SIZE": "0"}, "max request head size must be greater than zero (MAX_REQUEST_HEAD_SIZE)"),
        ({"WORKERS": "300"}, "workers must not be greater than 256 (WORKERS)"),
        ({"EVENTS_MAX_INBOUND_PAYLOAD_SIZE": "x"}, "EVENTS_MAX_INBOUND_PAYLOAD_SIZE: not a valid base-2 byte size"),
        ({"EVENTS_MAX_INBOUND_PAYLOAD_SIZE": "0B"}, "max inbound payload size must be greater than zero (EVENTS_MAX_INBOUND_PAYLOAD_SIZE)"),
        ({"EVENTS_MAX_INBOUND_PAYLOAD_SIZE": "-1B"}, "max inbound payload size must be greater than zero (EVENTS_MAX_INBOUND_PAYLOAD_SIZE)"),
        ({"LD_ENV_a": ""}, 'SDK key is required for environment "a" (LD_ENV_a)'),
        ({"LD_ENV_": ""}, 'SDK key is required for environment "" (LD_ENV_)'),
        ({"LD_ENV_a": "k", "LD_TTL_a": "x"}, 'LD_TTL_a: not a valid duration (must use format "1ms", "1s", "1m", etc.)'),
        ({"LD_ENV_a": "k", "LD_TTL_MINUTES_a": "1"}, "LD_TTL_MINUTES_a: this variable is no longer supported; use LD_TTL_a"),
        ({"EVENTS_SAMPLING_INTERVAL": "1"}, "EVENTS_SAMPLING_INTERVAL: this variable is no longer supported"),
        ({"USE_REDIS": "x"}, "USE_REDIS: not a valid boolean value (must be true/false, yes/no, or 0/1)"),
        ({"USE_REDIS": "1", "REDIS_TTL": "1s"}, "REDIS_TTL: this variable is no longer supported; use CACHE_TTL"),
        ({"USE_REDIS": "1", "REDIS_PORT": "tcp://h:x"}, "REDIS_PORT: not a valid integer"),
        ({"USE_REDIS": "1", "REDIS_PORT": "tcp://h:0"}, "REDIS_PORT: value must be greater than zero"),
        ({"USE_REDIS": "1", "REDIS_PORT": "70000"}, "invalid Redis hostname (REDIS_PORT)"),
        ({"USE_REDIS": "1", "REDIS_HOST": "a[b"}, "invalid Redis hostname (REDIS_HOST)"),
        ({"USE_REDIS": "1", "REDIS_URL": "http://h"}, "invalid Redis URL: it must begin with redis:// or rediss:// (REDIS_URL)"),
        ({"USE_REDIS": "1", "REDIS_URL": "redis://h", "REDIS_HOST": "h"}, "please specify Redis URL or host/port, but not both (REDIS_URL, REDIS_HOST)"),
        ({"USE_REDIS": "1", "REDIS_IDENTITY": "azure"}, 'REDIS_IDENTITY: "azure" is not a valid value (must be aws or gcp)'),
        ({"USE_REDIS": "1", "REDIS_IDENTITY": "gcp"}, "[Redis] identity: gcp needs TLS, as in rediss:// or with tls (REDIS_IDENTITY)"),
        ({"USE_REDIS": "1", "REDIS_IDENTITY": "gcp", "REDIS_TLS": "1", "REDIS_SENTINELS": "a", "REDIS_SENTINEL_MASTER": "m"}, "[Redis] identity: gcp does not go with Sentinels, as the cloud has none (REDIS_IDENTITY, REDIS_SENTINELS)"),
        ({"USE_REDIS": "1", "REDIS_IDENTITY": "gcp", "REDIS_TLS": "1", "REDIS_PASSWORD": "p"}, "[Redis] identity: gcp takes the place of a password, so there must not be one (REDIS_IDENTITY, REDIS_PASSWORD)"),
        ({"USE_REDIS": "1", "REDIS_IDENTITY": "gcp", "REDIS_URL": "rediss://u:p@h"}, "[Redis] identity: gcp takes the place of a password, so there must not be one (REDIS_IDENTITY, REDIS_URL)"),
        ({"USE_REDIS": "1", "REDIS_IDENTITY": "aws", "REDIS_TLS": "1", "REDIS_USERNAME": "u"}, "[Redis] identity: aws needs username and iamCache (REDIS_IDENTITY, REDIS_USERNAME)"),
        ({"USE_REDIS": "1", "REDIS_IDENTITY": "aws", "REDIS_TLS": "1", "REDIS_IAM_CACHE": "c"}, "[Redis] identity: aws needs username and iamCache (REDIS_IDENTITY, REDIS_IAM_CACHE)"),
        ({"USE_REDIS": "1", "REDIS_URL": "redis://a,redis://b"}, "[Redis] a list of servers is for a cluster; cluster = true makes it one (REDIS_URL)"),
        ({"USE_REDIS": "1", "REDIS_HOST": "a,b"}, "[Redis] a list of servers is for a cluster; cluster = true makes it one (REDIS_HOST)"),
        ({"USE_REDIS": "1", "REDIS_CLUSTER": "1", "REDIS_HOST": "a,,b"}, "invalid Redis hostname (REDIS_HOST)"),
        ({"USE_REDIS": "1", "REDIS_CLUSTER": "1", "REDIS_HOST": "a:x"}, "invalid Redis hostname (REDIS_HOST)"),
        ({"USE_REDIS": "1", "REDIS_CLUSTER": "1", "REDIS_URL": "redis://a,redis:///"}, "invalid Redis hostname (REDIS_URL)"),
        ({"USE_REDIS": "1", "REDIS_CLUSTER": "1", "REDIS_URL": "redis://a/3"}, "[Redis] a cluster has no databases but number 0 (REDIS_CLUSTER, REDIS_URL)"),
        ({"USE_REDIS": "1", "REDIS_CLUSTER": "1", "REDIS_DATABASE": "3"}, "[Redis] a cluster has no databases but number 0 (REDIS_CLUSTER, REDIS_DATABASE)"),
        ({"USE_REDIS": "1", "REDIS_CLUSTER": "1", "REDIS_URL": "redis://:p@a,redis://:q@b"}, "[Redis] the servers of a cluster differ in host and port only (REDIS_URL)"),
        ({"USE_REDIS": "1", "REDIS_CLUSTER": "1", "REDIS_URL": "redis://a,rediss://b"}, "[Redis] the servers of a cluster differ in host and port only (REDIS_URL)"),
        ({"USE_REDIS": "1", "REDIS_CLUSTER": "1", "REDIS_URL": "unix:///s"}, "[Redis] a cluster has no Unix socket (REDIS_CLUSTER, REDIS_URL)"),
        ({"USE_REDIS": "1", "REDIS_URL": "redis://a/3", "REDIS_DATABASE": "3"}, "please specify the Redis database in the URL or as [Redis] database, but not both (REDIS_DATABASE, REDIS_URL)"),
        ({"USE_REDIS": "1", "REDIS_SENTINELS": "a"}, "[Redis] sentinels need sentinelMaster, the name under which they know the server (REDIS_SENTINELS)"),
        ({"USE_REDIS": "1", "REDIS_SENTINELS": "a:b", "REDIS_SENTINEL_MASTER": "m"}, "REDIS_SENTINELS: a server is written host or host:port"),
        ({"USE_REDIS": "1", "REDIS_SENTINELS": "a", "REDIS_SENTINEL_MASTER": "m", "REDIS_CLUSTER": "1"}, "please specify [Redis] cluster or sentinels, but not both: a cluster has none (REDIS_CLUSTER, REDIS_SENTINELS)"),
        ({"USE_REDIS": "1", "REDIS_SENTINELS": "a", "REDIS_SENTINEL_MASTER": "m", "REDIS_URL": "redis://b"}, "[Redis] sentinels name the server: url, host and port must not be specified, too (REDIS_SENTINELS, REDIS_URL)"),
        ({"USE_REDIS": "1", "REDIS_SENTINEL_MASTER": "m"}, "[Redis] sentinelMaster has no sentinels to name it (REDIS_SENTINEL_MASTER)"),
        ({"USE_REDIS": "1", "REDIS_CLIENT_CERT_FILE": "c"}, "a Redis client certificate needs a key, and a key a certificate (REDIS_CLIENT_CERT_FILE)"),
        ({"FLEET": "1"}, "[Fleet] enabled: a fleet needs Redis (FLEET)"),
        ({"FLEET": "1", "USE_REDIS": "1", "EXIT_ALWAYS": "1"}, "[Fleet] enabled: a relay that exits cannot take part in a fleet (FLEET)"),
        ({"FILE_DATA_SOURCE_MONITORING_INTERVAL": "1s"}, "must specify offline mode filename if other offline mode properties are set (FILE_DATA_SOURCE_MONITORING_INTERVAL)"),
        ({"USE_CONSUL": "1", "CONSUL_HOST": "ftp://h"}, "CONSUL_HOST: must begin with http://, https:// or unix://, or with the host"),
        ({"USE_CONSUL": "1", "CONSUL_HOST": "http://u:hush@h"}, "CONSUL_HOST: must not contain a user or a password; Consul knows tokens only"),
        ({"USE_CONSUL": "1", "CONSUL_HOST": "h:x"}, "CONSUL_HOST: not a valid URL/URI"),
        ({"USE_CONSUL": "1", "CONSUL_HOST": ":8500"}, "CONSUL_HOST: must be a host, or a URL that names one, without ? and #"),
        ({"USE_CONSUL": "1", "CONSUL_HOST": "h?ns=x"}, "CONSUL_HOST: must be a host, or a URL that names one, without ? and #"),
        ({"USE_CONSUL": "1", "CONSUL_MAX_VALUE_SIZE": "0"}, "[Consul] maxValueSize must be greater than zero (CONSUL_MAX_VALUE_SIZE)"),
        ({"USE_CONSUL": "1", "LD_ENV_a": "k", "LD_PREFIX_a": "/p"}, 'environment "a": a prefix in Consul must not begin with a slash (LD_PREFIX_a)'),
        ({"USE_CONSUL": "1", "LD_ENV_a": "k", "LD_PREFIX_a": "p", "LD_ENV_b": "l", "LD_PREFIX_b": "p/features"}, 'environment "b": its prefix "p/features" is where "a" has its items in Consul (LD_PREFIX_a, LD_PREFIX_b)'),
        ({"USE_CONSUL": "1", "LD_ENV_a": "k", "LD_PROJ_KEY_a": "shop", "LD_FILTER_KEYS_shop": "segments"}, 'environment "a/segments": its prefix "launchdarkly/segments" is where "a" has its items in Consul'),
        ({"USE_DATADOG": "1"}, "[Datadog] enabled is not supported in this release; the relay's metrics are at /metrics, for Prometheus (USE_DATADOG)"),
        ({"USE_STACKDRIVER": "1"}, "[Stackdriver] enabled is not supported in this release; the relay's metrics are at /metrics, for Prometheus (USE_STACKDRIVER)"),
        ({"USE_OTLP": "1"}, "[OpenTelemetry] enabled is not supported in this release; the relay's metrics are at /metrics, for Prometheus (USE_OTLP)"),
        ({"PUBLISH_TO": "/srv/flags"}, "PUBLISH_TO: must be an absolute URL/URI"),
        ({"PUBLISH_TO": "file://srv/flags"}, "PUBLISH_TO: must be a URL of the form file:///FOLDER, s3://BUCKET/PREFIX, or https:// with the key as {key}"),
        ({"PUBLISH_TO": "s3:///flags"}, "PUBLISH_TO: must be a URL of the form file:///FOLDER, s3://BUCKET/PREFIX, or https:// with the key as {key}"),
        ({"PUBLISH_TO": "gs://flags"}, "PUBLISH_TO: must be a URL of the form file:///FOLDER, s3://BUCKET/PREFIX, or https:// with the key as {key}"),
        ({"PUBLISH_TO": "s3://flags/a?b"}, "PUBLISH_TO: a file or an object has no query; ? and # are written %3F and %23"),
        ({"PUBLISH_TO": "https://h/x"}, "[Publish] to: an https URL must contain {key}, which stands for the document's name (PUBLISH_TO)"),
        ({"PUBLISH_TO": "s3://flags", "LD_ENV_a": "k"}, 'environment "a" has no client-side ID (envId), which names its document (PUBLISH_TO, LD_ENV_a)'),
        ({"BOOTSTRAP_FROM": "file:///srv", "LD_ENV_a": "k"}, 'environment "a" has no client-side ID (envId), which names its document (BOOTSTRAP_FROM, LD_ENV_a)'),
        ({"BOOTSTRAP_FROM": "https://h/x", "AUTO_CONFIG_KEY": "k"}, "[Main] bootstrapFrom: an https URL without {key} names one document only, and there is not exactly one environment (BOOTSTRAP_FROM)"),
        ({"PUBLISH_TO": "s3://flags", "LD_ENV_a": "k", "LD_ENV_b": "l", "LD_CLIENT_SIDE_ID_a": "i", "LD_CLIENT_SIDE_ID_b": "i"}, 'environments "a" and "b" have the same client-side ID, which names their document (PUBLISH_TO, LD_CLIENT_SIDE_ID_b)'),
        ({"PROMETHEUS_PREFIX": "9 x"}, "Prometheus prefix must consist of letters, digits and _, and begin with no digit (PROMETHEUS_PREFIX)"),
        ({"PROMETHEUS_PORT": "70000"}, "Prometheus port must not be greater than 65535 (PROMETHEUS_PORT)"),
        ({"USE_PROMETHEUS": "1", "PROMETHEUS_PORT": "8030"}, "Prometheus port must not be the port of the relay (PROMETHEUS_PORT)"),
        ({"PROXY_AUTH_NTLM": "1", "PROXY_URL": "http://p", "PROXY_AUTH_USER": "u", "PROXY_AUTH_PASSWORD": "p"}, "[Proxy] ntlmAuth is not supported in this release (PROXY_AUTH_NTLM)"),
    ],
)  # fmt: skip
def test_errors_use_the_words_of_ld_relay(variables: dict[str, str], problem: str) -> None:
    """Each rule has its message, with the sources of the options."""
    assert problems(variables) == (problem,)


REFUSED = re.compile("is not supported in this release")
PREFIX_MISSING = "does not have a prefix specified for database storage"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"ENV_DATASTORE_PREFIX": "p"},
            ["must specify auto-configuration key if other auto-configuration properties are set (ENV_DATASTORE_PREFIX)",
             "must specify offline mode filename if other offline mode properties are set (ENV_DATASTORE_PREFIX)"],
        ),
        (
            {"AUTO_CONFIG_KEY": "k", "LD_ENV_a": "k"},
            ["cannot configure specific environments if auto-configuration is enabled (AUTO_CONFIG_KEY, LD_ENV_a)"],
        ),
        (
            {"AUTO_CONFIG_KEY": "k", "FILE_DATA_SOURCE": "f"},
            ["cannot specify both auto-configuration key and file data source (AUTO_CONFIG_KEY, FILE_DATA_SOURCE)"],
        ),
        (
            {"FILE_DATA_SOURCE": "f", "LD_ENV_a": "k"},
            ["cannot configure specific environments if offline mode is enabled (FILE_DATA_SOURCE, LD_ENV_a)"],
        ),
        (
            {"FILE_DATA_SOURCE": "f", "FILE_DATA_SOURCE_MONITORING_INTERVAL": "99ms"},
            ["file data source monitoring interval must be >= 100ms (FILE_DATA_SOURCE_MONITORING_INTERVAL)"],
        ),
        (
            {"AUTO_CONFIG_KEY": "k", "LD_FILTER_KEYS_p": "f"},
            ["cannot configure filters if auto-configuration is enabled (LD_FILTER_KEYS_p)"],
        ),
        (
            {"LD_ENV_a": "k", "LD_FILTER_KEYS_p": "f"},
            ["when filters are configured, all environments must specify a 'projKey' (LD_ENV_a)"],
        ),
        (
            {"LD_ENV_a": "k", "LD_PROJ_KEY_a": "q", "LD_FILTER_KEYS_p": "f", "LD_FILTER_KEYS_q": ""},
            ["filters are configured for project 'p', but no environment references that project (LD_FILTER_KEYS_p)",
             "filter key list for project 'q' cannot be empty (LD_FILTER_KEYS_q)"],
        ),
        (
            {"LD_ENV_a": "k", "LD_PROJ_KEY_a": "p", "LD_FILTER_KEYS_p": "f,, g"},
            ["filter key [1] for project 'p' is malformed (note: lists are comma-delimited) (LD_FILTER_KEYS_p)"],
        ),
        (
            {"LD_ENV_a": "k", "LD_PROJ_KEY_a": "p", "LD_FILTER_KEYS_p": "f, ,g"},
            ["filter key [1] for project 'p' is malformed (note: lists are comma-delimited) (LD_FILTER_KEYS_p)"],
        ),
        (
            {"LD_ENV_a": "k", "LD_ENV_a/f": "l", "LD_PROJ_KEY_a": "p", "LD_PROJ_KEY_a/f": "q", "LD_FILTER_KEYS_p": "f"},
            ['there are two environments "a/f": a filter\'s key follows the name (LD_ENV_a/f)'],
        ),
        (
            {"USE_CONSUL": "1", "CONSUL_TOKEN": "t", "CONSUL_TOKEN_FILE": "f"},
            ["Consul token must be specified as either an inline value or a file, but not both (CONSUL_TOKEN, CONSUL_TOKEN_FILE)"],
        ),
        (
            {"USE_DYNAMODB": "1", "LD_ENV_a": "k", "LD_PREFIX_a": "p"},
            ["TableName property must be specified for DynamoDB, either globally or per environment (LD_ENV_a)"],
        ),
        (
            {"USE_DYNAMODB": "1", "AUTO_CONFIG_KEY": "k", "ENV_DATASTORE_PREFIX": "$CID"},
            ["TableName property must be specified for DynamoDB, either globally or per environment (AUTO_CONFIG_KEY)"],
        ),
        (
            {"USE_DYNAMODB": "1", "USE_REDIS": "1", "AUTO_CONFIG_KEY": "k", "ENV_DATASTORE_TABLE_NAME": "t-$CID"},
            ['when using auto-configuration with database storage, database prefix (or, if using DynamoDB, table name) must be specified and must contain "$CID" (AUTO_CONFIG_KEY, ENV_DATASTORE_TABLE_NAME)'],
        ),
        (
            {"USE_DYNAMODB": "1", "DYNAMODB_TABLE": "t", "LD_ENV_a": "k", "LD_ENV_b": "l", "LD_TABLE_NAME_a": "t"},
            ['environment "b" does not have a prefix or table name specified for database storage (LD_ENV_b)'],
        ),
        (
            {"USE_REDIS": "1", "LD_ENV_a": "k", "LD_ENV_b": "l", "LD_ENV_c": "m", "LD_PREFIX_b": "p"},
            [f'environment "a" {PREFIX_MISSING} (LD_ENV_a)', f'environment "c" {PREFIX_MISSING} (LD_ENV_c)'],
        ),
        (
            {"USE_REDIS": "1", "AUTO_CONFIG_KEY": "k", "ENV_DATASTORE_PREFIX": "p"},
            ['when using auto-configuration with database storage, database prefix (or, if using DynamoDB, table name) must be specified and must contain "$CID" (AUTO_CONFIG_KEY, ENV_DATASTORE_PREFIX)'],
        ),
        ({"PROXY_AUTH_NTLM": "1"}, ["cannot specify proxy authentication without a proxy URL (PROXY_AUTH_NTLM)"]),
        (
            {"PROXY_AUTH_NTLM": "1", "PROXY_URL": "http://p", "PROXY_AUTH_USER": "u"},
            ["NTLM proxy authentication requires username and password (PROXY_AUTH_NTLM)"],
        ),
    ],
)  # fmt: skip
def test_unsupported_options_are_checked_too(
    variables: dict[str, str], expected: list[str]
) -> None:
    """ld-relay's rules on options that this release does not support, without the refusals."""
    assert [p for p in problems(variables) if not REFUSED.search(p)] == expected


@pytest.mark.parametrize(
    "variables",
    [
        {"LD_ENV_a": "k", "DYNAMODB_TABLE": "t"},
        {"LD_ENV_a": "k", "LD_TABLE_NAME_a": "t"},
        {"AUTO_CONFIG_KEY": "k", "ENV_DATASTORE_TABLE_NAME": "t-$CID"},
        {"LD_ENV_a": "k", "DYNAMODB_TABLE": "t", "USE_CONSUL": "1", "USE_REDIS": "1"},
    ],
)
def test_dynamodb_needs_a_table_and_may_stand_beside_others(variables: dict[str, str]) -> None:
    """One table for all, or one for each environment; ld-relay takes one database only."""
    config = load("", True, False, {"USE_DYNAMODB": "1", **variables})
    assert config.dynamodb is not None
    assert (config.redis is not None) == ("USE_REDIS" in variables)


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({"LD_TABLE_NAME_a": "t", "LD_TABLE_NAME_b": "t"}, True),
        ({"LD_TABLE_NAME_a": "t", "LD_TABLE_NAME_b": "u"}, False),
        ({"LD_PREFIX_a": "p", "LD_PREFIX_b": "p"}, True),
        ({"LD_PREFIX_a": "p", "LD_PREFIX_b": "p", "LD_TABLE_NAME_b": "u"}, False),
        ({"LD_PREFIX_a": "p", "LD_PREFIX_b": "p", "LD_TABLE_NAME_b": "common"}, True),
    ],
)
def test_environments_that_share_a_place_in_dynamodb_are_named(more, warned) -> None:
    """Table and prefix together are the place."""
    variables = {"USE_DYNAMODB": "1", "DYNAMODB_TABLE": "common", "LD_ENV_a": "k", "LD_ENV_b": "l"}
    config = load("", True, False, {**variables, **more})
    found = [text for text in config.warnings if "same table and database prefix" in text]
    assert len(found) == warned


def test_each_filter_adds_a_variant_of_the_environments_of_its_project() -> None:
    """It has a name and a prefix of its own, and everything else of the environment."""
    config = from_env(
        {
            "LD_ENV_a": "sdk-a",
            "LD_PROJ_KEY_a": "p",
            "LD_PREFIX_a": "x",
            "LD_TTL_a": "1m",
            "LD_ENV_b": "sdk-b",
            "LD_PROJ_KEY_b": "p",
            "LD_ENV_c": "sdk-c",
            "LD_PROJ_KEY_c": "q",
            "LD_FILTER_KEYS_p": "north, a b,north",
        }
    )
    a, a_north, a_blank, b, b_north, b_blank, c = config.all_environments
    assert (a, b, c) == config.environments
    assert [e.name for e in (a_north, a_blank, b_north)] == ["a/north", "a/a b", "b/north"]
    assert [e.filter_key for e in (a, a_north, a_blank)] == ["", "north", "a b"]
    assert [e.prefix for e in (a, a_north, b, b_north)] == [
        "x",
        "x/north",
        "",
        "launchdarkly/north",
    ]
    assert replace(a_north, name="a", prefix="x", filter_key="") == a
    assert b_blank.sdk_key == b.sdk_key


def test_an_environment_may_have_one_filter_only(tmp_path: Path) -> None:
    """`filterKey` of the file; it is no variant, and the filters of its project add the others."""
    path = tmp_path / "relay.conf"
    environment = '[Environment "a"]\nsdkKey = k\nprojKey = p\nfilterKey = north\n'
    path.write_text(f'{environment}[Filters "p"]\nkeys = north,south')
    config = load(str(path), False, False, {})
    assert [e.name for e in config.all_environments] == ["a", "a/south"]
    assert [e.filter_key for e in config.all_environments] == ["north", "south"]


def test_environments_may_share_a_key_if_their_filters_differ(tmp_path: Path) -> None:
    """A request's filter says which one is meant; without that, there is a warning."""
    path = tmp_path / "relay.conf"
    both = '[Environment "a"]\nsdkKey = k\nfilterKey = north\n[Environment "b"]\nsdkKey = k\n'
    path.write_text(f"{both}filterKey = south\n")
    assert load(str(path), False, False, {}).warnings == ()
    path.write_text(f"{both}filterKey = north\n")
    (warning,) = load(str(path), False, False, {}).warnings
    assert warning.startswith('environments "a" and "b" have the same SDK key; "b" answers to it')


def test_variables_that_two_sections_share_belong_to_the_archive_if_there_is_one() -> None:
    config = from_env(
        {
            "FILE_DATA_SOURCE": "f",
            "ENV_ALLOWED_ORIGIN": "http://o",
            "ENV_DATASTORE_PREFIX": "p-$CID",
            "USE_REDIS": "1",
        }
    )
    assert config.offline_mode.file_data_source == "f"
    assert config.offline_mode.env_allowed_origin == ("http://o",)
    assert config.offline_mode.env_datastore_prefix == "p-$CID"
    assert not config.warnings


def test_members_of_segments_are_never_logged() -> None:
    """ld-relay's variable for that is answered with a warning."""
    warnings = from_env({"LD_TRACE_LOG_BIG_SEGMENTS": "1"}).warnings
    assert warnings == (
        "LD_TRACE_LOG_BIG_SEGMENTS has no effect: who is in a segment is never logged",
    )


@pytest.mark.parametrize(
    ("variables", "warning"),
    [
        ({"USE_REDIS": "1"}, "each overwrites what the others have stored"),
        ({"FLAGS_FILE": "f"}, "[Main] flagsFile is not served, because offline mode is enabled"),
    ],
)
def test_an_archive_makes_other_options_pointless(variables, warning) -> None:
    (found,) = from_env({"FILE_DATA_SOURCE": "f", **variables}).warnings
    assert warning in found


def test_all_problems_come_at_once() -> None:
    """All mistakes are reported together."""
    variables = {"PORT": "x", "LOG_LEVEL": "y", "TLS_ENABLED": "1", "LD_ENV_a": "", "WORKERS": "0"}
    assert len(problems(variables)) == len(variables)


def test_an_unreadable_file_neither_hides_nor_causes_other_errors(tmp_path: Path) -> None:
    """Nothing that depends on its content is reported."""
    path = tmp_path / "relay.conf"
    path.write_text("[Main")
    with pytest.raises(ConfigError) as caught:
        load(str(path), True, False, {"PORT": "x", "TLS_ENABLED": "1"})
    first, second = caught.value.problems
    assert first.startswith(f'failed to read configuration file "{path}": {path}:1:1: ')
    assert second == "PORT: not a valid integer"


def test_a_variable_completes_a_section_of_the_file(tmp_path: Path) -> None:
    """A section may be split between file and variables; variables override the file."""
    path = tmp_path / "relay.conf"
    path.write_text(
        '[main]\nport = 1\n[Environment "Shop"]\nprefix = "p"\nallowedOrigin = http://a\n'
    )
    origins = "http://b, http://c"
    variables = {"LD_ENV_Shop": "sdk-1", "PORT": "2", "LD_ALLOWED_ORIGIN_Shop": origins}
    config = load(str(path), True, False, variables)
    (shop,) = config.environments
    assert (config.main.port, shop.name, shop.prefix) == (2, "Shop", "p")
    assert shop.sdk_key.reveal() == "sdk-1"
    assert shop.allowed_origin == ("http://a", "http://b", "http://c")
    assert config.sources["Main.port"] == "PORT"
    assert config.sources['Environment "Shop".prefix'] == f"{path}:4"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[Nonsense]", 'PATH:1: unsupported or misspelled section "Nonsense"'),
        ("[Main]\nx = 1", 'PATH:2: unsupported or misspelled section "Main", variable "x"'),
        ('[Main "x"]', 'PATH:1: unsupported or misspelled section "Main", subsection "x"'),
        ('[Environment "a"]\nsdkKey = k\nx = 1', 'PATH:3: unsupported or misspelled section "Environment", subsection "a", variable "x"'),
        ("[default-environment]", 'PATH:1: unsupported or misspelled section "default-environment"'),
        ('[Environment "a"]\nmobileKey = m', 'SDK key is required for environment "a" (PATH:1)'),
        ('[Filters "p"]\n[Environment "a"]\nsdkKey = k\nprojKey = p', "filter key list for project 'p' cannot be empty (PATH:1)"),
        ('[Environment "\\\\x\\0"]', 'failed to read configuration file "PATH": PATH:1:1: unknown escape sequence \\0'),
        ("[Main]\nport = x", "PATH:2: port: not a valid integer"),
        ("[Main]\nexitAlways =", "PATH:2: exitAlways: failed to parse bool ``"),
        ('[Environment ""]', 'failed to read configuration file "PATH": PATH:1:1: empty subsection name'),
        ("[Main]\nport", "PATH:2: port: blank value not supported for type"),
        ("[Main]\nexitAlways = x", "PATH:2: exitAlways: failed to parse bool `x`"),
        ('[Main]\nlogLevel = "', 'failed to read configuration file "PATH": PATH:2:13: string not terminated'),
    ],
)  # fmt: skip
def test_errors_in_a_file_name_their_line(tmp_path: Path, text: str, problem: str) -> None:
    """Each error in a file has its position."""
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
    assert load(path, False, True, {}) == Config(main=from_env({}).main, files=(path,))


def test_all_files_that_are_read_are_known(tmp_path: Path) -> None:
    """By their states it is known whether the configuration has changed."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    key.write_text("sdk-a")
    lines = '[Environment "a"]', f"sdkKeyFile = {key}", "[Main]", "tlsEnabled = true"
    file = tmp_path / "relay.conf"
    tls = f"tlsCert = {certificate}", f"tlsKey = {certificate}.key"
    file.write_text("\n".join((*lines, *tls)))
    names = ("relay.conf", "mobile", "key", "certificate", "certificate.key")
    variables = {"LD_MOBILE_KEY_a_FILE": str(tmp_path / "mobile"), "LD_ENV_a_FILE": str(key)}
    (tmp_path / "mobile").write_text("mob-a")
    files = load(str(file), True, False, variables).files
    assert set(files) == {str(tmp_path / name) for name in names}


def test_a_hundred_environments() -> None:
    """The number of environments has no limit."""
    variables = {f"LD_ENV_{i}": f"sdk-{i}" for i in range(100)}
    assert [each.sdk_key.reveal() for each in from_env(variables).environments] == list(
        variables.values()
    )


def test_options_of_a_later_release_are_accepted_with_a_warning(tmp_path: Path) -> None:
    """No option is silently ignored."""
    file = tmp_path / "relay.conf"
    file.write_text('[Datadog]\nprefix = x\n[Environment "a"]\nsdkKey = sdk-1\n')
    assert load(str(file), False, False, {}).warnings == (
        f"[Datadog] prefix takes effect in a later release ({file}:2)",
    )


@pytest.mark.parametrize(
    ("variables", "warning"),
    [
        ({"CACHE_TTL": "1s", "USE_REDIS": "1"}, "[Redis] localTtl has no effect: The relay serves from memory and never from the database, so nothing is cached for a time (CACHE_TTL)"),
        ({"EXIT_ON_ERROR": "1"}, "[Main] exitOnError has no effect without exitAlways (EXIT_ON_ERROR)"),
        ({"FLAGS_FILE": "f", "LD_ENV_a": "k"}, "[Main] flagsFile is not served, because environments are configured (FLAGS_FILE)"),
        ({"REDIS_URL": "redis://h"}, "REDIS_URL has no effect without USE_REDIS=true"),
        ({"USE_REDIS": "1", "REDIS_IAM_CACHE": "c"}, "[Redis] options of IAM have no effect without identity = aws (REDIS_IAM_CACHE)"),
        ({"REDIS_SENTINELS": "h"}, "REDIS_SENTINELS has no effect without USE_REDIS=true"),
        ({"USE_REDIS": "1", "REDIS_SENTINEL_TLS": "1"}, "[Redis] sentinelTls has no effect without sentinels (REDIS_SENTINEL_TLS)"),
        ({"LD_MOBILE_KEY_a": "m"}, "LD_MOBILE_KEY_a has no effect without LD_ENV_a"),
        ({"EVENTS_METRICS_CAPACITY": "10000", "LD_ENV_a": "k", "LD_ENV_b": "k"}, 'environments "a" and "b" have the same SDK key; "b" answers to it (LD_ENV_a, LD_ENV_b)'),
        ({"LD_ENV_a": "k", "LD_ENV_b": "l", "LD_MOBILE_KEY_a": "m", "LD_MOBILE_KEY_b": "m"}, 'environments "a" and "b" have the same mobile key; "b" answers to it (LD_MOBILE_KEY_a, LD_MOBILE_KEY_b)'),
        ({"LD_ENV_a": "k", "LD_ENV_b": "l", "LD_CLIENT_SIDE_ID_a": "m", "LD_CLIENT_SIDE_ID_b": "m"}, 'environments "a" and "b" have the same client-side ID; "b" answers to it (LD_CLIENT_SIDE_ID_a, LD_CLIENT_SIDE_ID_b)'),
        ({"USE_REDIS": "1", "LD_ENV_a": "k", "LD_ENV_b": "l", "LD_PREFIX_a": "m", "LD_PREFIX_b": "m"}, 'environments "a" and "b" have the same database prefix; each overwrites what the other has stored (LD_PREFIX_a, LD_PREFIX_b)'),
        ({"USE_REDIS": "1", "LD_ENV_a": "k"}, f'environment "a" {PREFIX_MISSING}; this would be an error if multiple environments were configured (LD_ENV_a)'),
        ({"PUBLISH_TOKEN": "t", "PUBLISH_TO": "s3://b"}, "[Publish] token has no effect without an https URL (PUBLISH_TOKEN)"),
        ({"BOOTSTRAP_TOKEN": "t", "LD_ENV_a": "k"}, "[Main] bootstrapToken has no effect without an https URL (BOOTSTRAP_TOKEN)"),
        ({"FLEET": "1", "USE_REDIS": "1", "FLAGS_FILE": "f"}, "[Fleet] enabled has no effect: the flags do not come from LaunchDarkly (FLEET)"),
        ({"BOOTSTRAP_FROM": "s3://b", "FLAGS_FILE": "f"}, "[Main] bootstrapFrom has no effect: the flags do not come from LaunchDarkly (BOOTSTRAP_FROM)"),
        ({"DATA_SYSTEM": "fdv2", "STREAM_URI": "http://h"}, "[Main] dataSystem = fdv2 streams from streamUri and polls baseUri; only one of them is another than LaunchDarkly's (DATA_SYSTEM, STREAM_URI)"),
    ],
)  # fmt: skip
def test_questionable_options_cause_a_warning(variables: dict[str, str], warning: str) -> None:
    """The relay starts, like ld-relay, and warns of settings that are probably a mistake."""
    assert warning in from_env(variables).warnings


def test_harmless_settings_cause_no_warning() -> None:
    """Empty variables, disabled features and variables of other programs are not mentioned."""
    variables = {
        "LD_ENV_a": "k",
        "LD_ENV_b": "l",
        "LD_MOBILE_KEY_c": "",
        "USE_REDIS": "false",
        "REDIS_URL": "redis://h",
        "REDIS_PORT": "tcp://10.0.0.1:6379",
        "OTEL_LOGS_EXPORTER": "console",
        "LD_LIBRARY_PATH": "/lib",
        "DATA_SYSTEM": "fdv2",
        "STREAM_URI": "http://h",
        "BASE_URI": "http://h",
    }
    config = from_env(variables)
    assert (config.warnings, config.redis) == ((), None)


def test_the_capacity_of_usage_metrics_has_a_minimum() -> None:
    """It is raised to 1000, as in recent ld-relay."""
    config = from_env({"EVENTS_METRICS_CAPACITY": "5"})
    assert config.events.metrics_capacity == 1000
    expected = "[Events] metricsCapacity is taken as 1000, the least possible"
    assert f"{expected} (EVENTS_METRICS_CAPACITY)" in config.warnings


def test_a_redis_section_without_a_server_causes_a_warning(tmp_path: Path) -> None:
    """A password alone enables nothing."""
    path = tmp_path / "relay.conf"
    path.write_text("[Redis]\npassword = p\n")
    config = load(str(path), False, False, {})
    assert config.redis is None
    assert config.warnings == (
        f"[Redis] has no effect without url, host, port or sentinels ({path}:2)",
    )


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({"USE_REDIS": "1"}, "redis://localhost:6379"),
        ({"USE_REDIS": "1", "REDIS_PORT": "tcp://h:1"}, "redis://h:1"),
        ({"USE_REDIS": "1", "REDIS_PORT": "tcp://[::1]:1"}, "redis://[::1]:1"),
        ({"USE_REDIS": "1", "REDIS_PORT": "1"}, "redis://localhost:1"),
        ({"USE_REDIS": "1", "REDIS_HOST": ""}, "redis://localhost:6379"),
        ({"USE_REDIS": "1", "REDIS_URL": "rediss://u:p@h:1/2"}, "rediss://u:p@h:1/2"),
        ({"USE_REDIS": "1", "REDIS_TLS": "1"}, "rediss://localhost:6379"),
        ({"USE_REDIS": "1", "REDIS_CLUSTER": "1"}, "redis://localhost:6379"),
        (
            {"USE_REDIS": "1", "REDIS_CLUSTER": "1", "REDIS_HOST": "a, b:7", "REDIS_TLS": "1"},
            "rediss://a:6379,rediss://b:7",
        ),
        (
            {"USE_REDIS": "1", "REDIS_CLUSTER": "1", "REDIS_URL": "redis://:p,q@a:1,b/0"},
            "redis://:p,q@a:1/0,redis://:p,q@b/0",
        ),
        (
            {"USE_REDIS": "1", "REDIS_SENTINELS": "a,b:7", "REDIS_SENTINEL_MASTER": "m"},
            "",
        ),
    ],
)
def test_the_redis_url_is_complete(variables: dict[str, str], url: str) -> None:
    """Host and port become a URL."""
    redis = from_env(variables).redis
    assert redis
    assert redis.url == url


@pytest.mark.parametrize(
    ("variables", "host"),
    [
        ({"USE_CONSUL": "1"}, "localhost"),
        ({"USE_CONSUL": "1", "CONSUL_HOST": "h:1"}, "h:1"),
        ({"USE_CONSUL": "1", "CONSUL_HOST": "https://h/path"}, "https://h/path"),
        ({"USE_CONSUL": "1", "CONSUL_HOST": "", "CONSUL_HTTP_ADDR": "h"}, None),
        ({"USE_CONSUL": "1", "CONSUL_HTTP_ADDR": "h"}, "localhost"),
        ({"CONSUL_HOST": "h"}, None),
    ],
)
def test_consul_is_used_where_a_host_is_left(variables: dict[str, str], host: str | None) -> None:
    """`localhost` is the default of the variables; an empty one switches Consul off."""
    consul = load("", True, False, {"LD_ENV_a": "k", **variables}).consul
    assert (consul.host if consul else None) == host


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("localhost", "http://localhost:8500"),
        ("h:1", "http://h:1"),
        ("h:", "http://h:8500"),
        ("h/path", "http://h:8500/path"),
        ("[::1]", "http://[::1]:8500"),
        ("http://h", "http://h"),
        ("http://h:1/path/", "http://h:1/path/"),
        ("https://h", "https://h"),
        ("unix:///run/consul.sock", "unix:///run/consul.sock"),
    ],
)
def test_a_consul_address_without_a_port_means_consuls(address: str, url: str) -> None:
    """Unless it is a URL, whose scheme has a port."""
    assert consul_url(address) == url


def test_a_consul_section_without_a_host_causes_a_warning(tmp_path: Path) -> None:
    """Its other options do not enable it."""
    file = tmp_path / "relay.conf"
    file.write_text('[Environment "a"]\nsdkKey = k\n[Consul]\ntoken = t\n')
    config = load(str(file), False, False, {})
    assert config.consul is None
    assert f"[Consul] has no effect without host ({file}:4)" in config.warnings


def test_a_variable_overrides_redis_options_of_the_file(tmp_path: Path) -> None:
    """File and variables are merged before they are interpreted; the file enables Redis."""
    path = tmp_path / "relay.conf"
    path.write_text("[Redis]\nhost = file\nport = 1\n")
    config = load(str(path), True, False, {"REDIS_HOST": "variable"})
    assert config.redis
    assert config.redis.url == "redis://variable:1"


def test_an_empty_variable_unsets_an_option_of_the_file(tmp_path: Path) -> None:
    """Texts become empty, other types get their default; booleans and lists are unchanged."""
    path = tmp_path / "relay.conf"
    path.write_text(
        "[Main]\ninitTimeout = 1s\ntlsCert = c\nexitAlways = on\nlogLevel = warn\n"
        '[Environment "a"]\nsdkKey = k\nallowedOrigin = http://x\nprefix = p\n'
    )
    names = ("INIT_TIMEOUT", "TLS_CERT", "EXIT_ALWAYS", "LOG_LEVEL", "LD_ALLOWED_ORIGIN_a")
    variables = {**dict.fromkeys(names, ""), "LD_ENV_a": "k2", "LD_PREFIX_a": ""}
    config = load(str(path), True, False, variables)
    main, (a,) = config.main, config.environments
    assert (main.init_timeout, main.tls_cert, main.exit_always) == (10.0, "", True)
    assert main.log_level == "info"
    assert (a.sdk_key.reveal(), a.allowed_origin, a.prefix) == ("k2", ("http://x",), "")
    assert config.sources['Environment "a".allowed_origin'] == f"{path}:8"
    assert "Main.init_timeout" not in config.sources


def test_repeated_options_of_a_file(tmp_path: Path) -> None:
    """The last value wins, lists are combined, section names are not case-sensitive."""
    path = tmp_path / "relay.conf"
    path.write_text(
        "[MAIN]\nPORT = 1\n[Proxy]\ncaCertFiles = a,b\n[main]\nport = 2 ; not 3\n"
        "[proxy]\nCACERTFILES = c\nurl = http://p\nurl =\n"
    )
    config = load(str(path), False, False, {})
    assert (config.main.port, config.proxy.ca_cert_files) == (2, ("a", "b", "c"))
    assert config.proxy.url == ""


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (None, ("https://sdk.launchdarkly.com", "https://clientsdk.launchdarkly.com")),
        ("https://app.launchdarkly.com/", ("https://sdk.launchdarkly.com", "https://clientsdk.launchdarkly.com")),
        ("https://sdk.launchdarkly.com/", ("https://sdk.launchdarkly.com", "https://clientsdk.launchdarkly.com")),
        ("http://relay:1", ("http://relay:1", "http://relay:1")),
    ],
)  # fmt: skip
def test_the_base_urls(base: str | None, expected: tuple[str, str]) -> None:
    """ld-relay's old default becomes the new one; another base URL also applies to browsers."""
    main = from_env({"BASE_URI": base} if base else {}).main
    assert (main.base_uri, main.client_side_base_uri) == expected


def test_without_any_flag_the_environment_is_read_if_there_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container needs only `-e LD_ENV_x=…`; a default file replaces the variables."""
    path = tmp_path / "ld-relay.conf"
    monkeypatch.setattr("relay.config.load.DEFAULT_FILE", str(path))
    assert load("", False, False, {"PORT": "1"}).main.port == 1
    path.write_text("[Main]\nport = 2\n")
    assert load("", False, False, {"PORT": "1"}).main.port == 2


BOTH = [
    option
    for section in ("Main", "Events", "Redis", "Proxy", "Http", "Webhook", "Prometheus")
    for option in options(section)
    if option.support is not Support.REFUSED
]
PER_ENVIRONMENT = [option for option in options("Environment") if option.variable]
lines = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
names = lines.filter(lambda name: name and not set(name) & set("()"))
"""Names without the parentheses that enclose the sources of an error."""
urls = st.sampled_from(["http://h", "https://u:p%40@h:1/x?y=1", "HTTP://[::1]:8030"])
words = st.sampled_from(["streaming", "JSON", "text", "polling", "debug", "None", "1.2", "1.3"])
numbers = st.integers(1, 70000).map(str)
texts = {
    "boolean": st.sampled_from(["true", "YES", "1", "False", "no", "0"]),
    "integer above 0": numbers,
    "integer": numbers,
    "duration": st.sampled_from(["0", "1s", "1.5h", "1m30s", "-2ms", "99ms", "+5us", "1h1ns"]),
    "size": st.sampled_from(["1B", "1.5MiB", "0B", "64kb", "1MiB1B"]),
    "URL": urls,
    "key": st.from_regex("[!-~]{1,12}", fullmatch=True),
    "ID": st.from_regex("[!-~]{1,12}", fullmatch=True),
}
origins = st.sampled_from(
    ["https://a.example", "HTTP://B:80/", "null, *", "ionic://x", "https://*.x"]
)


def text_of(option: Option) -> st.SearchStrategy[str]:
    """Texts for an option: of its type, though maybe against a rule; or empty."""
    if option.attribute == "url" and option.section == "Redis":
        right = st.sampled_from(["redis://u:p@h:1/2", "rediss://h", "http://h", "redis://a,b:1"])
    elif option.type.name in texts:
        right = texts[option.type.name]
    elif option.type is ORIGINS:
        right = origins
    elif option.type is ADDRESSES:
        right = st.sampled_from(["a", "a:1, [::1]:2,"])
    elif option.type is HEADER_NAMES:
        right = st.sampled_from(["X-A", "X-A , X-B,", "X A", ","])
    elif option.type.is_text or option.type.is_list:
        right = lines
    else:
        right = words.filter(lambda word: f"`{word.lower()}`" in option.type.name)
    return right if option.type is BOOLEAN else right | st.just("")


@st.composite
def settings_of_both(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """The text of a file, and equivalent variables."""
    file, variables = "", {}
    for option in draw(st.lists(st.sampled_from(BOTH), unique=True, max_size=9)):
        text = draw(text_of(option))
        file += f"[{option.section}]\n{option.name} = {quoted(text)}\n"
        variables[option.variable] = text
    for name in draw(st.lists(names, unique=True, max_size=3)):
        escaped = name.replace("\\", "\\\\").replace('"', '\\"')
        file += f'[Environment "{escaped}"]\n'
        chosen = draw(st.lists(st.sampled_from(PER_ENVIRONMENT), unique=True, max_size=4))
        for option in {options("Environment")[0], *chosen}:
            text = draw(text_of(option))
            file += f"{option.name} = {quoted(text)}\n"
            variables[option.variable + name] = text
    addresses = ("REDIS_URL", "REDIS_HOST", "REDIS_PORT", "REDIS_SENTINELS")
    if any(map(variables.get, addresses)):
        variables["USE_REDIS"] = "1"
    else:
        variables = {n: t for n, t in variables.items() if not n.startswith("REDIS_")}
    return file, variables


def load_result(names: Mapping[str, str], *arguments: Any) -> Config | list[str]:
    """Return the resulting configuration or errors, without its sources and files."""
    try:
        config = load(*arguments)
    except ConfigError as e:
        errors = [re.sub(r" \([^()]*\)$", "", problem) for problem in e.problems]
        errors = [re.sub(r"^\S+:[0-9]+: [A-Za-z]+: ", "", problem) for problem in errors]
        for name in names:
            errors = [problem.removeprefix(f"{name}: ") for problem in errors]
        return sorted(errors)
    return replace(config, sources={}, warnings=(), files=())


@settings(deadline=None)
@given(settings_of_both())
def test_a_file_and_the_equivalent_variables_give_the_same(
    both: tuple[str, dict[str, str]],
) -> None:
    """The same configuration, or the same errors."""
    file, variables = both
    with tempfile.NamedTemporaryFile("w") as path:
        path.write(file)
        path.flush()
        from_file = load_result({}, path.name, False, False, {})
    from_variables = load_result(variables, "", True, False, variables)
    assert from_file == from_variables


@pytest.mark.parametrize(
    ("variables", "keys"),
    [
        ({"LD_ENV_x": "sdk-1", "LD_ENV_KEY_x": "production"}, {"x": "production"}),
        ({"LD_ENV_KEY_x": "sdk-1"}, {"KEY_x": ""}),
        ({"LD_ENV_KEY_x": "sdk-1", "LD_ENV_KEY_KEY_x": "test"}, {"KEY_x": "test"}),
        ({"LD_ENV_x": "sdk-1", "LD_ENV_KEY_": "sdk-2", "LD_ENV_": "sdk-3"}, {"x": "", "": "sdk-2"}),
    ],
)
def test_env_key_and_sdk_key_variables_are_distinguished(variables, keys):
    """`LD_ENV_KEY_x` is the key of environment "x" if there is one; otherwise it defines "KEY_x"."""
    config = load("", from_env=True, allow_missing_file=False, environ=variables)
    assert {each.name: each.env_key for each in config.environments} == keys


def test_an_env_key_without_an_environment_causes_a_warning():
    """Its SDK key may have been forgotten."""
    environ = {"LD_ENV_KEY_x": "production"}
    config = load("", from_env=True, allow_missing_file=False, environ=environ)
    text = 'LD_ENV_KEY_x makes an environment "KEY_x"; it is the option envKey only beside LD_ENV_x'
    assert text in config.warnings


def test_there_may_be_several_webhook_secrets():
    """They are separated by commas; commas alone are an error."""
    environ = {"WEBHOOK_SECRET": "one, two,"}
    config = load("", from_env=True, allow_missing_file=False, environ=environ)
    assert [secret.reveal() for secret in config.webhook.secrets] == ["one", "two"]
    with pytest.raises(ConfigError, match="consists of commas only"):
        load("", from_env=True, allow_missing_file=False, environ={"WEBHOOK_SECRET": ", ,"})


def service(name: str, address: str = "10.0.0.1", port: str = "80") -> dict[str, str]:
    """Return the variables that Kubernetes sets for a service."""
    url, by_port = f"tcp://{address}:{port}", f"{name}_PORT_{port}_TCP"
    return {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": port,
        f"{name}_SERVICE_PORT_HTTP": port,
        f"{name}_PORT": url,
        by_port: url,
        f"{by_port}_PROTO": "tcp",
        f"{by_port}_PORT": port,
        f"{by_port}_ADDR": address,
    }


def test_variables_of_services_are_ignored() -> None:
    """Kubernetes sets them in every container, for each service of the namespace."""
    variables = {"LD_ENV_main": "sdk-1"}
    for name in (
        "PROMETHEUS",
        "REDIS",
        "LD_ENV_SHOP",
        "LD_FILTER_KEYS_SHOP",
        "LD_PREFIX",
        "EVENTS",
    ):
        variables |= service(name, "fd00::1" if name == "EVENTS" else "10.0.0.1")
    config = from_env({**variables, "USE_PROMETHEUS": "true"})
    assert [each.name for each in config.environments] == ["main"]
    assert (config.prometheus.port, config.redis, config.warnings) == (8031, None, ())


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({"REDIS_URL": "redis://mine:1"}, "redis://mine:1"),
        ({"REDIS_HOST": "mine"}, "redis://mine:6379"),
        ({"REDIS_HOST": "redis"}, "redis://10.0.0.1:6400"),
        ({"REDIS_HOST": "redis.shop.svc"}, "redis://10.0.0.1:6400"),
        ({}, "redis://10.0.0.1:6400"),
    ],
)
def test_a_service_named_redis_is_used_unless_it_contradicts_the_operator(
    variables: dict[str, str], url: str
) -> None:
    """As in ld-relay if nothing else is set; it never overrides the operator."""
    operator = {"LD_ENV_main": "sdk-1", "USE_REDIS": "1", **variables}
    redis = from_env({**operator, **service("REDIS", port="6400")}).redis
    assert redis
    assert redis.url == url


def test_a_service_named_redis_does_not_override_the_file(tmp_path: Path) -> None:
    """The file names the Redis server."""
    path = tmp_path / "relay.conf"
    path.write_text("[Redis]\nurl = redis://mine:1\n")
    redis = load(str(path), True, False, service("REDIS")).redis
    assert redis
    assert redis.url == "redis://mine:1"


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"LD_ENV_caf\udce9": "k"}, r"LD_ENV_caf\xe9: the variable's name is not UTF-8"),
        ({"LD_ENV_a": "k\udcff"}, "LD_ENV_a: not UTF-8"),
        ({"LD_ENV_a": "k", "LD_PREFIX_a": "\udcff"}, "LD_PREFIX_a: not UTF-8"),
        ({"LD_ENV_a": "k", "LD_ALLOWED_ORIGIN_a": "http://a,\udcff"}, "LD_ALLOWED_ORIGIN_a: not UTF-8"),
        ({"TLS_CERT": "/\udcff"}, "TLS_CERT: not UTF-8"),
        ({"PORT": "\udcff"}, "PORT: not UTF-8"),
        ({"USE_REDIS": "\udcff"}, "USE_REDIS: not UTF-8"),
        ({"LD_ENV_a\nb": "k"}, 'the name of environment "a\\nb" has control characters (LD_ENV_a\nb)'),
        ({"LD_ENV_a": " \n"}, 'SDK key is required for environment "a" (LD_ENV_a)'),
        ({"LD_ENV_a": "sdk 1"}, "LD_ENV_a: a key has ASCII characters only, no blanks and no quotation marks, but character 4 is a blank"),
        ({"LD_ENV_a": "k", "LD_CLIENT_SIDE_ID_a": "i\nd"}, "LD_CLIENT_SIDE_ID_a: a client-side ID has ASCII characters only, no blanks, and none of \"'/\\?#%, but character 2 is a line end"),
        ({"LD_ENV_a": "k", "LD_PREFIX_a": "a\r\nb"}, "LD_PREFIX_a: must not contain control characters, but character 2 is a carriage return"),
        ({"USE_REDIS": "1", "REDIS_HOST": "a b"}, "invalid Redis hostname (REDIS_HOST)"),
    ],
)  # fmt: skip
def test_malformed_values_are_rejected_by_name(variables: dict[str, str], problem: str) -> None:
    """At startup, once per option."""
    assert problems(variables) == (problem,)


def test_whitespace_around_values_is_stripped(tmp_path: Path) -> None:
    """In variables and in files; a blank value counts as empty."""
    path = tmp_path / "relay.conf"
    path.write_text(
        '[Environment "a"]\nmobileKey =\u00a0mob-0\nmobileKey = " mob-1\\n"\nprefix = p\n'
        "[Main]\nexitAlways = \ufeffyes \n"
    )
    variables = {
        "LD_ENV_a": "sdk-1\r\n",
        "LD_PREFIX_a": " ",
        "USE_REDIS": "true\n",
        "REDIS_URL": "redis://h\r\n",
        "PORT": "\n",
    }
    config = load(str(path), True, False, variables)
    (a,) = config.environments
    assert (a.sdk_key.reveal(), a.mobile_key.reveal(), a.prefix) == ("sdk-1", "mob-1", "")
    assert (config.main.exit_always, config.main.port) == (True, 8030)
    assert config.redis
    assert config.redis.url == "redis://h"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'[Environment "a"]\nsdkKey = "sdk-1" // comment\n', ":2: sdkKey: a key has ASCII characters only, no blanks and no quotation marks, but character 6 is a blank"),
        (b'[Environment "a"]\nsdkKey = k\nprefix = \xe9t\xe9\n', ":3: not UTF-8"),
        (b'[Environment "a\x01"]\nsdkKey = k\n', 'the name of environment "a\\x01" has control characters (PATH:1)'),
        ('[Environment "a"]\nsdkKey = “sdk-1”\n'.encode(), ":2: sdkKey: a key has ASCII characters only, no blanks and no quotation marks, but character 1 is U+201C"),
    ],
)  # fmt: skip
def test_malformed_values_in_a_file_name_their_line(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    """LaunchDarkly's own example contains a comment that is not one."""
    path = tmp_path / "relay.conf"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(str(path), False, False, {})
    (message,) = caught.value.problems
    assert message.endswith(problem.replace("PATH", str(path)))


def test_automatic_configuration_takes_the_place_of_environments() -> None:
    """Its options are those of all environments; the key is a secret."""
    config = from_env(
        {
            "AUTO_CONFIG_KEY": "rel-5ca1ab1e",
            "ENV_DATASTORE_PREFIX": "ld-$CID",
            "ENV_ALLOWED_ORIGIN": "https://a.example,https://b.example",
            "ENV_ALLOWED_HEADER": "X-Extra",
            "USE_REDIS": "1",
        }
    )
    auto = config.auto_config
    assert config.uses_launchdarkly
    assert not config.environments
    assert auto.key.reveal() == "rel-5ca1ab1e"
    assert auto.env_datastore_prefix == "ld-$CID"
    assert auto.env_allowed_origin == ("https://a.example", "https://b.example")
    assert auto.env_allowed_header == ("X-Extra",)
    assert "rel-5ca1ab1e" in secrets(config)
    shown = effective(config)
    assert "[AutoConfig]" in shown
    assert "rel-5ca1ab1e" not in shown
    assert from_env({"LD_ENV_a": "sdk-a"}).uses_launchdarkly
    assert not from_env({"FLAGS_FILE": "f"}).uses_launchdarkly


@pytest.mark.parametrize(
    "database",
    [
        {"USE_REDIS": "1"},
        {"USE_DYNAMODB": "1", "DYNAMODB_TABLE": "t"},
        {"USE_REDIS": "1", "USE_DYNAMODB": "1", "ENV_DATASTORE_TABLE_NAME": "t-$CID"},
    ],
)
def test_the_list_of_environments_may_be_stored(database: dict[str, str]) -> None:
    """In the database of the flags, encrypted with a secret of its own."""
    variables = {"AUTO_CONFIG_KEY": "k", "ENV_DATASTORE_PREFIX": "$CID"} | database
    cache = {"AUTO_CONFIG_CACHE_KEY": " cache ", "AUTO_CONFIG_CACHE_ENCRYPTION_KEY": "a-long-text"}
    config = from_env(variables | cache)
    assert config.auto_config.cache_key == "cache"
    assert config.auto_config.cache_encryption_key.reveal() == "a-long-text"
    assert "a-long-text" in secrets(config)
    assert "a-long-text" not in effective(config)
    assert not config.warnings


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        (
            {"AUTO_CONFIG_KEY": "k", "AUTO_CONFIG_CACHE_KEY": "c"},
            "AUTO_CONFIG_CACHE_KEY requires Redis or DynamoDB to be enabled",
        ),
        (
            {
                "AUTO_CONFIG_KEY": "k",
                "AUTO_CONFIG_CACHE_KEY": "c",
                "USE_CONSUL": "1",
                "ENV_DATASTORE_PREFIX": "p-$CID",
            },
            "AUTO_CONFIG_CACHE_KEY requires Redis or DynamoDB to be enabled",
        ),
        (
            {
                "AUTO_CONFIG_KEY": "k",
                "AUTO_CONFIG_CACHE_KEY": "c",
                "USE_DYNAMODB": "1",
                "ENV_DATASTORE_TABLE_NAME": "t-$CID",
            },
            (
                "AUTO_CONFIG_CACHE_KEY: the list of environments needs a table in DynamoDB;"
                " [DynamoDB] tableName names it"
            ),
        ),
        (
            {"LD_ENV_a": "sdk-a", "USE_REDIS": "1", "AUTO_CONFIG_CACHE_KEY": "c"},
            "must specify auto-configuration key if other auto-configuration properties are set",
        ),
    ],
)
def test_a_cache_key_needs_a_database_and_a_list(variables: dict[str, str], problem: str) -> None:
    """In ld-relay's words."""
    assert list(problems(variables)) == [f"{problem} (AUTO_CONFIG_CACHE_KEY)"]


@pytest.mark.parametrize(
    ("variables", "warning"),
    [
        ({}, "so that a start needs LaunchDarkly; [Main] snapshotDir or [AutoConfig] cacheKey"),
        ({"SNAPSHOT_DIR": "/data"}, None),
        ({"EXIT_ALWAYS": "1"}, None),
        (
            {"SNAPSHOT_DIR": "/data", "AUTO_CONFIG_CACHE_ENCRYPTION_KEY": "a-long-text"},
            "[AutoConfig] cacheEncryptionKey has no effect without cacheKey",
        ),
    ],
)
def test_an_operator_learns_whether_the_list_is_stored(
    variables: dict[str, str], warning: str | None
) -> None:
    """A start without LaunchDarkly depends on it."""
    warnings = from_env({"AUTO_CONFIG_KEY": "k", **variables}).warnings
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]


def test_one_document_needs_no_key() -> None:
    """Presigned URLs cannot have one; the only environment needs no client-side ID then."""
    variables = {"LD_ENV_a": "k", "BOOTSTRAP_FROM": "https://h/x?X-Amz-Signature=abc"}
    assert from_env(variables).main.bootstrap_from == variables["BOOTSTRAP_FROM"]


def test_variants_have_documents_of_their_own() -> None:
    """They share the client-side ID of their environment."""
    variables = {
        "LD_ENV_a": "k",
        "LD_CLIENT_SIDE_ID_a": "i",
        "LD_PROJ_KEY_a": "p",
        "LD_FILTER_KEYS_p": "f,g",
        "PUBLISH_TO": "s3://flags, FILE:///srv/flags,https://h/{key}",
    }
    to = from_env(variables).publish.to
    assert to == ("s3://flags", "FILE:///srv/flags", "https://h/{key}")
