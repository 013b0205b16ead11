"""Check options against each other (config 3.5), and collect warnings for the operator. Pure.

Each rule yields diagnostics, in ld-relay's words where it has the same rule, with the options that
they concern, so that each message can name the source of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeVar, cast
from urllib.parse import urlsplit

from msgspec import Struct
from msgspec.structs import replace

from relay.config.options import Option, Support
from relay.config.schema import (
    AutoConfig,
    Consul,
    DynamoDB,
    EnvironmentConfig,
    Events,
    Filters,
    Fleet,
    Main,
    OfflineMode,
    Prometheus,
    Proxy,
    Publish,
    Redis,
    Webhook,
    options,
    with_variants,
)
from relay.model.environment import DEFAULT_PREFIX
from relay.model.text import one_line
from relay.protocol.redisurl import redis_urls

ENVIRONMENT, FILTERS = "Environment", "Filters"

SHARED = ("env_datastore_prefix", "env_datastore_table_name", "env_allowed_origin",
          "env_allowed_header")  # fmt: skip
"""Options that `[AutoConfig]` and `[OfflineMode]` share, including their variables."""

METRICS_INSTEAD = "; the relay's metrics are at /metrics, for Prometheus"
_METRICS_ELSEWHERE = ("Datadog", "Stackdriver", "OpenTelemetry")

MAX_PORT = 65535
_OLD_BASE_URI = "https://app.launchdarkly.com"
_CLIENT_SIDE_BASE_URI = "https://clientsdk.launchdarkly.com"
_MIN_CLEANUP_INTERVAL = 0.1
_MIN_MONITORING_INTERVAL = 0.1
_MIN_POLL_INTERVAL = 1.0
_MIN_METRICS_CAPACITY = 1000
_METRIC_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")
_KEY = "{key}"
_REDIS_SCHEMES = ("redis", "rediss", "unix")
_REDIS_PORT = 6379
_OF_SENTINELS = {
    "sentinel_username": "sentinelUsername",
    "sentinel_password": "sentinelPassword",
    "sentinel_tls": "sentinelTls",
}

Key = tuple[str, str | None, str]
"""Section, name of the subsection, attribute; an empty attribute stands for the section itself."""

MAX_WORKERS = 256
"""More are a mistake: each is a process."""

Diagnostic = tuple[str, tuple[Key, ...]]
"""A message, and the options that it concerns."""

T = TypeVar("T")


class Draft(Struct, frozen=True):
    """Merged options of file and environment, not yet validated.

    Args:
        sections: the unnamed sections, by class.
        environments: in configuration order.
        filters: by project key.
        sources: source of each option that was set.
        unusable: options whose value was already rejected.
    """

    sections: Mapping[type, object]
    environments: tuple[EnvironmentConfig, ...]
    filters: Mapping[str, Filters]
    sources: Mapping[Key, str]
    unusable: AbstractSet[Key] = frozenset()

    def of(self, section: type[T]) -> T:
        """Return a section."""
        return cast("T", self.sections[section])

    def options_with(self, support: Support) -> Iterator[tuple[str, Option, Key]]:
        """Yield the name, declaration and key of each option not set to its default."""
        for key in self.sources:
            section, name, attribute = key
            option = next((o for o in options(section) if o.attribute == attribute), None)
            if option and option.support is support and self._value(key) != option.default:
                label = section if name is None else f'{section} "{name}"'
                yield f"[{label}] {option.name}", option, key

    def _value(self, key: Key) -> object:
        section, name, attribute = key
        if section == ENVIRONMENT:
            owner: object = next(each for each in self.environments if each.name == name)
        elif section == FILTERS:
            owner = self.filters[name or ""]
        else:
            owner = next(s for c, s in self.sections.items() if c.__name__ == section)
        return getattr(owner, attribute)

    def with_sources(self, diagnostic: Diagnostic) -> str:
        """Return the message of a diagnostic with the sources of its options."""
        text, keys = diagnostic
        sources = dict.fromkeys(self.sources[key] for key in keys if key in self.sources)
        return f"{text} ({', '.join(sources)})" if sources else text


def problems(draft: Draft) -> list[str]:
    """Return every error that keeps the relay from starting."""
    rules = (
        _refused,
        _main,
        _events,
        _webhook,
        _auto_config,
        _offline_mode,
        _environments,
        _filters,
        _redis,
        _consul,
        _dynamodb,
        _databases,
        _fleet,
        _publish,
        _bootstrap,
        _document_names,
        _proxy,
        _prometheus,
    )
    return [draft.with_sources(diagnostic) for rule in rules for diagnostic in rule(draft)]


def warnings(draft: Draft) -> list[str]:
    """Return warnings for the operator; they do not keep the relay from starting."""
    rules = (
        _later,
        _no_effect,
        _ineffective,
        _ineffective_iam,
        _events_in_memory,
        _list_in_memory,
        _half_of_upstream,
        _prefixless_environment,
        _archive_without_prefix,
        _duplicates,
        _raised_to_minimum,
    )
    return [draft.with_sources(diagnostic) for rule in rules for diagnostic in rule(draft)]


def main_of(draft: Draft) -> Main:
    """Return `[Main]` with the base URLs that derive from others."""
    main = draft.of(Main)
    default = Main().base_uri
    configured = main.base_uri.rstrip("/")
    base = default if configured in (default, _OLD_BASE_URI) else main.base_uri
    client_side = main.client_side_base_uri
    if not client_side:
        client_side = _CLIENT_SIDE_BASE_URI if base == default else base
    return replace(main, base_uri=base, client_side_base_uri=client_side)


def events_of(draft: Draft) -> Events:
    """Return `[Events]` with `metricsCapacity` raised to its minimum."""
    events = draft.of(Events)
    capacity = max(events.metrics_capacity, _MIN_METRICS_CAPACITY)
    return replace(events, metrics_capacity=capacity)


def redis_of(draft: Draft) -> Redis | None:
    """Return `[Redis]` with a complete URL; None if Redis is not configured."""
    redis = draft.of(Redis)
    if not _uses_redis(redis):
        return None
    if redis.sentinels:
        return redis
    urls = redis_urls(redis.url) if redis.url else _urls_of_hosts(redis)
    if redis.tls:
        urls = tuple(re.sub("^redis://", "rediss://", url) for url in urls)
    return replace(redis, url=",".join(urls))


def _urls_of_hosts(redis: Redis) -> tuple[str, ...]:
    """Return the URLs of the hosts; in a cluster each may have a port of its own."""
    port = redis.port or _REDIS_PORT
    hosts = redis.host.split(",") if redis.cluster else [redis.host or "localhost"]
    own = re.compile(r".+(?<!:):[0-9]+") if redis.cluster else re.compile("$^")
    return tuple(
        f"redis://{host}" if own.fullmatch(host) else f"redis://{host}:{port}"
        for host in map(str.strip, hosts)
    )


def consul_of(draft: Draft) -> Consul | None:
    """Return `[Consul]`; None if Consul is not configured."""
    consul = draft.of(Consul)
    return consul if consul.host else None


def dynamodb_of(draft: Draft) -> DynamoDB | None:
    """Return `[DynamoDB]`; None if it is not enabled."""
    dynamodb = draft.of(DynamoDB)
    return dynamodb if dynamodb.enabled else None


def _main_key(*attributes: str) -> tuple[Key, ...]:
    return _keys("Main", *attributes)


def _keys(section: str, *attributes: str) -> tuple[Key, ...]:
    return tuple((section, None, attribute) for attribute in attributes)


def _environment_keys(draft: Draft) -> tuple[Key, ...]:
    return tuple((ENVIRONMENT, each.name, "") for each in draft.environments)


def _refused(draft: Draft) -> Iterator[Diagnostic]:
    for name, option, key in draft.options_with(Support.REFUSED):
        instead = METRICS_INSTEAD if option.section in _METRICS_ELSEWHERE else ""
        yield f"{name} is not supported in this release{instead}", (key,)


def _main(draft: Draft) -> Iterator[Diagnostic]:
    main = draft.of(Main)
    if main.port > MAX_PORT:
        yield f"port must not be greater than {MAX_PORT}", _main_key("port")
    if main.workers > MAX_WORKERS:
        yield f"workers must not be greater than {MAX_WORKERS}", _main_key("workers")
    if main.tls_enabled and not (main.tls_cert and main.tls_key):
        keys = _main_key("tls_enabled", "tls_cert", "tls_key")
        yield "TLS cert and key are required if TLS is enabled", keys
    if main.expired_credential_cleanup_interval < _MIN_CLEANUP_INTERVAL:
        keys = _main_key("expired_credential_cleanup_interval")
        yield "expired credential cleanup interval must be >= 100ms", keys
    if main.poll_interval < _MIN_POLL_INTERVAL:
        yield "poll interval must be >= 1s", _main_key("poll_interval")
    if main.max_client_request_body_size <= 0:
        keys = _main_key("max_client_request_body_size")
        yield "max client request body size must be greater than zero", keys
    if main.max_request_head_size <= 0:
        keys = _main_key("max_request_head_size")
        yield "max request head size must be greater than zero", keys


def _events(draft: Draft) -> Iterator[Diagnostic]:
    key: Key = ("Events", None, "max_inbound_payload_size")
    if key in draft.sources and draft.of(Events).max_inbound_payload_size <= 0:
        yield "max inbound payload size must be greater than zero", (key,)


def _webhook(draft: Draft) -> Iterator[Diagnostic]:
    webhook = draft.of(Webhook)
    if webhook.secret and not webhook.secrets:
        yield "[Webhook] secret consists of commas only", _keys("Webhook", "secret")


def _auto_config(draft: Draft) -> Iterator[Diagnostic]:
    auto = draft.of(AutoConfig)
    keys = _keys("AutoConfig", *(name for name in SHARED if getattr(auto, name)))
    cache = _keys("AutoConfig", "cache_key")
    if auto.cache_key and not (enabled := _enabled_databases(draft)).keys() - {"Consul"}:
        yield "AUTO_CONFIG_CACHE_KEY requires Redis or DynamoDB to be enabled", cache
    elif auto.cache_key and "Redis" not in enabled and not draft.of(DynamoDB).table_name:
        text = "the list of environments needs a table in DynamoDB; [DynamoDB] tableName names it"
        yield f"AUTO_CONFIG_CACHE_KEY: {text}", cache
    if not auto.key and (keys or auto.cache_key):
        keys = (*keys, *(cache if auto.cache_key else ()))
        text = "must specify auto-configuration key if other auto-configuration properties are set"
        yield text, keys
    if not auto.key:
        return
    if draft.environments:
        text = "cannot configure specific environments if auto-configuration is enabled"
        yield text, (*_keys("AutoConfig", "key"), *_environment_keys(draft))
    if draft.of(OfflineMode).file_data_source:
        text = "cannot specify both auto-configuration key and file data source"
        yield text, (*_keys("AutoConfig", "key"), *_keys("OfflineMode", "file_data_source"))


def _offline_mode(draft: Draft) -> Iterator[Diagnostic]:
    offline = draft.of(OfflineMode)
    interval = _keys("OfflineMode", "file_data_source_monitoring_interval")
    is_interval_set = interval[0] in draft.sources
    keys = _keys("OfflineMode", *(name for name in SHARED if getattr(offline, name)))
    keys += interval if is_interval_set else ()
    if not offline.file_data_source and keys:
        text = "must specify offline mode filename if other offline mode properties are set"
        yield text, keys
    if offline.file_data_source and draft.environments:
        text = "cannot configure specific environments if offline mode is enabled"
        yield text, (*_keys("OfflineMode", "file_data_source"), *_environment_keys(draft))
    if offline.file_data_source_monitoring_interval < _MIN_MONITORING_INTERVAL:
        yield "file data source monitoring interval must be >= 100ms", interval


def _environments(draft: Draft) -> Iterator[Diagnostic]:
    for each in draft.environments:
        if not each.sdk_key and (ENVIRONMENT, each.name, "sdk_key") not in draft.unusable:
            text = f'SDK key is required for environment "{each.name}"'
            yield text, ((ENVIRONMENT, each.name, ""),)
        if (name := one_line(each.name)) != each.name:
            text = f'the name of environment "{name}" has control characters'
            yield text, ((ENVIRONMENT, each.name, ""),)


def _filters(draft: Draft) -> Iterator[Diagnostic]:
    if not draft.filters:
        return
    sections = tuple((FILTERS, project, "") for project in draft.filters)
    if draft.of(AutoConfig).key:
        yield "cannot configure filters if auto-configuration is enabled", sections
        return
    lacking = tuple((ENVIRONMENT, e.name, "") for e in draft.environments if not e.proj_key)
    if lacking:
        yield "when filters are configured, all environments must specify a 'projKey'", lacking
        return
    used = {each.proj_key for each in draft.environments}
    for project, filters in draft.filters.items():
        section = ((FILTERS, project, ""),)
        if project not in used:
            text = f"filters are configured for project '{project}', but no environment references"
            yield f"{text} that project", section
        if not filters.keys:
            yield f"filter key list for project '{project}' cannot be empty", section
        for i, key in enumerate(filters.keys):
            if not key:
                text = f"filter key [{i}] for project '{project}' is malformed"
                yield f"{text} (note: lists are comma-delimited)", section
    yield from _ambiguous_variants(draft)


def _ambiguous_variants(draft: Draft) -> Iterator[Diagnostic]:
    """Report variants that have the name of another environment or variant."""
    seen: set[str] = set()
    for each in with_variants(draft.environments, draft.filters):
        if each.name in seen:
            text = f'there are two environments "{each.name}": a filter\'s key follows the name'
            yield text, ((ENVIRONMENT, each.name, ""),)
        seen.add(each.name)


def _uses_redis(redis: Redis) -> bool:
    return bool(redis.url or redis.host or redis.port or redis.sentinels)


def _fleet(draft: Draft) -> Iterator[Diagnostic]:
    if not draft.of(Fleet).enabled:
        return
    if redis_of(draft) is None:
        yield "[Fleet] enabled: a fleet needs Redis", _keys("Fleet", "enabled")
    if draft.of(Main).exit_always:
        text = "[Fleet] enabled: a relay that exits cannot take part in a fleet"
        yield text, _keys("Fleet", "enabled")


def _redis(draft: Draft) -> Iterator[Diagnostic]:
    configured, redis = draft.of(Redis), redis_of(draft)
    if redis is None:
        return
    if redis.sentinels:
        yield from _sentinels(redis)
    else:
        yield from _redis_address(draft, redis)
    if bool(configured.client_certificate_file) != bool(configured.client_key_file):
        keys = _keys("Redis", "client_certificate_file", "client_key_file")
        yield "a Redis client certificate needs a key, and a key a certificate", keys
    if redis.identity:
        yield from _identity(redis)


def _identity(redis: Redis) -> Iterator[Diagnostic]:
    """Report what is wrong where tokens of a cloud take the place of passwords."""
    label, key = f"[Redis] identity: {redis.identity}", _keys("Redis", "identity")
    scheme, _, rest = redis.url.partition("://")
    if redis.sentinels:
        keys = (*key, *_keys("Redis", "sentinels"))
        yield f"{label} does not go with Sentinels, as the cloud has none", keys
    elif scheme != "rediss":
        keys = (*key, *_keys("Redis", "url", "tls"))
        yield f"{label} needs TLS, as in rediss:// or with tls", keys
    if redis.password or "@" in rest:
        keys = (*key, *_keys("Redis", "password", "url"))
        yield f"{label} takes the place of a password, so there must not be one", keys
    if redis.identity == "aws" and not (redis.username and redis.iam_cache):
        keys = (*key, *_keys("Redis", "username", "iam_cache"))
        yield f"{label} needs username and iamCache", keys


def _sentinels(redis: Redis) -> Iterator[Diagnostic]:
    sentinels = _keys("Redis", "sentinels")
    if not redis.sentinel_master:
        text = "[Redis] sentinels need sentinelMaster, the name under which they know the server"
        yield text, sentinels
    if redis.cluster:
        text = "please specify [Redis] cluster or sentinels, but not both: a cluster has none"
        yield text, _keys("Redis", "cluster", "sentinels")
    if redis.url or redis.host or redis.port:
        text = "[Redis] sentinels name the server: url, host and port must not be specified, too"
        yield text, _keys("Redis", "sentinels", "url", "host", "port")


def _redis_address(draft: Draft, redis: Redis) -> Iterator[Diagnostic]:
    """Report what is wrong with the URL, or the URLs, that are given or made of host and port."""
    configured, address = draft.of(Redis), _keys("Redis", "url", "host", "port")
    urls = redis_urls(redis.url)
    places = [_scheme_and_host(url) for url in urls]
    if configured.url and (configured.host or configured.port):
        yield "please specify Redis URL or host/port, but not both", address
    elif any(scheme not in _REDIS_SCHEMES for scheme, _ in places):
        yield "invalid Redis URL: it must begin with redis:// or rediss://", address
    elif not all(host or scheme == "unix" for scheme, host in places):
        yield "invalid Redis hostname", address
    elif redis.cluster:
        yield from _cluster(redis, urls)
    elif len(urls) > 1:
        yield "[Redis] a list of servers is for a cluster; cluster = true makes it one", address
    if redis.database and any(_database_in(url) for url in urls):
        text = "please specify the Redis database in the URL or as [Redis] database, but not both"
        yield text, _keys("Redis", "database", "url")
    if redis.sentinel_master and ("Redis", None, "sentinels") not in draft.unusable:
        text = "[Redis] sentinelMaster has no sentinels to name it"
        yield text, _keys("Redis", "sentinel_master")


def _cluster(redis: Redis, urls: Sequence[str]) -> Iterator[Diagnostic]:
    if any(url.startswith("unix:") for url in urls):
        yield "[Redis] a cluster has no Unix socket", _keys("Redis", "cluster", "url")
    elif redis.database or any(_database_in(url).strip("0") for url in urls):
        text = "[Redis] a cluster has no databases but number 0"
        yield text, _keys("Redis", "cluster", "database", "url")
    elif len({_without_place(url) for url in urls}) > 1:
        text = "[Redis] the servers of a cluster differ in host and port only"
        yield text, _keys("Redis", "url")


def _database_in(url: str) -> str:
    """Return the number of the database that the URL of a server names."""
    parts = urlsplit(url)
    return "" if parts.scheme == "unix" else parts.path.strip("/")


def _without_place(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[0]).geturl()


def _scheme_and_host(url: str) -> tuple[str, str]:
    """Return scheme and host of a URL; the host is empty if it or the port is invalid."""
    scheme, _, _ = url.partition(":")
    if re.search(r"\s", url):
        return scheme, ""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return scheme, ""
    return parts.scheme, parts.hostname or ""


def _consul(draft: Draft) -> Iterator[Diagnostic]:
    consul = draft.of(Consul)
    if consul.token and consul.token_file:
        text = "Consul token must be specified as either an inline value or a file, but not both"
        yield text, _keys("Consul", "token", "token_file")
    if consul.max_value_size <= 0:
        yield "[Consul] maxValueSize must be greater than zero", _keys("Consul", "max_value_size")
    if consul.host:
        yield from _consul_prefixes(draft)


def _consul_prefixes(draft: Draft) -> Iterator[Diagnostic]:
    """Report prefixes whose keys SDKs cannot read, or would read as another environment's."""
    environments = with_variants(draft.environments, draft.filters)
    for each in environments:
        if each.prefix.startswith("/"):
            text = f'environment "{each.name}": a prefix in Consul must not begin with a slash'
            yield text, ((ENVIRONMENT, each.name, "prefix"),)
        for other in environments:
            prefix = other.prefix or DEFAULT_PREFIX
            if f"{each.prefix}/".startswith((f"{prefix}/features/", f"{prefix}/segments/")):
                names = (other.name, each.name)
                text = (
                    f'environment "{each.name}": its prefix "{each.prefix}" is where "{other.name}"'
                    " has its items in Consul"
                )
                yield text, tuple((ENVIRONMENT, name, "prefix") for name in names)


