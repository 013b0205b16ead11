"""Every option, once: its name, variable, type, default and meaning (config 3.5, newer 10.2).

The loader, `relay check`, `config/relay.conf` and the table of the README derive from these
declarations, and a test keeps them in step. Times are seconds, sizes are bytes. An option's name in
the file is its attribute's in camel case.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from typing import Any

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


class Support(Enum):
    """What this release does with an option."""

    FULL = "full"
    LATER = "later"
    """Accepted; what it configures answers 503 or has no effect yet, which the start-up says."""
    REFUSED = "refused"
    """A relay that is given it refuses to start: ignoring it would be wrong."""
    NO_EFFECT = "no effect"
    """Accepted for compatibility; it has no meaning here, for the reason in its description."""


@dataclass(frozen=True, slots=True)
class Option:
    """The declaration of an option.

    Args:
        section: of the file.
        attribute: of the section's class.
        name: in the file; empty if the file has none.
        variable: of the environment; ends in `_` where an environment's name follows; may be empty.
        type: its type.
        default: when nothing is said.
        help: what it does, a sentence or two.
        example: as a person would write it, where the default shows nothing.
        support: what this release does with it.
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
    kind: OptionType,
    default: Any,
    text: str,
    example: str = "",
    *,
    name: str | None = None,
    support: Support = Support.FULL,
) -> Any:
    """Declare an option as a field of its section."""
    metadata = {"variable": variable, "kind": kind, "help": text, "example": example}
    return field(default=default, metadata={**metadata, "name": name, "support": support})


LATER, REFUSED, NO_EFFECT = Support.LATER, Support.REFUSED, Support.NO_EFFECT


