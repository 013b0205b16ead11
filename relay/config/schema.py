"""Every option, declared once: name, variable, type, default and help (config 3.5, newer 10.2).

The loader, `relay check`, `config/relay.conf` and `docs/configuration.md` derive from these
declarations; a test keeps them in sync. Times are seconds, sizes are bytes. An option's name in the
file is its attribute's name in camel case.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeVar, cast

from msgspec import Struct, defstruct, field
from msgspec.structs import replace

from relay.config.types import (
    BOOLEAN,
    COUNT,
    DURATION,
    ENVIRONMENT_ID,
    HEADER_NAMES,
    HTTP_URI,
    INTEGER,
    KEY,
    LIST,
    LOG_LEVEL,
    ORIGINS,
    PATH,
    PATHS,
    SECRET,
    SIZE,
    STRING,
    TLS_VERSION,
    URI,
    OptionType,
    one_of,
    stripped,
)
from relay.model.credential import Secret

S = TypeVar("S", bound=Struct)


class Support(Enum):
    """Level of support for an option in this release."""

    FULL = "full"
    LATER = "later"
    """Accepted, but the feature answers 503 or has no effect yet; a warning at startup says so."""
    REFUSED = "refused"
    """Setting it keeps the relay from starting, because ignoring it would be wrong."""
    NO_EFFECT = "no effect"
    """Accepted for compatibility, but meaningless here; its help says why."""


class Option(Struct, frozen=True):
    """Declaration of an option.

    Args:
        section: section of the file.
        attribute: attribute of the section's class.
        name: name in the file.
        variable: environment variable, ending in `_` if the name of an environment follows; empty
            if there is none.
        type: parses and formats the value.
        default: value if the option is not set.
        help: one or two sentences for operators.
        example: sample value, as an operator would write it; shown if there is no default.
        support: level of support in this release.
    """

    section: str
    attribute: str
    name: str
    variable: str
    type: OptionType
    default: Any
    help: str
    example: str
    support: Support


def _option(
    variable: str,
    option_type: OptionType,
    default: Any,
    help_text: str,
    example: str = "",
    *,
    name: str = "",
    support: Support = Support.FULL,
) -> Any:
    """Declare an option as an attribute of its section."""
    return Option("", "", name, variable, option_type, default, help_text, example, support)


def _section(cls: type[S]) -> type[S]:
    """Make a section of a Struct whose defaults are declarations: a subclass with plain defaults.

    A dataclass could hold the declarations itself, but each adds a millisecond to every start.
    """
    declared = dict(zip(cls.__struct_fields__, cls.__struct_defaults__, strict=True))
    options = {name: each for name, each in declared.items() if isinstance(each, Option)}
    made: Any = defstruct(
        cls.__name__,
        [(name, Any, option.default) for name, option in options.items()],
        bases=(cls,),
        namespace={"__doc__": cls.__doc__, "options": options},
        module=cls.__module__,
        frozen=True,
    )
    return cast("type[S]", made)


LATER, REFUSED, NO_EFFECT = Support.LATER, Support.REFUSED, Support.NO_EFFECT


@_section
class Main(Struct, frozen=True):
    """`[Main]`: the server process and its data source."""

    port: int = _option("PORT", INTEGER, 8030, "Port to listen on, on all interfaces.")
    stream_uri: str = _option(
        "STREAM_URI",
        HTTP_URI,
        "https://stream.launchdarkly.com",
        "Base URL of LaunchDarkly's streaming service, or of another relay.",
    )
    base_uri: str = _option(
        "BASE_URI",
        HTTP_URI,
        "https://sdk.launchdarkly.com",
        "Base URL of LaunchDarkly's polling service; used with `dataSource = polling`.",
    )
    client_side_base_uri: str = _option(
        "CLIENT_SIDE_BASE_URI",
        HTTP_URI,
        "",
        "Base URL for the goals (experimentation metrics) that browser SDKs request. Default:"
        " LaunchDarkly's, or `baseUri` if that was changed.",
        "https://clientsdk.launchdarkly.com",
    )
    data_source: str = _option(
        "DATA_SOURCE",
        one_of("streaming", "polling"),
        "streaming",
        "How flags are fetched from LaunchDarkly: over one long-lived stream, or with a request"
        " every `pollInterval`.",
    )
    poll_interval: float = _option(
        "POLL_INTERVAL", DURATION, 30.0, "Interval between polls with `dataSource = polling`."
    )
    flags_file: str = _option(
        "FLAGS_FILE",
        PATH,
        "",
        "Flags file to serve, in the SDKs' file-data format, if no environment is configured.",
        "/etc/relay/flags.yaml",
    )
    init_timeout: float = _option(
        "INIT_TIMEOUT",
        DURATION,
        10.0,
        "How long the relay counts as starting while it waits for LaunchDarkly's first answer.",
    )
    heartbeat_interval: float = _option(
        "HEARTBEAT_INTERVAL",
        DURATION,
        180.0,
        "Interval between heartbeats on idle streams; 0 = none. SDKs reconnect after 5 minutes of"
        " silence.",
    )
    max_client_connection_time: float = _option(
        "MAX_CLIENT_CONNECTION_TIME",
        DURATION,
        0.0,
        "Maximum lifetime of a stream, shortened by up to 10 % at random; 0 = unlimited. Lets load"
        " balancers redistribute clients.",
    )
    client_stall_timeout: float = _option(
        "CLIENT_STALL_TIMEOUT",
        DURATION,
        60.0,
        "A stream is closed if its client has read none of its pending data for this long.",
    )
    disconnected_status_time: float = _option(
        "DISCONNECTED_STATUS_TIME",
        DURATION,
        60.0,
        "How long the upstream connection may be interrupted before `/status` reports"
        " `disconnected`.",
    )
    snapshot_dir: str = _option(
        "SNAPSHOT_DIR",
        PATH,
        "",
        "Directory for snapshots of each environment's flags, so that the relay can start while"
        " LaunchDarkly and the database are unavailable. Not set: no snapshots.",
        "/data",
    )
    graceful_shutdown_timeout: float = _option(
        "GRACEFUL_SHUTDOWN_TIMEOUT",
        DURATION,
        8.0,
        "Time limit for the shutdown after SIGTERM, during which streams are closed gradually. The"
        " default fits the 10 seconds that `docker stop` allows.",
    )
    max_request_head_size: int = _option(
        "MAX_REQUEST_HEAD_SIZE",
        SIZE,
        64 * 1024,
        "Maximum size of the request line and headers; raise it for long contexts in URL paths.",
    )
    max_client_request_body_size: int = _option(
        "MAX_CLIENT_REQUEST_BODY_SIZE",
        SIZE,
        5 * 1024 * 1024,
        "Maximum size of the body of an evaluation request.",
    )
    tls_enabled: bool = _option("TLS_ENABLED", BOOLEAN, False, "Serve HTTPS instead of HTTP.")
    tls_cert: str = _option(
        "TLS_CERT",
        PATH,
        "",
        "PEM file with the certificate and its chain.",
        "/etc/relay/tls/cert.pem",
    )
    tls_key: str = _option(
        "TLS_KEY",
        PATH,
        "",
        "PEM file with the certificate's private key.",
        "/etc/relay/tls/key.pem",
    )
    tls_min_version: str = _option("TLS_MIN_VERSION", TLS_VERSION, "1.2", "Minimum TLS version.")
    log_level: str = _option(
        "LOG_LEVEL",
        LOG_LEVEL,
        "info",
        "Log level. `debug` also logs every request; `none` logs nothing.",
    )
    log_format: str = _option(
        "LOG_FORMAT",
        one_of("text", "json"),
        "text",
        "Log format: plain text, or one JSON object per line.",
    )
    exit_always: bool = _option(
        "EXIT_ALWAYS",
        BOOLEAN,
        False,
        "Fill the database once and exit; the exit code is 0 if all environments succeeded.",
    )
    exit_on_error: bool = _option(
        "EXIT_ON_ERROR",
        BOOLEAN,
        False,
        "With `exitAlways`: exit at the first environment that fails.",
    )
    ignore_connection_errors: bool = _option(
        "IGNORE_CONNECTION_ERRORS",
        BOOLEAN,
        False,
        "Log a failure to reach LaunchDarkly at startup as a warning instead of an error.",
    )
    workers: int = _option(
        "WORKERS",
        INTEGER,
        1,
        "Number of worker processes. Must be 1 in this release.",
        support=LATER,
    )
    eval_streams: bool = _option(
        "EVAL_STREAMS",
        BOOLEAN,
        True,
        "Send evaluated flags on client-side streams; `false` sends pings, like ld-relay.",
    )
    ping_stream_jitter_time: float = _option(
        "PING_STREAM_JITTER_TIME",
        DURATION,
        0.0,
        "Maximum random delay of pings on client-side streams.",
    )
    big_segments_stale_as_degraded: bool = _option(
        "BIG_SEGMENTS_STALE_AS_DEGRADED",
        BOOLEAN,
        False,
        "Report `degraded` in `/status` while big segments are out of date.",
        support=LATER,
    )
    big_segments_stale_threshold: float = _option(
        "BIG_SEGMENTS_STALE_THRESHOLD",
        DURATION,
        300.0,
        "Age at which big segments count as out of date.",
        support=LATER,
    )
    expired_credential_cleanup_interval: float = _option(
        "EXPIRED_CREDENTIAL_CLEANUP_INTERVAL",
        DURATION,
        60.0,
        "Interval between checks for expired credentials of automatic configuration.",
        support=LATER,
    )


@_section
class Events(Struct, frozen=True):
    """`[Events]`: analytics events."""

    send_events: bool = _option(
        "USE_EVENTS",
        BOOLEAN,
        False,
        "Accept analytics events from SDKs and forward them to LaunchDarkly.",
    )
    events_uri: str = _option(
        "EVENTS_HOST",
        HTTP_URI,
        "https://events.launchdarkly.com",
        "Base URL of LaunchDarkly's events service.",
    )
    flush_interval: float = _option(
        "EVENTS_FLUSH_INTERVAL",
        DURATION,
        5.0,
        "How long events are collected before they are delivered in one batch.",
    )
    capacity: int = _option(
        "EVENTS_CAPACITY",
        INTEGER,
        1000,
        "Memory for undelivered event payloads when there is no disk spool, in units of 8 KiB. When"
        " it is full, the oldest payloads are dropped and counted.",
    )
    metrics_capacity: int = _option(
        "EVENTS_METRICS_CAPACITY",
        INTEGER,
        10000,
        "Usage metrics are sent once per environment and minute.",
        support=NO_EFFECT,
    )
    inline_users: bool = _option(
        "EVENTS_INLINE_USERS",
        BOOLEAN,
        False,
        "No current SDK needs inlined users.",
        support=NO_EFFECT,
    )
    max_inbound_payload_size: int = _option(
        "EVENTS_MAX_INBOUND_PAYLOAD_SIZE",
        SIZE,
        0,
        "Maximum size of an event payload after decompression. Not set: 32 MiB.",
        "10MiB",
    )
    spool_dir: str = _option(
        "EVENTS_SPOOL_DIR",
        PATH,
        "",
        "Directory where accepted events are kept until delivery, so that they survive a restart."
        " Not set: they are kept in memory.",
        "/data/events",
    )


@_section
class Webhook(Struct, frozen=True):
    """`[Webhook]`: LaunchDarkly webhooks that announce changes, at `/webhooks/launchdarkly`."""

    secret: Secret = _option(
        "WEBHOOK_SECRET",
        SECRET,
        Secret(""),
        "Signing secret of the webhook, or several, separated by commas. Not set: the route does"
        " not exist.",
        "a-long-random-text",
    )

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """The individual secrets; a valid signature may use any of them."""
        parts = map(stripped, self.secret.reveal().split(","))
        return tuple(Secret(part) for part in parts if part)


@_section
class Redis(Struct, frozen=True):
    """`[Redis]`: Redis or Valkey server that the relay keeps up to date for SDKs in daemon mode.

    In a file, `url`, `host` or `port` enables it; with variables, `USE_REDIS=true` does.
    """

    url: str = _option(
        "REDIS_URL",
        URI,
        "",
        "URL of the form `redis://[user[:password]@]host[:port][/database]`. The variable requires"
        " `USE_REDIS=true`.",
        "redis://localhost:6379",
    )
    host: str = _option(
        "REDIS_HOST", STRING, "", "Host, instead of `url`; default `localhost`.", "localhost"
    )
    port: int = _option("REDIS_PORT", INTEGER, 0, "Port, instead of `url`; default 6379.", "6379")
    tls: bool = _option("REDIS_TLS", BOOLEAN, False, "Use TLS, like `rediss://`.")
    username: str = _option("REDIS_USERNAME", STRING, "", "Name of the Redis ACL user.", "relay")
    password: Secret = _option(
        "REDIS_PASSWORD",
        SECRET,
        Secret(""),
        "Password of the user or the server.",
        "a-long-random-text",
    )
    local_ttl: float = _option(
        "CACHE_TTL",
        DURATION,
        30.0,
        "The relay serves from memory and never from the database, so nothing is cached for a"
        " time.",
        support=NO_EFFECT,
    )
    client_certificate_file: str = _option(
        "REDIS_CLIENT_CERT_FILE",
        PATH,
        "",
        "PEM file with the client certificate; requires `clientKeyFile`.",
        "/etc/relay/tls/redis-client.pem",
    )
    client_key_file: str = _option(
        "REDIS_CLIENT_KEY_FILE",
        PATH,
        "",
        "PEM file with the private key of the client certificate.",
        "/etc/relay/tls/redis-client-key.pem",
    )
    ca_file: str = _option(
        "REDIS_CA_FILE",
        PATH,
        "",
        "PEM file with the CA certificates to trust instead of the system's.",
        "/etc/relay/tls/redis-ca.pem",
    )
    atomic_upsert: bool = _option(
        "REDIS_ATOMIC_UPSERT",
        BOOLEAN,
        False,
        "Updates are always atomic.",
        support=NO_EFFECT,
    )
    connect_timeout: float = _option(
        "REDIS_CONNECT_TIMEOUT", DURATION, 5.0, "Timeout for connecting to the server."
    )
    read_timeout: float = _option(
        "REDIS_READ_TIMEOUT", DURATION, 10.0, "Timeout for a reply from the server."
    )


@_section
class Proxy(Struct, frozen=True):
    """`[Proxy]`: HTTP proxy and CA certificates for requests to LaunchDarkly."""

    url: str = _option(
        "PROXY_URL",
        HTTP_URI,
        "",
        "URL of the HTTP proxy for all requests to LaunchDarkly; may contain `user:password@`. Not"
        " set: the variables HTTP_PROXY, HTTPS_PROXY and NO_PROXY apply.",
        "http://proxy.example.com:3128",
    )
    ca_cert_files: tuple[str, ...] = _option(
        "PROXY_CA_CERTS",
        PATHS,
        (),
        "PEM files with CA certificates to trust in addition to the system's.",
        "/etc/relay/tls/company-ca.pem",
    )
    ntlm_auth: bool = _option(
        "PROXY_AUTH_NTLM", BOOLEAN, False, "Authenticate to the proxy with NTLM.", support=REFUSED
    )
    user: str = _option(
        "PROXY_AUTH_USER", STRING, "", "Used for NTLM only.", "relay", support=NO_EFFECT
    )
    password: Secret = _option(
        "PROXY_AUTH_PASSWORD",
        SECRET,
        Secret(""),
        "Used for NTLM only.",
        "a-long-random-text",
        support=NO_EFFECT,
    )
    domain: str = _option(
        "PROXY_AUTH_DOMAIN", STRING, "", "Used for NTLM only.", "EXAMPLE", support=NO_EFFECT
    )


@_section
class Http(Struct, frozen=True):
    """`[Http]`: response compression and connections to LaunchDarkly."""

    enable_compression: bool = _option(
        "HTTP_ENABLE_COMPRESSION",
        BOOLEAN,
        False,
        "Poll responses are always compressed if the client accepts that, streams never.",
        support=NO_EFFECT,
    )
    idle_conn_timeout: float = _option(
        "HTTP_IDLE_CONN_TIMEOUT", DURATION, 90.0, "How long an idle connection is kept open."
    )
    max_idle_conns: int = _option(
        "HTTP_MAX_IDLE_CONNS",
        INTEGER,
        100,
        "An environment needs only one connection.",
        support=NO_EFFECT,
    )
    max_idle_conns_per_host: int = _option(
        "HTTP_MAX_IDLE_CONNS_PER_HOST",
        INTEGER,
        2,
        "An environment needs only one connection.",
        support=NO_EFFECT,
    )
    disable_keep_alives: bool = _option(
        "HTTP_DISABLE_KEEPALIVE", BOOLEAN, False, "Open a new connection for each request."
    )


@_section
class Concurrency(Struct, frozen=True):
    """`[Concurrency]`: limits of ld-relay on concurrent initial payloads."""

    max_concurrent: int = _option(
        "INIT_MAX_CONCURRENT",
        COUNT,
        0,
        "All streams share one copy of the initial payload, so no limit is needed.",
        support=NO_EFFECT,
    )
    max_queued: int = _option(
        "INIT_MAX_QUEUED", COUNT, 0, "See `maxConcurrent`.", support=NO_EFFECT
    )
    send_timeout: float = _option(
        "INIT_SEND_TIMEOUT",
        DURATION,
        120.0,
        "See `clientStallTimeout` of `[Main]`.",
        support=NO_EFFECT,
    )


@_section
class Prometheus(Struct, frozen=True):
    """`[Prometheus]`: metrics for a Prometheus server."""

    enabled: bool = _option(
        "USE_PROMETHEUS",
        BOOLEAN,
        False,
        "Serve metrics on a separate port, including those of ld-relay under their original names.",
    )
    port: int = _option(
        "PROMETHEUS_PORT", INTEGER, 8031, "Port for metrics, on all interfaces, without TLS."
    )
    prefix: str = _option(
        "PROMETHEUS_PREFIX",
        STRING,
        "launchdarkly_relay",
        "Name prefix of ld-relay's metrics.",
    )


@_section
class AutoConfig(Struct, frozen=True):
    """`[AutoConfig]`: environments configured by LaunchDarkly instead of by this file."""

    key: Secret = _option(
        "AUTO_CONFIG_KEY",
        KEY,
        Secret(""),
        "Automatic configuration key; enables automatic configuration.",
        "rel-00000000-0000-0000-0000-000000000000",
        support=REFUSED,
    )
    env_datastore_prefix: str = _option(
        "ENV_DATASTORE_PREFIX",
        STRING,
        "",
        "Prefix of database keys; `$CID` stands for the client-side ID.",
        "ld-$CID",
        support=LATER,
    )
    env_datastore_table_name: str = _option(
        "ENV_DATASTORE_TABLE_NAME",
        STRING,
        "",
        "DynamoDB table; `$CID` stands for the client-side ID.",
        "ld-$CID",
        support=LATER,
    )
    env_allowed_origin: tuple[str, ...] = _option(
        "ENV_ALLOWED_ORIGIN",
        ORIGINS,
        (),
        "Allowed CORS origins of every environment.",
        "https://shop.example.com",
        support=LATER,
    )
    env_allowed_header: tuple[str, ...] = _option(
        "ENV_ALLOWED_HEADER",
        HEADER_NAMES,
        (),
        "Allowed CORS request headers of every environment.",
        "Timestamp-Valid",
        support=LATER,
    )
    cache_key: str = _option(
        "AUTO_CONFIG_CACHE_KEY",
        STRING,
        "",
        "Database key under which the list of environments is stored.",
        "relay-environments",
        support=REFUSED,
    )
    cache_encryption_key: Secret = _option(
        "AUTO_CONFIG_CACHE_ENCRYPTION_KEY",
        SECRET,
        Secret(""),
        "Key that encrypts the value stored under `cacheKey`. Not set: the automatic configuration"
        " key is used.",
        "a-long-random-text",
        support=REFUSED,
    )


@_section
class OfflineMode(Struct, frozen=True):
    """`[OfflineMode]`: flags and environments from an archive exported by LaunchDarkly."""

    file_data_source: str = _option(
        "FILE_DATA_SOURCE",
        PATH,
        "",
        "Path of the archive; enables offline mode.",
        "/data/archive.tar.gz",
        support=REFUSED,
    )
    file_data_source_monitoring_interval: float = _option(
        "FILE_DATA_SOURCE_MONITORING_INTERVAL",
        DURATION,
        1.0,
        "Interval between checks of the archive for changes.",
        support=LATER,
    )
    env_datastore_prefix: str = _option(
        "ENV_DATASTORE_PREFIX", STRING, "", "As in `[AutoConfig]`.", "ld-$CID", support=LATER
    )
    env_datastore_table_name: str = _option(
        "ENV_DATASTORE_TABLE_NAME", STRING, "", "As in `[AutoConfig]`.", "ld-$CID", support=LATER
    )
    env_allowed_origin: tuple[str, ...] = _option(
        "ENV_ALLOWED_ORIGIN",
        ORIGINS,
        (),
        "As in `[AutoConfig]`.",
        "https://shop.example.com",
        support=LATER,
    )
    env_allowed_header: tuple[str, ...] = _option(
        "ENV_ALLOWED_HEADER",
        HEADER_NAMES,
        (),
        "As in `[AutoConfig]`.",
        "Timestamp-Valid",
        support=LATER,
    )


@_section
class DynamoDB(Struct, frozen=True):
    """`[DynamoDB]`: DynamoDB table that the relay keeps up to date for SDKs in daemon mode."""

    enabled: bool = _option(
        "USE_DYNAMODB", BOOLEAN, False, "Keep a DynamoDB table up to date.", support=REFUSED
    )
    table_name: str = _option(
        "DYNAMODB_TABLE",
        STRING,
        "",
        "Table for environments without one of their own.",
        "flags",
        support=LATER,
    )
    url: str = _option(
        "DYNAMODB_URL",
        HTTP_URI,
        "",
        "URL of the DynamoDB service. Not set: that of AWS.",
        "http://localhost:8000",
        support=LATER,
    )
    local_ttl: float = _option(
        "CACHE_TTL", DURATION, 30.0, "See `[Redis]` `localTtl`.", support=NO_EFFECT
    )


@_section
class Consul(Struct, frozen=True):
    """`[Consul]`: Consul server to keep up to date; its variables require `USE_CONSUL=true`."""

    host: str = _option(
        "CONSUL_HOST",
        STRING,
        "",
        "Host, optionally with a port; enables Consul in a file.",
        "localhost",
        support=REFUSED,
    )
    token: Secret = _option(
        "CONSUL_TOKEN", SECRET, Secret(""), "Access token.", "a-long-random-text", support=LATER
    )
    token_file: str = _option(
        "CONSUL_TOKEN_FILE",
        PATH,
        "",
        "File with the access token.",
        "/etc/relay/consul-token",
        support=LATER,
    )
    local_ttl: float = _option(
        "CACHE_TTL", DURATION, 30.0, "See `[Redis]` `localTtl`.", support=NO_EFFECT
    )


@_section
class Datadog(Struct, frozen=True):
    """`[Datadog]`: metrics and traces for Datadog."""

    enabled: bool = _option(
        "USE_DATADOG", BOOLEAN, False, "Send metrics and traces to Datadog.", support=REFUSED
    )
    prefix: str = _option(
        "DATADOG_PREFIX",
        STRING,
        "launchdarkly_relay",
        "Name prefix of the metrics.",
        support=LATER,
    )
    trace_addr: str = _option(
        "DATADOG_TRACE_ADDR",
        STRING,
        "localhost:8126",
        "Host and port of the agent that receives traces.",
        support=LATER,
    )
    stats_addr: str = _option(
        "DATADOG_STATS_ADDR",
        STRING,
        "localhost:8125",
        "Host and port of the agent that receives metrics, or a `unix://` path.",
        support=LATER,
    )
    tag: tuple[str, ...] = _option(
        "", LIST, (), "Tags added to all metrics, each as `name:value`.", "team:shop", support=LATER
    )


@_section
class Stackdriver(Struct, frozen=True):
    """`[Stackdriver]`: metrics and traces for Google Cloud Monitoring."""

    enabled: bool = _option(
        "USE_STACKDRIVER",
        BOOLEAN,
        False,
        "Send metrics and traces to Google Cloud.",
        support=REFUSED,
    )
    project_id: str = _option(
        "STACKDRIVER_PROJECT_ID",
        STRING,
        "",
        "ID of the Google Cloud project.",
        "my-project",
        name="projectID",
        support=LATER,
    )
    prefix: str = _option(
        "STACKDRIVER_PREFIX",
        STRING,
        "launchdarkly_relay",
        "Name prefix of the metrics.",
        support=LATER,
    )


@_section
class OpenTelemetry(Struct, frozen=True):
    """`[OpenTelemetry]`: metrics, traces and logs over OTLP."""

    enabled: bool = _option(
        "USE_OTLP", BOOLEAN, False, "Export metrics, traces and logs.", support=REFUSED
    )
    protocol: str = _option(
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        one_of("grpc", "http"),
        "",
        "Transport protocol for OTLP.",
        "grpc",
        support=LATER,
    )
    metrics_cardinality_limit: int = _option(
        "OTEL_METRICS_CARDINALITY_LIMIT",
        COUNT,
        2000,
        "Maximum number of series per metric; 0 = unlimited.",
        support=LATER,
    )
    environment_status_metrics: bool = _option(
        "OTEL_ENVIRONMENT_STATUS_METRICS",
        BOOLEAN,
        False,
        "Export metrics on the state of each environment.",
        support=LATER,
    )
    logs_exporter: str = _option(
        "OTEL_LOGS_EXPORTER", STRING, "otlp", "Exporter for logs: `otlp` or `none`.", support=LATER
    )
    traces_exporter: str = _option(
        "OTEL_TRACES_EXPORTER",
        STRING,
        "otlp",
        "Exporter for traces: `otlp` or `none`.",
        support=LATER,
    )
    metrics_exporter: str = _option(
        "OTEL_METRICS_EXPORTER",
        STRING,
        "otlp",
        "Exporter for metrics: `otlp` or `none`.",
        support=LATER,
    )


@_section
class EnvironmentConfig(Struct, frozen=True):
    """`[Environment "NAME"]`: one environment. Its variables end with its name, verbatim."""

    name: str = ""
    """Name of the subsection, or suffix of the variables."""
    sdk_key: Secret = _option(
        "LD_ENV_",
        KEY,
        Secret(""),
        "SDK key; required. With variables, an environment exists if this one is set.",
        "sdk-00000000-0000-0000-0000-000000000000",
    )
    mobile_key: Secret = _option(
        "LD_MOBILE_KEY_",
        KEY,
        Secret(""),
        "Mobile key; admits mobile SDKs.",
        "mob-00000000-0000-0000-0000-000000000000",
    )
    env_id: str = _option(
        "LD_CLIENT_SIDE_ID_",
        ENVIRONMENT_ID,
        "",
        "Client-side ID; admits browser SDKs, and is sent to all SDKs.",
        "000000000000000000000000",
    )
    prefix: str = _option(
        "LD_PREFIX_",
        STRING,
        "",
        "Prefix of its keys in the database; default `launchdarkly`. Required if there are several"
        " environments.",
        "production",
    )
    table_name: str = _option(
        "LD_TABLE_NAME_",
        STRING,
        "",
        "DynamoDB table for this environment.",
        "flags-production",
        support=LATER,
    )
    ttl: float = _option(
        "LD_TTL_", DURATION, 0.0, "How long HTTP caches may keep poll responses; 0 = not at all."
    )
    secure_mode: bool = _option(
        "LD_SECURE_MODE_",
        BOOLEAN,
        False,
        "Require browser SDKs to send the secure-mode hash of their context.",
    )
    eval_streams: bool | None = _option(
        "LD_EVAL_STREAMS_",
        BOOLEAN,
        None,
        "Send evaluated flags (`true`) or pings (`false`) on client-side streams; default `[Main]"
        " evalStreams`.",
        "false",
    )
    allowed_origin: tuple[str, ...] = _option(
        "LD_ALLOWED_ORIGIN_",
        ORIGINS,
        (),
        "Allowed CORS origins, such as `https://shop.example.com`, without wildcards; none or `*`"
        " allows all.",
        "https://shop.example.com,https://www.example.com",
    )
    allowed_header: tuple[str, ...] = _option(
        "LD_ALLOWED_HEADER_",
        HEADER_NAMES,
        (),
        "Allowed CORS request headers in addition to the standard ones.",
        "Timestamp-Valid,Random-Id-Valid",
    )
    log_level: str = _option(
        "LD_LOG_LEVEL_",
        LOG_LEVEL,
        "",
        "Log level for this environment; default `[Main] logLevel`.",
        "debug",
    )
    proj_key: str = _option(
        "LD_PROJ_KEY_", STRING, "", "Key of the environment's LaunchDarkly project.", "shop"
    )
    env_key: str = _option(
        "LD_ENV_KEY_",
        STRING,
        "",
        "Key of the environment within its project, as webhooks name it.",
        "production",
    )
    filter_key: str = _option(
        "",
        STRING,
        "",
        "Key of one of the project's payload filters.",
        "microservice-1",
        support=REFUSED,
    )
    offline: bool = _option(
        "", BOOLEAN, False, "Internal to ld-relay; operators never set it.", support=NO_EFFECT
    )


@_section
class Filters(Struct, frozen=True):
    """`[Filters "PROJKEY"]`: payload filters of a project. The variable ends with its key."""

    keys: tuple[str, ...] = _option(
        "LD_FILTER_KEYS_",
        LIST,
        (),
        "Keys of the payload filters; each adds a filtered copy of every environment of the"
        " project.",
        "microservice-1,microservice-2",
        support=REFUSED,
    )


SECTIONS: dict[str, type] = {
    "Main": Main,
    "Events": Events,
    "Redis": Redis,
    "Proxy": Proxy,
    "Http": Http,
    "Webhook": Webhook,
    "Prometheus": Prometheus,
    "Concurrency": Concurrency,
    "AutoConfig": AutoConfig,
    "OfflineMode": OfflineMode,
    "DynamoDB": DynamoDB,
    "Consul": Consul,
    "Datadog": Datadog,
    "Stackdriver": Stackdriver,
    "OpenTelemetry": OpenTelemetry,
}
"""Unnamed sections, in the order of the documentation."""

NAMED_SECTIONS: dict[str, type] = {"Environment": EnvironmentConfig, "Filters": Filters}
"""Sections that occur once per name."""


class Config(Struct, frozen=True):
    """All options, validated.

    Args:
        environments: in configuration order.
        redis: None if Redis is not configured; otherwise `redis.url` is complete.
        sources: source of each option that was set, `FILE:LINE` or the variable, by
            `Section.attribute` or `Environment "NAME".attribute`.
        warnings: messages for the operator, such as on options without effect.
    """

    main: Main = Main()
    events: Events = Events()
    environments: tuple[EnvironmentConfig, ...] = ()
    redis: Redis | None = None
    proxy: Proxy = Proxy()
    http: Http = Http()
    webhook: Webhook = Webhook()
    prometheus: Prometheus = Prometheus()
    sources: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def options(section: str) -> tuple[Option, ...]:
    """Return the options of a section, in declaration order."""
    cls: Any = SECTIONS.get(section) or NAMED_SECTIONS[section]
    return tuple(
        replace(
            declared,
            section=section,
            attribute=attribute,
            name=declared.name or camel_case(attribute),
        )
        for attribute, declared in cls.options.items()
    )


def camel_case(attribute: str) -> str:
    """Return the name of an attribute in the file: `stream_uri` becomes `streamUri`."""
    first, *rest = attribute.split("_")
    return first + "".join(word.capitalize() for word in rest)