def _dynamodb(draft: Draft) -> Iterator[Diagnostic]:
    dynamodb = draft.of(DynamoDB)
    if not dynamodb.enabled or dynamodb.table_name:
        return
    text = "TableName property must be specified for DynamoDB, either globally or per environment"
    for each in draft.environments:
        if not each.table_name:
            yield text, ((ENVIRONMENT, each.name, ""),)
    auto, offline = draft.of(AutoConfig), draft.of(OfflineMode)
    if auto.key and not auto.env_datastore_table_name:
        yield text, _keys("AutoConfig", "key")
    if offline.file_data_source and not offline.env_datastore_table_name:
        yield text, _keys("OfflineMode", "file_data_source")


def _enabled_databases(draft: Draft) -> dict[str, tuple[Key, ...]]:
    """Return the enabled databases, with the options that enable them."""
    enabled = {}
    if _uses_redis(draft.of(Redis)):
        enabled["Redis"] = _keys("Redis", "url", "host", "port", "sentinels")
    if draft.of(Consul).host:
        enabled["Consul"] = _keys("Consul", "host")
    if draft.of(DynamoDB).enabled:
        enabled["DynamoDB"] = _keys("DynamoDB", "enabled")
    return enabled


def _databases(draft: Draft) -> Iterator[Diagnostic]:
    if not _enabled_databases(draft):
        return
    if len(draft.environments) > 1:
        yield from _without_prefix(draft)
    auto = draft.of(AutoConfig)
    prefix_or_table = auto.env_datastore_prefix
    if _has_tables_only(draft):
        prefix_or_table += auto.env_datastore_table_name
    if auto.key and "$CID" not in prefix_or_table:
        text = (
            "when using auto-configuration with database storage, database prefix (or, if using"
            ' DynamoDB, table name) must be specified and must contain "$CID"'
        )
        yield text, _keys("AutoConfig", "key", *SHARED[:2])