@dataclass(frozen=True, slots=True)
class Main:
    """`[Main]`: the process and how it serves."""

    port: int = _option("PORT", INTEGER, 8030, "Port to listen on, on all interfaces.")
    stream_uri: str = _option(
        "STREAM_URI",
        HTTP_URI,
        "https://stream.launchdarkly.com",
        "Base of LaunchDarkly's stream, or of another relay.",
    )
    base_uri: str = _option(
        "BASE_URI",
        HTTP_URI,
        "https://sdk.launchdarkly.com",
        "Base of LaunchDarkly's polling service; used with `dataSource = polling`.",
    )
    client_side_base_uri: str = _option(
        "CLIENT_SIDE_BASE_URI",
        HTTP_URI,
        "",
        "Base of the goals that browsers ask for; when not set, LaunchDarkly's, or `baseUri` if that"
        " was changed.",
        "https://clientsdk.launchdarkly.com",
    )
    data_source: str = _option(
        "DATA_SOURCE",
        one_of("streaming", "polling"),
        "streaming",
        "How flags come from LaunchDarkly: one long connection, or a request each `pollInterval`.",
    )
    poll_interval: float = _option(
        "POLL_INTERVAL", DURATION, 30.0, "Time between polls with `dataSource = polling`."
    )
    flags_file: str = _option(
        "FLAGS_FILE",
        PATH,
        "",
        "Serve this file of flags, in the SDKs' file-data format, when no environment is configured.",
        "/etc/relay/flags.yaml",
    )
    init_timeout: float = _option(
        "INIT_TIMEOUT",
        DURATION,
        10.0,
        "How long the relay counts as starting while LaunchDarkly has not answered.",
    )
    heartbeat_interval: float = _option(
        "HEARTBEAT_INTERVAL",
        DURATION,
        180.0,
        "Time between comments on idle streams; 0 for none. SDKs give up after 5 minutes of silence.",
    )
    max_client_connection_time: float = _option(
        "MAX_CLIENT_CONNECTION_TIME",
        DURATION,
        0.0,
        "Streams are ended after this time, a little spread; 0 for never. Lets load balancers"
        " distribute clients anew.",
    )
    client_stall_timeout: float = _option(
        "CLIENT_STALL_TIMEOUT",
        DURATION,
        60.0,
        "A stream whose client takes nothing of what waits for it is ended after this time.",
    )
    disconnected_status_time: float = _option(
        "DISCONNECTED_STATUS_TIME",
        DURATION,
        60.0,
        "How long an interruption may last before `/status` says `disconnected`.",
    )
    snapshot_dir: str = _option(
        "SNAPSHOT_DIR",
        PATH,
        "",
        "Directory for the last known flags of each environment, for a start while LaunchDarkly and"
        " the database are away. Not set: none are kept.",
        "/data",
    )
    graceful_shutdown_timeout: float = _option(
        "GRACEFUL_SHUTDOWN_TIMEOUT",
        DURATION,
        8.0,
        "How long the end may take after SIGTERM; streams end spread over it. The default fits the"
        " 10 seconds of `docker stop`.",
    )
    max_request_head_size: int = _option(
        "MAX_REQUEST_HEAD_SIZE",
        SIZE,
        64 * 1024,
        "The longest request line and headers that are accepted; long contexts in paths need room.",
    )
    max_client_request_body_size: int = _option(
        "MAX_CLIENT_REQUEST_BODY_SIZE",
        SIZE,
        5 * 1024 * 1024,
        "The largest body of an evaluation request.",
    )
    tls_enabled: bool = _option("TLS_ENABLED", BOOLEAN, False, "Serve HTTPS instead of HTTP.")
    tls_cert: str = _option(
        "TLS_CERT",
        PATH,
        "",
        "PEM file of the certificate and its chain.",
        "/etc/relay/tls/cert.pem",
    )
    tls_key: str = _option(
        "TLS_KEY", PATH, "", "PEM file of the certificate's private key.", "/etc/relay/tls/key.pem"
    )
    tls_min_version: str = _option(
        "TLS_MIN_VERSION", TLS_VERSION, "1.2", "The oldest TLS version that is accepted."
    )
    log_level: str = _option(
        "LOG_LEVEL", LOG_LEVEL, "info", "`debug` also logs each request; `none` logs nothing."
    )
    log_format: str = _option(
        "LOG_FORMAT", one_of("text", "json"), "text", "Lines for people, or one object per line."
    )
    exit_always: bool = _option(
        "EXIT_ALWAYS",
        BOOLEAN,
        False,
        "Fill the database once and exit, with 0 if every environment could be read.",
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
        "Log a failure to reach LaunchDarkly at the start as a warning, not as an error.",
    )
    workers: int = _option(
        "WORKERS",
        INTEGER,
        1,
        "Number of processes. Only 1 in this release.",
        support=LATER,
    )
    eval_streams: bool = _option(
        "EVAL_STREAMS",
        BOOLEAN,
        True,
        "Client-side streams carry evaluated flags; `false` sends pings, as the reference does.",
    )
    ping_stream_jitter_time: float = _option(
        "PING_STREAM_JITTER_TIME",
        DURATION,
        0.0,
        "Pings of client-side streams are delayed by a random time up to this.",
    )
    big_segments_stale_as_degraded: bool = _option(
        "BIG_SEGMENTS_STALE_AS_DEGRADED",
        BOOLEAN,
        False,
        "`/status` says `degraded` while big segments are out of date.",
        support=LATER,
    )
    big_segments_stale_threshold: float = _option(
        "BIG_SEGMENTS_STALE_THRESHOLD",
        DURATION,
        300.0,
        "When big segments count as out of date.",
        support=LATER,
    )
    expired_credential_cleanup_interval: float = _option(
        "EXPIRED_CREDENTIAL_CLEANUP_INTERVAL",
        DURATION,
        60.0,
        "How often expired credentials of automatic configuration are looked for.",
        support=LATER,
    )


