"""Every option, declared once: name, variable, type, default and help (config 3.5, newer 10.2).

The loader, `relay check`, `config/relay.conf` and `docs/configuration.md` derive from these
declarations; a test keeps them in sync. Times are seconds, sizes are bytes. An option's name in the
file is its attribute's name in camel case.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

from msgspec import Struct, field
from msgspec.structs import replace

from relay.config.options import NO_EFFECT, REFUSED, Option, declared, option, section
from relay.config.types import (
    ADDRESSES,
    BOOLEAN,
    CONSUL_ADDRESS,
    COUNT,
    DOCUMENT_URI,
    DOCUMENT_URIS,
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
    REDIS_URIS,
    SECRET,
    SIZE,
    STRING,
    TLS_VERSION,
    WORKERS,
    one_of,
    stripped,
)
from relay.config.unsupported import (
    Concurrency,
    Datadog,
    OpenTelemetry,
    Stackdriver,
)
from relay.model.credential import Secret
from relay.model.environment import DEFAULT_PREFIX


@section
class Main(Struct, frozen=True):
    """`[Main]`: the server process and its data source."""

    port: int = option("PORT", INTEGER, 8030, "Port to listen on, on all interfaces.")
    stream_uri: str = option(
        "STREAM_URI",
        HTTP_URI,
        "https://stream.launchdarkly.com",
        "Base URL of LaunchDarkly's streaming service, or of another relay.",
    )
    base_uri: str = option(
        "BASE_URI",
        HTTP_URI,
        "https://sdk.launchdarkly.com",
        "Base URL of LaunchDarkly's polling service; used with `dataSource = polling` and with"
        " `dataSystem = fdv2`.",
    )
    client_side_base_uri: str = option(
        "CLIENT_SIDE_BASE_URI",
        HTTP_URI,
        "",
        "Base URL for the goals (experimentation metrics) that browser SDKs request. Default:"
        " LaunchDarkly's, or `baseUri` if that was changed.",
        "https://clientsdk.launchdarkly.com",
    )
    data_source: str = option(
        "DATA_SOURCE",
        one_of("streaming", "polling"),
        "streaming",
        "How flags are fetched from LaunchDarkly: over one long-lived stream, or with a request"
        " every `pollInterval`.",
    )
    data_system: str = option(
        "DATA_SYSTEM",
        one_of("fdv1", "fdv2"),
        "fdv1",
        "Protocol by which flags are fetched from LaunchDarkly, or from another relay: `fdv2`"
        " fetches only what has changed, also after an interruption or a restart. Where the other"
        " side does not know it or does not want it, `fdv1` takes its place by itself.",
    )
    poll_interval: float = option(
        "POLL_INTERVAL",
        DURATION,
        30.0,
        "Interval between polls with `dataSource = polling`, and while a stream of FDv2 fails.",
    )
    flags_file: str = option(
        "FLAGS_FILE",
        PATH,
        "",
        "Flags file to serve, in the SDKs' file-data format, if no environment is configured.",
        "/etc/relay/flags.yaml",
    )
    init_timeout: float = option(
        "INIT_TIMEOUT",
        DURATION,
        10.0,
        "How long the relay counts as starting while it waits for LaunchDarkly's first answer.",
    )
    heartbeat_interval: float = option(
        "HEARTBEAT_INTERVAL",
        DURATION,
        180.0,
        "Interval between heartbeats on idle streams; 0 = none. SDKs reconnect after 5 minutes of"
        " silence.",
    )
    max_client_connection_time: float = option(
        "MAX_CLIENT_CONNECTION_TIME",
        DURATION,
        0.0,
        "Maximum lifetime of a stream, shortened by up to 10 % at random; 0 = unlimited. Lets load"
        " balancers redistribute clients.",
    )
    client_stall_timeout: float = option(
        "CLIENT_STALL_TIMEOUT",
        DURATION,
        60.0,
        "A stream is closed if its client has read none of its pending data for this long.",
    )
    max_unread_data: int = option(
        "MAX_UNREAD_DATA",
        SIZE,
        256 * 1024 * 1024,
        "Bytes of all data, for each process, that may be on their way to streams at a time: further"
        " streams wait for theirs until others have read. They are in the memory of the kernel, which"
        " counts for a container.",
    )
    disconnected_status_time: float = option(
        "DISCONNECTED_STATUS_TIME",
        DURATION,
        60.0,
        "How long the upstream connection may be interrupted before `/status` reports"
        " `disconnected`.",
    )
    snapshot_dir: str = option(
        "SNAPSHOT_DIR",
        PATH,
        "",
        "Directory for snapshots of each environment's flags, so that the relay can start while"
        " LaunchDarkly and the database are unavailable. Not set: no snapshots.",
        "/data",
    )
    bootstrap_from: str = option(
        "BOOTSTRAP_FROM",
        DOCUMENT_URI,
        "",
        "Where the documents of `[Publish]` lie from which the relay starts while LaunchDarkly, the"
        " database and the snapshots are unavailable: `file:///FOLDER`, `s3://BUCKET/PREFIX` or"
        " `https://…{key}`.",
        "s3://flags/production",
    )
    bootstrap_token: Secret = option(
        "BOOTSTRAP_TOKEN",
        SECRET,
        Secret(""),
        "Bearer token with which documents are read from `https` URLs.",
        "a-long-random-text",
    )
    graceful_shutdown_timeout: float = option(
        "GRACEFUL_SHUTDOWN_TIMEOUT",
        DURATION,
        8.0,
        "Time limit for the shutdown after SIGTERM, during which streams are closed gradually. The"
        " default fits the 10 seconds that `docker stop` allows.",
    )
    max_request_head_size: int = option(
        "MAX_REQUEST_HEAD_SIZE",
        SIZE,
        64 * 1024,
        "Maximum size of the request line and headers; raise it for long contexts in URL paths.",
    )
    max_client_request_body_size: int = option(
        "MAX_CLIENT_REQUEST_BODY_SIZE",
        SIZE,
        5 * 1024 * 1024,
        "Maximum size of the body of an evaluation request.",
    )
    tls_enabled: bool = option("TLS_ENABLED", BOOLEAN, False, "Serve HTTPS instead of HTTP.")
    tls_cert: str = option(
        "TLS_CERT",
        PATH,
        "",
        "PEM file with the certificate and its chain.",
        "/etc/relay/tls/cert.pem",
    )
    tls_key: str = option(
        "TLS_KEY",
        PATH,
        "",
        "PEM file with the certificate's private key.",
        "/etc/relay/tls/key.pem",
    )
    tls_min_version: str = option("TLS_MIN_VERSION", TLS_VERSION, "1.2", "Minimum TLS version.")
    log_level: str = option(
        "LOG_LEVEL",
        LOG_LEVEL,
        "info",
        "Log level. `debug` also logs every request; `none` logs nothing.",
    )
    log_format: str = option(
        "LOG_FORMAT",
        one_of("text", "json"),
        "text",
        "Log format: plain text, or one JSON object per line.",
    )
    reload: str = option(
        "RELOAD",
        one_of("signal", "watch"),
        "signal",
        "When the configuration is read again: on SIGHUP (`relay reload`) only, or also whenever"
        " its files have changed (`watch`).",
    )
    exit_always: bool = option(
        "EXIT_ALWAYS",
        BOOLEAN,
        False,
        "Fill the database once and exit; the exit code is 0 if all environments succeeded.",
    )
    exit_on_error: bool = option(
        "EXIT_ON_ERROR",
        BOOLEAN,
        False,
        "With `exitAlways`: exit at the first environment that fails.",
    )
    ignore_connection_errors: bool = option(
        "IGNORE_CONNECTION_ERRORS",
        BOOLEAN,
        False,
        "Log a failure to reach LaunchDarkly at startup as a warning instead of an error.",
    )
    workers: int = option(
        "WORKERS",
        WORKERS,
        1,
        "Number of processes that serve clients, each on a core of its own; `auto`: as many as the"
        " relay may use. With 1 the relay is one process; with more there is one besides that talks"
        " to LaunchDarkly and the databases.",
    )
    eval_streams: bool = option(
        "EVAL_STREAMS",
        BOOLEAN,
        True,
        "Send evaluated flags on client-side streams; `false` sends pings, like ld-relay.",
    )
    fdv1_fallback: bool = option(
        "FDV1_FALLBACK",
        BOOLEAN,
        False,
        "Lead SDKs that speak FDv2 back to FDv1, for as long as something is wrong with FDv2.",
    )
    ping_stream_jitter_time: float = option(
        "PING_STREAM_JITTER_TIME",
        DURATION,
        0.0,
        "Maximum random delay of pings on client-side streams.",
    )
    big_segments_stale_as_degraded: bool = option(
        "BIG_SEGMENTS_STALE_AS_DEGRADED",
        BOOLEAN,
        False,
        "Report `degraded` in `/status` while big segments are out of date.",
    )
    big_segments_stale_threshold: float = option(
        "BIG_SEGMENTS_STALE_THRESHOLD",
        DURATION,
        300.0,
        "Time since the last synchronisation from which `/status` calls big segments"
        " `potentiallyStale`.",
    )
    expired_credential_cleanup_interval: float = option(
        "EXPIRED_CREDENTIAL_CLEANUP_INTERVAL",
        DURATION,
        60.0,
        "Interval of ld-relay's checks for expired credentials; here they expire in time.",
        support=NO_EFFECT,
    )


@section
class Events(Struct, frozen=True):
    """`[Events]`: analytics events."""

    send_events: bool = option(
        "USE_EVENTS",
        BOOLEAN,
        False,
        "Accept analytics events from SDKs and forward them to LaunchDarkly.",
    )
    events_uri: str = option(
        "EVENTS_HOST",
        HTTP_URI,
        "https://events.launchdarkly.com",
        "Base URL of LaunchDarkly's events service.",
    )
    flush_interval: float = option(
        "EVENTS_FLUSH_INTERVAL",
        DURATION,
        5.0,
        "How long events are collected before they are delivered in one batch.",
    )
    capacity: int = option(
        "EVENTS_CAPACITY",
        INTEGER,
        1000,
        "Memory for undelivered event payloads when there is no disk spool, in units of 8 KiB. When"
        " it is full, the oldest payloads are dropped and counted.",
    )
    metrics_capacity: int = option(
        "EVENTS_METRICS_CAPACITY",
        INTEGER,
        10000,
        "Usage metrics are sent once per environment and minute.",
        support=NO_EFFECT,
    )
    inline_users: bool = option(
        "EVENTS_INLINE_USERS",
        BOOLEAN,
        False,
        "No current SDK needs inlined users.",
        support=NO_EFFECT,
    )
    max_inbound_payload_size: int = option(
        "EVENTS_MAX_INBOUND_PAYLOAD_SIZE",
        SIZE,
        0,
        "Maximum size of an event payload after decompression. Not set: 32 MiB.",
        "10MiB",
    )
    spool_dir: str = option(
        "EVENTS_SPOOL_DIR",
        PATH,
        "",
        "Directory where accepted events are kept until delivery, so that they survive a restart."
        " Not set: they are kept in memory.",
        "/data/events",
    )


@section
class Webhook(Struct, frozen=True):
    """`[Webhook]`: LaunchDarkly webhooks that announce changes, at `/webhooks/launchdarkly`."""

    secret: Secret = option(
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


@section
class Redis(Struct, frozen=True):
    """`[Redis]`: Redis or Valkey server that the relay keeps up to date for SDKs in daemon mode.

    In a file, `url`, `host`, `port` or `sentinels` enables it; with variables, `USE_REDIS=true`
    does.
    """

    url: str = option(
        "REDIS_URL",
        REDIS_URIS,
        "",
        "URL of the form `redis://[user[:password]@]host[:port][/database]`; for a cluster a list"
        " of some of its servers. The variable requires `USE_REDIS=true`.",
        "redis://localhost:6379",
    )
    host: str = option(
        "REDIS_HOST",
        STRING,
        "",
        "Host, instead of `url`; default `localhost`. For a cluster a list of some of its servers,"
        " as `host` or `host:port`.",
        "localhost",
    )
    port: int = option("REDIS_PORT", INTEGER, 0, "Port, instead of `url`; default 6379.", "6379")
    database: int = option(
        "REDIS_DATABASE", COUNT, 0, "Number of the database, instead of in `url`.", "1"
    )
    cluster: bool = option(
        "REDIS_CLUSTER",
        BOOLEAN,
        False,
        "The servers are a Redis Cluster: the keys are divided between its masters, and each"
        " server knows the others. A prefix with a hash tag, such as `{production}`, keeps the"
        " keys of an environment together.",
    )
    sentinels: tuple[str, ...] = option(
        "REDIS_SENTINELS",
        ADDRESSES,
        (),
        "Redis Sentinels as `host` or `host:port` (default 26379), which name the server, instead"
        " of `url`, `host` and `port`.",
        "sentinel-1:26379,sentinel-2:26379",
    )
    sentinel_master: str = option(
        "REDIS_SENTINEL_MASTER",
        STRING,
        "",
        "Name under which the Sentinels know the server.",
        "mymaster",
    )
    sentinel_username: str = option(
        "REDIS_SENTINEL_USERNAME",
        STRING,
        "",
        "Name of the ACL user at the Sentinels.",
        "relay",
    )
    sentinel_password: Secret = option(
        "REDIS_SENTINEL_PASSWORD",
        SECRET,
        Secret(""),
        "Password of that user or of the Sentinels.",
        "a-long-random-text",
    )
    sentinel_tls: bool = option(
        "REDIS_SENTINEL_TLS", BOOLEAN, False, "Use TLS for the Sentinels, too."
    )
    tls: bool = option("REDIS_TLS", BOOLEAN, False, "Use TLS, like `rediss://`.")
    username: str = option("REDIS_USERNAME", STRING, "", "Name of the Redis ACL user.", "relay")
    password: Secret = option(
        "REDIS_PASSWORD",
        SECRET,
        Secret(""),
        "Password of the user or the server.",
        "a-long-random-text",
    )
    identity: str = option(
        "REDIS_IDENTITY",
        one_of("aws", "gcp"),
        "",
        "Cloud whose tokens take the place of `password`: `aws` (IAM of ElastiCache and MemoryDB) or"
        " `gcp` (IAM of Memorystore). Requires TLS.",
        "aws",
    )
    iam_cache: str = option(
        "REDIS_IAM_CACHE",
        STRING,
        "",
        "With `identity = aws`: name of the cache, the replication group or the MemoryDB cluster.",
        "flags",
    )
    iam_service: str = option(
        "REDIS_IAM_SERVICE",
        one_of("elasticache", "elasticache-serverless", "memorydb"),
        "elasticache",
        "With `identity = aws`: `elasticache`, `elasticache-serverless` or `memorydb`.",
    )
    iam_region: str = option(
        "REDIS_IAM_REGION",
        STRING,
        "",
        "With `identity = aws`: region of the cache. Not set: that of AWS's variables and files.",
        "eu-central-1",
    )
    local_ttl: float = option(
        "CACHE_TTL",
        DURATION,
        30.0,
        "The relay serves from memory and never from the database, so nothing is cached for a"
        " time.",
        support=NO_EFFECT,
    )
    client_certificate_file: str = option(
        "REDIS_CLIENT_CERT_FILE",
        PATH,
        "",
        "PEM file with the client certificate; requires `clientKeyFile`.",
        "/etc/relay/tls/redis-client.pem",
    )
    client_key_file: str = option(
        "REDIS_CLIENT_KEY_FILE",
        PATH,
        "",
        "PEM file with the private key of the client certificate.",
        "/etc/relay/tls/redis-client-key.pem",
    )
    ca_file: str = option(
        "REDIS_CA_FILE",
        PATH,
        "",
        "PEM file with the CA certificates to trust instead of the system's.",
        "/etc/relay/tls/redis-ca.pem",
    )
    atomic_upsert: bool = option(
        "REDIS_ATOMIC_UPSERT",
        BOOLEAN,
        False,
        "Updates are always atomic.",
        support=NO_EFFECT,
    )
    connect_timeout: float = option(
        "REDIS_CONNECT_TIMEOUT", DURATION, 5.0, "Timeout for connecting to the server."
    )
    read_timeout: float = option(
        "REDIS_READ_TIMEOUT", DURATION, 10.0, "Timeout for a reply from the server."
    )


@section
class Consul(Struct, frozen=True):
    """`[Consul]`: Consul server that the relay keeps up to date for SDKs in daemon mode.

    In a file, `host` enables it; with variables, `USE_CONSUL=true` does. The variables of Consul's
    own client for tokens, TLS and namespaces apply, too.
    """

    host: str = option(
        "CONSUL_HOST",
        CONSUL_ADDRESS,
        "",
        "Host, optionally with port (default 8500) and path; or an `http://`, `https://` or"
        " `unix://` URL.",
        "localhost:8500",
    )
    token: Secret = option(
        "CONSUL_TOKEN", SECRET, Secret(""), "Access token.", "a-long-random-text"
    )
    token_file: str = option(
        "CONSUL_TOKEN_FILE",
        PATH,
        "",
        "File with the access token; it is read again when it changes.",
        "/etc/relay/consul-token",
    )
    max_value_size: int = option(
        "CONSUL_MAX_VALUE_SIZE",
        SIZE,
        512 * 1024,
        "Maximum size of a flag or segment that the server accepts: its `limits.kv_max_value_size`."
        " Larger ones are reported, and served from memory only.",
    )
    local_ttl: float = option(
        "CACHE_TTL", DURATION, 30.0, "See `[Redis]` `localTtl`.", support=NO_EFFECT
    )


@section
class DynamoDB(Struct, frozen=True):
    """`[DynamoDB]`: DynamoDB table that the relay keeps up to date for SDKs in daemon mode.

    The table must exist: partition key `namespace`, sort key `key`, both strings. Region and
    credentials are found as by all of AWS's tools.
    """

    enabled: bool = option("USE_DYNAMODB", BOOLEAN, False, "Keep a DynamoDB table up to date.")
    table_name: str = option(
        "DYNAMODB_TABLE",
        STRING,
        "",
        "Table for environments without one of their own.",
        "flags",
    )
    url: str = option(
        "DYNAMODB_URL",
        HTTP_URI,
        "",
        "URL of the DynamoDB service. Not set: that of AWS.",
        "http://localhost:8000",
    )
    local_ttl: float = option(
        "CACHE_TTL", DURATION, 30.0, "See `[Redis]` `localTtl`.", support=NO_EFFECT
    )


@section
class Fleet(Struct, frozen=True):
    """`[Fleet]`: relays that share a Redis listen to LaunchDarkly once, and serve the same."""

    enabled: bool = option(
        "FLEET",
        BOOLEAN,
        False,
        "Elect, over the configured Redis and for each environment, the relay that listens to"
        " LaunchDarkly; the others follow it.",
    )


@section
class Publish(Struct, frozen=True):
    """`[Publish]`: each environment as one document, for functions, edge SDKs and other relays."""

    to: tuple[str, ...] = option(
        "PUBLISH_TO",
        DOCUMENT_URIS,
        (),
        "Where documents are published: `file:///FOLDER`, `s3://BUCKET/PREFIX`, or `https://…{key}`"
        " for a key-value store, in which `{key}` stands for `LD-Env-` and the client-side ID.",
        "s3://flags/production",
    )
    token: Secret = option(
        "PUBLISH_TOKEN",
        SECRET,
        Secret(""),
        "Bearer token for `https` URLs that have no user and password of their own.",
        "a-long-random-text",
    )


@section
class Proxy(Struct, frozen=True):
    """`[Proxy]`: HTTP proxy and CA certificates for requests to LaunchDarkly."""

    url: str = option(
        "PROXY_URL",
        HTTP_URI,
        "",
        "URL of the HTTP proxy for all requests to LaunchDarkly; may contain `user:password@`. Not"
        " set: the variables HTTP_PROXY, HTTPS_PROXY and NO_PROXY apply.",
        "http://proxy.example.com:3128",
    )
    ca_cert_files: tuple[str, ...] = option(
        "PROXY_CA_CERTS",
        PATHS,
        (),
        "PEM files with CA certificates to trust in addition to the system's.",
        "/etc/relay/tls/company-ca.pem",
    )
    ntlm_auth: bool = option(
        "PROXY_AUTH_NTLM", BOOLEAN, False, "Authenticate to the proxy with NTLM.", support=REFUSED
    )
    user: str = option(
        "PROXY_AUTH_USER", STRING, "", "Used for NTLM only.", "relay", support=NO_EFFECT
    )
    password: Secret = option(
        "PROXY_AUTH_PASSWORD",
        SECRET,
        Secret(""),
        "Used for NTLM only.",
        "a-long-random-text",
        support=NO_EFFECT,
    )
    domain: str = option(
        "PROXY_AUTH_DOMAIN", STRING, "", "Used for NTLM only.", "EXAMPLE", support=NO_EFFECT
    )


@section
class Http(Struct, frozen=True):
    """`[Http]`: response compression and connections to LaunchDarkly."""

    enable_compression: bool = option(
        "HTTP_ENABLE_COMPRESSION",
        BOOLEAN,
        False,
        "Poll responses are always compressed if the client accepts that, streams never.",
        support=NO_EFFECT,
    )
    idle_conn_timeout: float = option(
        "HTTP_IDLE_CONN_TIMEOUT", DURATION, 90.0, "How long an idle connection is kept open."
    )
    max_idle_conns: int = option(
        "HTTP_MAX_IDLE_CONNS",
        INTEGER,
        100,
        "An environment needs only one connection.",
        support=NO_EFFECT,
    )
    max_idle_conns_per_host: int = option(
        "HTTP_MAX_IDLE_CONNS_PER_HOST",
        INTEGER,
        2,
        "An environment needs only one connection.",
        support=NO_EFFECT,
    )
    disable_keep_alives: bool = option(
        "HTTP_DISABLE_KEEPALIVE", BOOLEAN, False, "Open a new connection for each request."
    )


@section
class Prometheus(Struct, frozen=True):
    """`[Prometheus]`: metrics for a Prometheus server."""

    enabled: bool = option(
        "USE_PROMETHEUS",
        BOOLEAN,
        False,
        "Serve metrics on a separate port, including those of ld-relay under their original names.",
    )
    port: int = option(
        "PROMETHEUS_PORT", INTEGER, 8031, "Port for metrics, on all interfaces, without TLS."
    )
    prefix: str = option(
        "PROMETHEUS_PREFIX",
        STRING,
        "launchdarkly_relay",
        "Name prefix of ld-relay's metrics.",
    )


# Of the environments that a list names, be it an archive or LaunchDarkly's.
_ENV_DATASTORE_PREFIX = option(
    "ENV_DATASTORE_PREFIX",
    STRING,
    "",
    "Prefix of database keys; `$CID` stands for the client-side ID.",
    "ld-$CID",
)
_ENV_DATASTORE_TABLE_NAME = option(
    "ENV_DATASTORE_TABLE_NAME",
    STRING,
    "",
    "DynamoDB table; `$CID` stands for the client-side ID.",
    "ld-$CID",
)
_ENV_ALLOWED_ORIGIN = option(
    "ENV_ALLOWED_ORIGIN",
    ORIGINS,
    (),
    "Allowed CORS origins of every environment.",
    "https://shop.example.com",
)
_ENV_ALLOWED_HEADER = option(
    "ENV_ALLOWED_HEADER",
    HEADER_NAMES,
    (),
    "Allowed CORS request headers of every environment.",
    "Timestamp-Valid",
)


@section
class OfflineMode(Struct, frozen=True):
    """`[OfflineMode]`: flags and environments from an archive exported by LaunchDarkly."""

    file_data_source: str = option(
        "FILE_DATA_SOURCE",
        PATH,
        "",
        "Path of the archive; enables offline mode.",
        "/data/archive.tar.gz",
    )
    file_data_source_monitoring_interval: float = option(
        "FILE_DATA_SOURCE_MONITORING_INTERVAL",
        DURATION,
        1.0,
        "Interval between checks of the archive for changes.",
    )
    env_datastore_prefix: str = _ENV_DATASTORE_PREFIX
    env_datastore_table_name: str = _ENV_DATASTORE_TABLE_NAME
    env_allowed_origin: tuple[str, ...] = _ENV_ALLOWED_ORIGIN
    env_allowed_header: tuple[str, ...] = _ENV_ALLOWED_HEADER


@section
class EnvironmentConfig(Struct, frozen=True):
    """`[Environment "NAME"]`: one environment. Its variables end with its name, verbatim."""

    name: str = ""
    """Name of the subsection, or suffix of the variables."""
    sdk_key: Secret = option(
        "LD_ENV_",
        KEY,
        Secret(""),
        "SDK key; required. With variables, an environment exists if this one is set.",
        "sdk-00000000-0000-0000-0000-000000000000",
    )
    mobile_key: Secret = option(
        "LD_MOBILE_KEY_",
        KEY,
        Secret(""),
        "Mobile key; admits mobile SDKs.",
        "mob-00000000-0000-0000-0000-000000000000",
    )
    env_id: str = option(
        "LD_CLIENT_SIDE_ID_",
        ENVIRONMENT_ID,
        "",
        "Client-side ID; admits browser SDKs, and is sent to all SDKs.",
        "000000000000000000000000",
    )
    prefix: str = option(
        "LD_PREFIX_",
        STRING,
        "",
        "Prefix of its keys in the database; default `launchdarkly`. Required if there are several"
        " environments.",
        "production",
    )
    table_name: str = option(
        "LD_TABLE_NAME_",
        STRING,
        "",
        "DynamoDB table for this environment.",
        "flags-production",
    )
    ttl: float = option(
        "LD_TTL_", DURATION, 0.0, "How long HTTP caches may keep poll responses; 0 = not at all."
    )
    secure_mode: bool = option(
        "LD_SECURE_MODE_",
        BOOLEAN,
        False,
        "Require browser SDKs to send the secure-mode hash of their context.",
    )
    eval_streams: bool | None = option(
        "LD_EVAL_STREAMS_",
        BOOLEAN,
        None,
        "Send evaluated flags (`true`) or pings (`false`) on client-side streams; default `[Main]"
        " evalStreams`.",
        "false",
    )
    allowed_origin: tuple[str, ...] = option(
        "LD_ALLOWED_ORIGIN_",
        ORIGINS,
        (),
        "Allowed CORS origins, such as `https://shop.example.com`, without wildcards; none or `*`"
        " allows all.",
        "https://shop.example.com,https://www.example.com",
    )
    allowed_header: tuple[str, ...] = option(
        "LD_ALLOWED_HEADER_",
        HEADER_NAMES,
        (),
        "Allowed CORS request headers in addition to the standard ones.",
        "Timestamp-Valid,Random-Id-Valid",
    )
    log_level: str = option(
        "LD_LOG_LEVEL_",
        LOG_LEVEL,
        "",
        "Log level for this environment; default `[Main] logLevel`.",
        "debug",
    )
    proj_key: str = option(
        "LD_PROJ_KEY_", STRING, "", "Key of the environment's LaunchDarkly project.", "shop"
    )
    env_key: str = option(
        "LD_ENV_KEY_",
        STRING,
        "",
        "Key of the environment within its project, as webhooks name it.",
        "production",
    )
    filter_key: str = option(
        "",
        STRING,
        "",
        "Key of a payload filter: the environment has this part of the data only, and its SDKs ask"
        " for `?filter=KEY`.",
        "microservice-1",
    )
    offline: bool = option(
        "", BOOLEAN, False, "Internal to ld-relay; operators never set it.", support=NO_EFFECT
    )


@section
class AutoConfig(Struct, frozen=True):
    """`[AutoConfig]`: environments configured by LaunchDarkly instead of by this file."""

    key: Secret = option(
        "AUTO_CONFIG_KEY",
        KEY,
        Secret(""),
        "Automatic configuration key; enables automatic configuration.",
        "rel-00000000-0000-0000-0000-000000000000",
    )
    env_datastore_prefix: str = _ENV_DATASTORE_PREFIX
    env_datastore_table_name: str = _ENV_DATASTORE_TABLE_NAME
    env_allowed_origin: tuple[str, ...] = _ENV_ALLOWED_ORIGIN
    env_allowed_header: tuple[str, ...] = _ENV_ALLOWED_HEADER
    cache_key: str = option(
        "AUTO_CONFIG_CACHE_KEY",
        STRING,
        "",
        "Database key under which the list of environments is stored, encrypted, for a start"
        " without LaunchDarkly; in Redis it is the whole key, in DynamoDB the `namespace` in the"
        " table `tableName`. Requires Redis or DynamoDB. Not set: it is stored in `snapshotDir`"
        " only.",
        "relay-environments",
    )
    cache_encryption_key: Secret = option(
        "AUTO_CONFIG_CACHE_ENCRYPTION_KEY",
        SECRET,
        Secret(""),
        "Text that encrypts what is stored under `cacheKey`; all relays that share it need the"
        " same. Not set: the automatic configuration key is used.",
        "a-long-random-text",
    )


@section
class Filters(Struct, frozen=True):
    """`[Filters "PROJKEY"]`: payload filters of a project. The variable ends with its key."""

    keys: tuple[str, ...] = option(
        "LD_FILTER_KEYS_",
        LIST,
        (),
        "Keys of the payload filters; each adds a variant of every environment of the"
        " project, with a part of its data.",
        "microservice-1,microservice-2",
    )


SECTIONS: dict[str, type] = {
    "Main": Main,
    "Events": Events,
    "Redis": Redis,
    "Consul": Consul,
    "DynamoDB": DynamoDB,
    "Fleet": Fleet,
    "Publish": Publish,
    "Proxy": Proxy,
    "Http": Http,
    "Webhook": Webhook,
    "Prometheus": Prometheus,
    "Concurrency": Concurrency,
    "AutoConfig": AutoConfig,
    "OfflineMode": OfflineMode,
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
        environments: in configuration order, without the variants of `filters`.
        filters: payload filters by project key.
        redis: None if Redis is not configured; otherwise `redis.url` is complete, unless there are
            Sentinels.
        consul: None if Consul is not configured.
        dynamodb: None if DynamoDB is not enabled.
        sources: source of each option that was set, `FILE:LINE` or the variable, by
            `Section.attribute` or `Environment "NAME".attribute`.
        warnings: messages for the operator, such as on options without effect.
        certificate: digest of the server's certificate and its key, by which a renewal is noticed;
            empty without TLS.
        files: paths of all files that were read, also of those that do not exist.
    """

    main: Main = Main()
    events: Events = Events()
    environments: tuple[EnvironmentConfig, ...] = ()
    filters: dict[str, Filters] = field(default_factory=dict)
    redis: Redis | None = None
    consul: Consul | None = None
    dynamodb: DynamoDB | None = None
    fleet: Fleet = Fleet()
    publish: Publish = Publish()
    proxy: Proxy = Proxy()
    http: Http = Http()
    webhook: Webhook = Webhook()
    prometheus: Prometheus = Prometheus()
    offline_mode: OfflineMode = OfflineMode()
    auto_config: AutoConfig = AutoConfig()
    sources: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    certificate: str = ""
    files: tuple[str, ...] = ()

    @property
    def uses_launchdarkly(self) -> bool:
        """True if environments come from LaunchDarkly, False if all there is is a flags file."""
        return bool(self.environments or self.auto_config.key)

    @property
    def all_environments(self) -> tuple[EnvironmentConfig, ...]:
        """The environments, each followed by its variants."""
        return with_variants(self.environments, self.filters)


def with_variants(
    environments: Iterable[EnvironmentConfig], filters: Mapping[str, Filters]
) -> tuple[EnvironmentConfig, ...]:
    """Return the environments, each followed by a variant for each payload filter of its project.

    Args:
        environments: in configuration order.
        filters: by project key.
    """
    result: list[EnvironmentConfig] = []
    for each in environments:
        keys = filters[each.proj_key].keys if each.proj_key in filters else ()
        further = [key for key in dict.fromkeys(keys) if key != each.filter_key]
        result += [each, *(_variant(each, key) for key in further)]
    return tuple(result)


def _variant(environment: EnvironmentConfig, key: str) -> EnvironmentConfig:
    # ld-relay keeps an empty prefix: all variants would then overwrite each other (config 3.5).
    return replace(
        environment,
        name=f"{environment.name}/{key}",
        filter_key=key,
        prefix=f"{environment.prefix or DEFAULT_PREFIX}/{key}",
    )


@cache
def options(name: str) -> tuple[Option, ...]:
    """Return the options of a section, in declaration order."""
    return declared(name, SECTIONS.get(name) or NAMED_SECTIONS[name])