def _has_tables_only(draft: Draft) -> bool:
    """Return whether a table of its own is enough to keep an environment apart."""
    return list(_enabled_databases(draft)) == ["DynamoDB"]


def _without_prefix(draft: Draft) -> Iterator[Diagnostic]:
    tables = _has_tables_only(draft)
    lacking = "a prefix or table name" if tables else "a prefix"
    for each in draft.environments:
        if not each.prefix and not (tables and each.table_name):
            text = f'environment "{each.name}" does not have {lacking} specified for database'
            yield f"{text} storage", ((ENVIRONMENT, each.name, ""),)


def _publish(draft: Draft) -> Iterator[Diagnostic]:
    publish = draft.of(Publish)
    if any(_is_http(url) and _KEY not in url for url in publish.to):
        text = "[Publish] to: an https URL must contain {key}, which stands for the document's name"
        yield text, _keys("Publish", "to")


def _bootstrap(draft: Draft) -> Iterator[Diagnostic]:
    url = draft.of(Main).bootstrap_from
    single = len(with_variants(draft.environments, draft.filters)) == 1
    if _is_http(url) and _KEY not in url and not single:
        text = "[Main] bootstrapFrom: an https URL without {key} names one document only, and there"
        yield f"{text} is not exactly one environment", _main_key("bootstrap_from")