@dataclass(frozen=True, slots=True)
class Events:
    """`[Events]`: analytics events."""

    send_events: bool = _option(
        "USE_EVENTS", BOOLEAN, False, "Accept analytics events of SDKs and forward them."
    )
    events_uri: str = _option(
        "EVENTS_HOST",
        HTTP_URI,
        "https://events.launchdarkly.com",
        "Base of LaunchDarkly's events service.",
    )
    flush_interval: float = _option(
        "EVENTS_FLUSH_INTERVAL",
        DURATION,
        5.0,
        "For how long events gather before they are delivered together.",
    )
    capacity: int = _option(
        "EVENTS_CAPACITY",
        INTEGER,
        1000,
        "Posts of events that wait in memory, at 8 KiB each, when there is no disk for them; the"
        " oldest go first, and are counted.",
    )
    metrics_capacity: int = _option(
        "EVENTS_METRICS_CAPACITY",
        INTEGER,
        10000,
        "Usage metrics are one post for each environment and minute.",
        support=NO_EFFECT,
    )
    inline_users: bool = _option(
        "EVENTS_INLINE_USERS", BOOLEAN, False, "No SDK needs it any more.", support=NO_EFFECT
    )
    max_inbound_payload_size: int = _option(
        "EVENTS_MAX_INBOUND_PAYLOAD_SIZE",
        SIZE,
        0,
        "The largest post of events, decompressed; not set: 32 MiB.",
        "10MiB",
    )
    spool_dir: str = _option(
        "EVENTS_SPOOL_DIR",
        PATH,
        "",
        "Directory in which accepted events wait for their delivery, safe from the end of the"
        " process. Not set: they wait in memory.",
        "/data/events",
    )


@dataclass(frozen=True, slots=True)
class Webhook:
    """`[Webhook]`: LaunchDarkly's announcements of changes, at `/webhooks/launchdarkly`."""

    secret: Secret = _option(
        "WEBHOOK_SECRET",
        SECRET,
        Secret(""),
        "Secret of the webhook, or several with commas between them; without one there is no such"
        " route.",
        "a-long-random-text",
    )

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """Each secret by itself; any of them may have signed."""
        parts = map(stripped, self.secret.reveal().split(","))
        return tuple(Secret(part) for part in parts if part)


@dataclass(frozen=True, slots=True)
class Redis:
    """`[Redis]`: a Redis or Valkey server that is kept current for SDKs in daemon mode.

    A file switches it on by `url`, `host` or `port`; with variables, `USE_REDIS=true` does.
    """

    url: str = _option(
        "REDIS_URL",
        URI,
        "",
        "Of the form `redis://[user[:password]@]host[:port][/database]`. In the environment it counts with `USE_REDIS=true` only.",
        "redis://localhost:6379",
    )
    host: str = _option(
        "REDIS_HOST", STRING, "", "Instead of `url`; default `localhost`.", "localhost"
    )
    port: int = _option("REDIS_PORT", INTEGER, 0, "Instead of `url`; default 6379.", "6379")
    tls: bool = _option("REDIS_TLS", BOOLEAN, False, "Use TLS, as `rediss://` does.")
    username: str = _option("REDIS_USERNAME", STRING, "", "Name of the ACL user.", "relay")
    password: Secret = _option(
        "REDIS_PASSWORD",
        SECRET,
        Secret(""),
        "Password of the user, or of the server.",
        "a-long-random-text",
    )
    local_ttl: float = _option(
        "CACHE_TTL",
        DURATION,
        30.0,
        "The relay serves from memory and never from the database, so nothing is cached for a time.",
        support=NO_EFFECT,
    )
    client_certificate_file: str = _option(
        "REDIS_CLIENT_CERT_FILE",
        PATH,
        "",
        "PEM file of our certificate, with `clientKeyFile`.",
        "/etc/relay/tls/redis-client.pem",
    )
    client_key_file: str = _option(
        "REDIS_CLIENT_KEY_FILE",
        PATH,
        "",
        "PEM file of its key.",
        "/etc/relay/tls/redis-client-key.pem",
    )
    ca_file: str = _option(
        "REDIS_CA_FILE",
        PATH,
        "",
        "PEM file of authorities that replaces the system's.",
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
        "REDIS_CONNECT_TIMEOUT", DURATION, 5.0, "How long a connection may take."
    )
    read_timeout: float = _option(
        "REDIS_READ_TIMEOUT", DURATION, 10.0, "How long an answer may take."
    )