def _document_names(draft: Draft) -> Iterator[Diagnostic]:
    """Report environments that have no client-side ID to name their documents, or share one."""
    keys = (*_keys("Publish", "to"), *_main_key("bootstrap_from"))
    if not draft.of(Publish).to and _KEY not in _with_key(draft.of(Main).bootstrap_from):
        return
    owners: dict[tuple[str, str], str] = {}
    for each in with_variants(draft.environments, draft.filters):
        here = (ENVIRONMENT, each.name, "env_id")
        if not each.env_id:
            text = f'environment "{each.name}" has no client-side ID (envId), which names its'
            yield f"{text} document", (*keys, (ENVIRONMENT, each.name, ""))
        elif (name := (each.env_id, each.filter_key)) in owners:
            text = f'environments "{owners[name]}" and "{each.name}" have the same client-side ID,'
            yield f"{text} which names their document", (*keys, here)
        else:
            owners[name] = each.name


def _with_key(url: str) -> str:
    """Return a URL with `{key}` where that is implied."""
    return url if _is_http(url) or not url else url + _KEY


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _proxy(draft: Draft) -> Iterator[Diagnostic]:
    proxy = draft.of(Proxy)
    if not proxy.ntlm_auth:
        return
    if not proxy.url:
        text = "cannot specify proxy authentication without a proxy URL"
        yield text, _keys("Proxy", "ntlm_auth")
    elif not (proxy.user and proxy.password):
        text = "NTLM proxy authentication requires username and password"
        yield text, _keys("Proxy", "ntlm_auth")


def _prometheus(draft: Draft) -> Iterator[Diagnostic]:
    prometheus = draft.of(Prometheus)
    if prometheus.prefix and not _METRIC_NAME.fullmatch(prometheus.prefix):
        text = "Prometheus prefix must consist of letters, digits and _, and begin with no digit"
        yield text, _keys("Prometheus", "prefix")
    if prometheus.port > MAX_PORT:
        yield f"Prometheus port must not be greater than {MAX_PORT}", _keys("Prometheus", "port")
    if prometheus.enabled and prometheus.port == draft.of(Main).port:
        keys = (*_keys("Prometheus", "port"), *_main_key("port"))
        yield "Prometheus port must not be the port of the relay", keys


def _later(draft: Draft) -> Iterator[Diagnostic]:
    for name, _, key in draft.options_with(Support.LATER):
        yield f"{name} takes effect in a later release", (key,)


def _no_effect(draft: Draft) -> Iterator[Diagnostic]:
    for name, option, key in draft.options_with(Support.NO_EFFECT):
        yield f"{name} has no effect: {option.help.removesuffix('.')}", (key,)


def _events_in_memory(draft: Draft) -> Iterator[Diagnostic]:
    events = draft.of(Events)
    has_environments = draft.environments or draft.of(AutoConfig).key
    if events.send_events and has_environments and not events.spool_dir:
        text = "accepted events wait in memory only; [Events] spoolDir keeps them on disk"
        yield text, _keys("Events", "send_events")