@dataclass(frozen=True, slots=True)
class Proxy:
    """`[Proxy]`: the way to LaunchDarkly."""

    url: str = _option(
        "PROXY_URL",
        HTTP_URI,
        "",
        "HTTP proxy for all requests to LaunchDarkly, perhaps with `user:password@`. Not set: the"
        " variables HTTP_PROXY, HTTPS_PROXY and NO_PROXY count.",
        "http://proxy.example.com:3128",
    )
    ca_cert_files: tuple[str, ...] = _option(
        "PROXY_CA_CERTS",
        PATHS,
        (),
        "PEM files of authorities that are trusted beside the system's.",
        "/etc/relay/tls/company-ca.pem",
    )
    ntlm_auth: bool = _option(
        "PROXY_AUTH_NTLM", BOOLEAN, False, "NTLM authentication.", support=REFUSED
    )
    user: str = _option("PROXY_AUTH_USER", STRING, "", "For NTLM only.", "relay", support=NO_EFFECT)
    password: Secret = _option(
        "PROXY_AUTH_PASSWORD",
        SECRET,
        Secret(""),
        "For NTLM only.",
        "a-long-random-text",
        support=NO_EFFECT,
    )
    domain: str = _option(
        "PROXY_AUTH_DOMAIN", STRING, "", "For NTLM only.", "EXAMPLE", support=NO_EFFECT
    )


@dataclass(frozen=True, slots=True)
class Http:
    """`[Http]`: compression of answers, and connections to LaunchDarkly."""

    enable_compression: bool = _option(
        "HTTP_ENABLE_COMPRESSION",
        BOOLEAN,
        False,
        "Polls are always compressed for clients that ask for it; streams never.",
        support=NO_EFFECT,
    )
    idle_conn_timeout: float = _option(
        "HTTP_IDLE_CONN_TIMEOUT", DURATION, 90.0, "How long an unused connection is kept."
    )
    max_idle_conns: int = _option(
        "HTTP_MAX_IDLE_CONNS",
        INTEGER,
        100,
        "An environment needs one connection.",
        support=NO_EFFECT,
    )
    max_idle_conns_per_host: int = _option(
        "HTTP_MAX_IDLE_CONNS_PER_HOST",
        INTEGER,
        2,
        "An environment needs one connection.",
        support=NO_EFFECT,
    )
    disable_keep_alives: bool = _option(
        "HTTP_DISABLE_KEEPALIVE", BOOLEAN, False, "Open a new connection for each request."
    )