def _list_in_memory(draft: Draft) -> Iterator[Diagnostic]:
    auto, main = draft.of(AutoConfig), draft.of(Main)
    if auto.key and not (auto.cache_key or main.snapshot_dir or main.exit_always):
        text = (
            "the list of environments is not stored, so that a start needs LaunchDarkly;"
            " [Main] snapshotDir or [AutoConfig] cacheKey keeps it"
        )
        yield text, _keys("AutoConfig", "key")


def _half_of_upstream(draft: Draft) -> Iterator[Diagnostic]:
    """Report that only one of the addresses of FDv2 is not LaunchDarkly's."""
    main, default = draft.of(Main), Main()
    if main.data_system != "fdv2" or main.data_source == "polling":
        return
    others = main.stream_uri != default.stream_uri, main.base_uri != default.base_uri
    if any(others) and not all(others):
        text = (
            "[Main] dataSystem = fdv2 streams from streamUri and polls baseUri; only one of them is"
            " another than LaunchDarkly's"
        )
        yield text, (*_main_key("data_system"), *_main_key("stream_uri"), *_main_key("base_uri"))


def _without_launchdarkly(draft: Draft) -> Iterator[Diagnostic]:
    """Yield options that are about LaunchDarkly, where the flags come from elsewhere."""
    if draft.environments or draft.of(AutoConfig).key:
        return
    tail = "has no effect: the flags do not come from LaunchDarkly"
    if draft.of(Main).bootstrap_from:
        yield f"[Main] bootstrapFrom {tail}", _main_key("bootstrap_from")
    if draft.of(Fleet).enabled:
        yield f"[Fleet] enabled {tail}", _keys("Fleet", "enabled")


def _ineffective(draft: Draft) -> Iterator[Diagnostic]:
    main = draft.of(Main)
    if main.flags_file and (draft.environments or draft.of(AutoConfig).key):
        text = "[Main] flagsFile is not served, because environments are configured"
        yield text, _main_key("flags_file")
    offline = draft.of(OfflineMode)
    archive = _keys("OfflineMode", "file_data_source")
    if main.flags_file and offline.file_data_source:
        text = "[Main] flagsFile is not served, because offline mode is enabled"
        yield text, (*_main_key("flags_file"), *archive)
    if main.exit_on_error and not main.exit_always:
        yield "[Main] exitOnError has no effect without exitAlways", _main_key("exit_on_error")
    publish = draft.of(Publish)
    if publish.token and not any(map(_is_http, publish.to)):
        yield "[Publish] token has no effect without an https URL", _keys("Publish", "token")
    if main.bootstrap_token and not _is_http(main.bootstrap_from):
        text = "[Main] bootstrapToken has no effect without an https URL"
        yield text, _main_key("bootstrap_token")
    yield from _without_launchdarkly(draft)
    auto = draft.of(AutoConfig)
    if auto.cache_encryption_key and not auto.cache_key:
        text = "[AutoConfig] cacheEncryptionKey has no effect without cacheKey"
        yield text, _keys("AutoConfig", "cache_encryption_key")
    yield from _ineffective_databases(draft)