@dataclass(frozen=True, slots=True)
class Concurrency:
    """`[Concurrency]`: the reference's remedy for its cost of full deliveries."""

    max_concurrent: int = _option(
        "INIT_MAX_CONCURRENT",
        COUNT,
        0,
        "Deliveries of all flags share one copy of the bytes, so they need no limit.",
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


@dataclass(frozen=True, slots=True)
class Prometheus:
    """`[Prometheus]`: figures for a Prometheus server."""

    enabled: bool = _option(
        "USE_PROMETHEUS",
        BOOLEAN,
        False,
        "Serve figures on a port of their own, with the reference's names among them.",
    )
    port: int = _option(
        "PROMETHEUS_PORT", INTEGER, 8031, "That port, on all interfaces, without TLS."
    )
    prefix: str = _option(
        "PROMETHEUS_PREFIX",
        STRING,
        "launchdarkly_relay",
        "Beginning of the names of the reference's figures.",
    )


@dataclass(frozen=True, slots=True)
class AutoConfig:
    """`[AutoConfig]`: environments that LaunchDarkly announces, instead of configured ones."""

    key: Secret = _option(
        "AUTO_CONFIG_KEY",
        KEY,
        Secret(""),
        "Automatic configuration key; switches automatic configuration on.",
        "rel-00000000-0000-0000-0000-000000000000",
        support=REFUSED,
    )
    env_datastore_prefix: str = _option(
        "ENV_DATASTORE_PREFIX",
        STRING,
        "",
        "Prefix of keys in the database; `$CID` stands for the client-side ID.",
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
        "CORS origins of every environment.",
        "https://shop.example.com",
        support=LATER,
    )
    env_allowed_header: tuple[str, ...] = _option(
        "ENV_ALLOWED_HEADER",
        HEADER_NAMES,
        (),
        "CORS request headers of every environment.",
        "Timestamp-Valid",
        support=LATER,
    )
    cache_key: str = _option(
        "AUTO_CONFIG_CACHE_KEY",
        STRING,
        "",
        "Key under which the list of environments is kept in the database.",
        "relay-environments",
        support=REFUSED,
    )
    cache_encryption_key: Secret = _option(
        "AUTO_CONFIG_CACHE_ENCRYPTION_KEY",
        SECRET,
        Secret(""),
        "Encrypts what is kept under `cacheKey`; not set: the automatic configuration key does.",
        "a-long-random-text",
        support=REFUSED,
    )


@dataclass(frozen=True, slots=True)
class OfflineMode:
    """`[OfflineMode]`: everything from an archive that LaunchDarkly has made."""

    file_data_source: str = _option(
        "FILE_DATA_SOURCE",
        PATH,
        "",
        "The archive; switches offline mode on.",
        "/data/archive.tar.gz",
        support=REFUSED,
    )
    file_data_source_monitoring_interval: float = _option(
        "FILE_DATA_SOURCE_MONITORING_INTERVAL",
        DURATION,
        1.0,
        "Time between two looks at the archive.",
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


@dataclass(frozen=True, slots=True)
class DynamoDB:
    """`[DynamoDB]`: a DynamoDB table that is kept current for SDKs in daemon mode."""

    enabled: bool = _option(
        "USE_DYNAMODB", BOOLEAN, False, "Keep a DynamoDB table current.", support=REFUSED
    )
    table_name: str = _option(
        "DYNAMODB_TABLE",
        STRING,
        "",
        "The table of environments that name none of their own.",
        "flags",
        support=LATER,
    )
    url: str = _option(
        "DYNAMODB_URL",
        HTTP_URI,
        "",
        "Of the service; not set: that of AWS.",
        "http://localhost:8000",
        support=LATER,
    )
    local_ttl: float = _option(
        "CACHE_TTL", DURATION, 30.0, "See `[Redis]` `localTtl`.", support=NO_EFFECT
    )


@dataclass(frozen=True, slots=True)
class Consul:
    """`[Consul]`: a Consul server that is kept current; `USE_CONSUL=true` in the environment."""

    host: str = _option(
        "CONSUL_HOST",
        STRING,
        "",
        "Host, perhaps with a port; switches Consul on in a file.",
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
        "File that holds the access token.",
        "/etc/relay/consul-token",
        support=LATER,
    )
    local_ttl: float = _option(
        "CACHE_TTL", DURATION, 30.0, "See `[Redis]` `localTtl`.", support=NO_EFFECT
    )


@dataclass(frozen=True, slots=True)
class Datadog:
    """`[Datadog]`: figures and traces for Datadog."""

    enabled: bool = _option(
        "USE_DATADOG", BOOLEAN, False, "Send figures and traces to Datadog.", support=REFUSED
    )
    prefix: str = _option(
        "DATADOG_PREFIX",
        STRING,
        "launchdarkly_relay",
        "Beginning of the figures' names.",
        support=LATER,
    )
    trace_addr: str = _option(
        "DATADOG_TRACE_ADDR",
        STRING,
        "localhost:8126",
        "Host and port of the agent for traces.",
        support=LATER,
    )
    stats_addr: str = _option(
        "DATADOG_STATS_ADDR",
        STRING,
        "localhost:8125",
        "Host and port of the agent for figures, or a `unix://` path.",
        support=LATER,
    )
    tag: tuple[str, ...] = _option(
        "", LIST, (), "Tags of all figures, each as `name:value`.", "team:shop", support=LATER
    )


@dataclass(frozen=True, slots=True)
class Stackdriver:
    """`[Stackdriver]`: figures and traces for Google's Cloud Monitoring."""

    enabled: bool = _option(
        "USE_STACKDRIVER", BOOLEAN, False, "Send figures and traces there.", support=REFUSED
    )
    project_id: str = _option(
        "STACKDRIVER_PROJECT_ID",
        STRING,
        "",
        "The Google Cloud project.",
        "my-project",
        name="projectID",
        support=LATER,
    )
    prefix: str = _option(
        "STACKDRIVER_PREFIX",
        STRING,
        "launchdarkly_relay",
        "Beginning of the figures' names.",
        support=LATER,
    )


@dataclass(frozen=True, slots=True)
class OpenTelemetry:
    """`[OpenTelemetry]`: figures, traces and logs over OTLP."""

    enabled: bool = _option(
        "USE_OTLP", BOOLEAN, False, "Export figures, traces and logs.", support=REFUSED
    )
    protocol: str = _option(
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        one_of("grpc", "http"),
        "",
        "The protocol.",
        "grpc",
        support=LATER,
    )
    metrics_cardinality_limit: int = _option(
        "OTEL_METRICS_CARDINALITY_LIMIT",
        COUNT,
        2000,
        "Series of one figure; 0 for any number.",
        support=LATER,
    )
    environment_status_metrics: bool = _option(
        "OTEL_ENVIRONMENT_STATUS_METRICS",
        BOOLEAN,
        False,
        "Figures on the state of each environment.",
        support=LATER,
    )
    logs_exporter: str = _option(
        "OTEL_LOGS_EXPORTER", STRING, "otlp", "`otlp`, or `none`.", support=LATER
    )
    traces_exporter: str = _option(
        "OTEL_TRACES_EXPORTER", STRING, "otlp", "`otlp`, or `none`.", support=LATER
    )
    metrics_exporter: str = _option(
        "OTEL_METRICS_EXPORTER", STRING, "otlp", "`otlp`, or `none`.", support=LATER
    )


@dataclass(frozen=True, slots=True)
class EnvironmentConfig:
    """`[Environment "NAME"]`: one environment. Its variables end with the name, verbatim."""

    name: str = ""
    """The subsection, or the end of the variables' names."""
    sdk_key: Secret = _option(
        "LD_ENV_",
        KEY,
        Secret(""),
        "SDK key; required. In the environment, it is this variable that makes one exist.",
        "sdk-00000000-0000-0000-0000-000000000000",
    )
    mobile_key: Secret = _option(
        "LD_MOBILE_KEY_",
        KEY,
        Secret(""),
        "Opens it for mobile SDKs.",
        "mob-00000000-0000-0000-0000-000000000000",
    )
    env_id: str = _option(
        "LD_CLIENT_SIDE_ID_",
        ENVIRONMENT_ID,
        "",
        "Client-side ID: opens it for browsers; sent to SDKs.",
        "000000000000000000000000",
    )
    prefix: str = _option(
        "LD_PREFIX_",
        STRING,
        "",
        "Prefix of its keys in the database, default `launchdarkly`; required when there are several"
        " environments.",
        "production",
    )
    table_name: str = _option(
        "LD_TABLE_NAME_",
        STRING,
        "",
        "Table of its own in DynamoDB.",
        "flags-production",
        support=LATER,
    )
    ttl: float = _option(
        "LD_TTL_", DURATION, 0.0, "For how long HTTP caches may keep polled answers; 0 for not."
    )
    secure_mode: bool = _option(
        "LD_SECURE_MODE_", BOOLEAN, False, "Browsers must prove their context."
    )
    eval_streams: bool | None = _option(
        "LD_EVAL_STREAMS_",
        BOOLEAN,
        None,
        "Its client-side streams carry evaluated flags, or pings; default `[Main] evalStreams`.",
        "false",
    )
    allowed_origin: tuple[str, ...] = _option(
        "LD_ALLOWED_ORIGIN_",
        ORIGINS,
        (),
        "CORS origins, as in `https://shop.example.com`, without wildcards; none or `*` means all.",
        "https://shop.example.com,https://www.example.com",
    )
    allowed_header: tuple[str, ...] = _option(
        "LD_ALLOWED_HEADER_",
        HEADER_NAMES,
        (),
        "CORS request headers beside the standard ones.",
        "Timestamp-Valid,Random-Id-Valid",
    )
    log_level: str = _option(
        "LD_LOG_LEVEL_",
        LOG_LEVEL,
        "",
        "Of this environment's lines; default `[Main] logLevel`.",
        "debug",
    )
    proj_key: str = _option("LD_PROJ_KEY_", STRING, "", "Key of its LaunchDarkly project.", "shop")
    env_key: str = _option(
        "LD_ENV_KEY_",
        STRING,
        "",
        "Key of the environment within its project, by which webhooks name it.",
        "production",
    )
    filter_key: str = _option(
        "", STRING, "", "Key of a payload filter of its project.", "microservice-1", support=REFUSED
    )
    offline: bool = _option(
        "", BOOLEAN, False, "The reference's own mark; nobody sets it.", support=NO_EFFECT
    )


@dataclass(frozen=True, slots=True)
class Filters:
    """`[Filters "PROJKEY"]`: payload filters of a project. Its variable ends with the key."""

    keys: tuple[str, ...] = _option(
        "LD_FILTER_KEYS_",
        LIST,
        (),
        "Keys of the filters; each makes another environment of each environment of the project.",
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
"""The sections without a name of their own, in the order in which people should read them."""

NAMED_SECTIONS: dict[str, type] = {"Environment": EnvironmentConfig, "Filters": Filters}
"""The sections that occur once for each name."""


@dataclass(frozen=True, slots=True)
class Config:
    """All options, checked.

    Args:
        environments: in the order in which they were given.
        redis: None unless a Redis is to be kept current; then `redis.url` is complete.
        given: where each option that was given came from, by `Section.attribute`, or
            `Environment "NAME".attribute`: `FILE:LINE` or the variable.
        warnings: sentences that the operator should read, such as on options without effect.
    """

    main: Main = Main()
    events: Events = Events()
    environments: tuple[EnvironmentConfig, ...] = ()
    redis: Redis | None = None
    proxy: Proxy = Proxy()
    http: Http = Http()
    webhook: Webhook = Webhook()
    prometheus: Prometheus = Prometheus()
    given: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def options(section: str) -> tuple[Option, ...]:
    """Return the options of a section, as declared."""
    cls = SECTIONS.get(section) or NAMED_SECTIONS[section]
    return tuple(_declared(section, each) for each in fields(cls) if each.metadata)


def _declared(section: str, declared: Field[Any]) -> Option:
    about = declared.metadata
    default = None if declared.default is MISSING else declared.default
    return Option(
        section,
        declared.name,
        about["name"] or camel_case(declared.name),
        about["variable"],
        about["kind"],
        default,
        about["help"],
        about["example"],
        about["support"],
    )


def camel_case(attribute: str) -> str:
    """Return the name that an attribute has in the file: `stream_uri` is `streamUri`."""
    first, *rest = attribute.split("_")
    return first + "".join(word.capitalize() for word in rest)