def _ineffective_databases(draft: Draft) -> Iterator[Diagnostic]:
    redis = tuple(key for key in draft.sources if key[0] == "Redis")
    if redis and not _uses_redis(draft.of(Redis)):
        yield "[Redis] has no effect without url, host, port or sentinels", redis
    elif not draft.of(Redis).sentinels:
        for key in redis:
            if key[2] in _OF_SENTINELS:
                yield f"[Redis] {_OF_SENTINELS[key[2]]} has no effect without sentinels", (key,)
    consul = tuple(key for key in draft.sources if key[0] == "Consul" and key[2] != "host")
    if consul and not draft.of(Consul).host:
        yield "[Consul] has no effect without host", consul


def _ineffective_iam(draft: Draft) -> Iterator[Diagnostic]:
    keys = _keys("Redis", "iam_cache", "iam_service", "iam_region")
    keys = tuple(key for key in keys if key in draft.sources)
    if keys and draft.of(Redis).identity != "aws":
        yield "[Redis] options of IAM have no effect without identity = aws", keys


def _prefixless_environment(draft: Draft) -> Iterator[Diagnostic]:
    if _enabled_databases(draft) and len(draft.environments) == 1:
        for text, keys in _without_prefix(draft):
            yield f"{text}; this would be an error if multiple environments were configured", keys


def _archive_without_prefix(draft: Draft) -> Iterator[Diagnostic]:
    """Report that the environments of an archive would share a prefix, which ld-relay allows."""
    offline = draft.of(OfflineMode)
    distinct = "$CID" in offline.env_datastore_prefix
    if _has_tables_only(draft):
        distinct |= "$CID" in offline.env_datastore_table_name
    if offline.file_data_source and _enabled_databases(draft) and not distinct:
        text = (
            '[OfflineMode] envDatastorePrefix does not contain "$CID"; if the archive has several'
            " environments, each overwrites what the others have stored"
        )
        yield text, _keys("OfflineMode", "file_data_source", "env_datastore_prefix")


def _duplicates(draft: Draft) -> Iterator[Diagnostic]:
    """Report credentials and prefixes that environments share; as in ld-relay, the later wins."""
    nouns = {"sdk_key": "SDK key", "mobile_key": "mobile key", "env_id": "client-side ID"}
    if _enabled_databases(draft):
        nouns["prefix"] = (
            "table and database prefix" if _has_tables_only(draft) else "database prefix"
        )
    for attribute, noun in nouns.items():
        owners: dict[object, str] = {}
        for each in with_variants(draft.environments, draft.filters):
            value = getattr(each, attribute)
            if attribute == "prefix" and _has_tables_only(draft) and (each.table_name or value):
                value = each.table_name or draft.of(DynamoDB).table_name, value
            elif value and attribute != "prefix":
                value = value, each.filter_key  # a variant shares the credentials
            if value and value in owners:
                text = f'environments "{owners[value]}" and "{each.name}" have the same {noun}'
                tail = f'; "{each.name}" answers to it'
                if attribute == "prefix":
                    tail = "; each overwrites what the other has stored"
                names = (owners[value], each.name)
                yield text + tail, tuple((ENVIRONMENT, name, attribute) for name in names)
            owners[value] = each.name


def _raised_to_minimum(draft: Draft) -> Iterator[Diagnostic]:
    if draft.of(Events).metrics_capacity < _MIN_METRICS_CAPACITY:
        text = f"[Events] metricsCapacity is taken as {_MIN_METRICS_CAPACITY}, the least possible"
        yield text, (("Events", None, "metrics_capacity"),)
