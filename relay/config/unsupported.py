"""Options of ld-relay for features that this release does not have.

They are read and checked all the same, so that one configuration fits both programs.
"""

from __future__ import annotations

from msgspec import Struct

from relay.config.options import LATER, NO_EFFECT, REFUSED, option, section
from relay.config.types import (
    BOOLEAN,
    COUNT,
    DURATION,
    LIST,
    STRING,
    one_of,
)


@section
class Datadog(Struct, frozen=True):
    """`[Datadog]`: metrics and traces for Datadog."""

    enabled: bool = option(
        "USE_DATADOG", BOOLEAN, False, "Send metrics and traces to Datadog.", support=REFUSED
    )
    prefix: str = option(
        "DATADOG_PREFIX",
        STRING,
        "launchdarkly_relay",
        "Name prefix of the metrics.",
        support=LATER,
    )
    trace_addr: str = option(
        "DATADOG_TRACE_ADDR",
        STRING,
        "localhost:8126",
        "Host and port of the agent that receives traces.",
        support=LATER,
    )
    stats_addr: str = option(
        "DATADOG_STATS_ADDR",
        STRING,
        "localhost:8125",
        "Host and port of the agent that receives metrics, or a `unix://` path.",
        support=LATER,
    )
    tag: tuple[str, ...] = option(
        "", LIST, (), "Tags added to all metrics, each as `name:value`.", "team:shop", support=LATER
    )


@section
class Stackdriver(Struct, frozen=True):
    """`[Stackdriver]`: metrics and traces for Google Cloud Monitoring."""

    enabled: bool = option(
        "USE_STACKDRIVER",
        BOOLEAN,
        False,
        "Send metrics and traces to Google Cloud.",
        support=REFUSED,
    )
    project_id: str = option(
        "STACKDRIVER_PROJECT_ID",
        STRING,
        "",
        "ID of the Google Cloud project.",
        "my-project",
        name="projectID",
        support=LATER,
    )
    prefix: str = option(
        "STACKDRIVER_PREFIX",
        STRING,
        "launchdarkly_relay",
        "Name prefix of the metrics.",
        support=LATER,
    )


@section
class OpenTelemetry(Struct, frozen=True):
    """`[OpenTelemetry]`: metrics, traces and logs over OTLP."""

    enabled: bool = option(
        "USE_OTLP", BOOLEAN, False, "Export metrics, traces and logs.", support=REFUSED
    )
    protocol: str = option(
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        one_of("grpc", "http"),
        "",
        "Transport protocol for OTLP.",
        "grpc",
        support=LATER,
    )
    metrics_cardinality_limit: int = option(
        "OTEL_METRICS_CARDINALITY_LIMIT",
        COUNT,
        2000,
        "Maximum number of series per metric; 0 = unlimited.",
        support=LATER,
    )
    environment_status_metrics: bool = option(
        "OTEL_ENVIRONMENT_STATUS_METRICS",
        BOOLEAN,
        False,
        "Export metrics on the state of each environment.",
        support=LATER,
    )
    logs_exporter: str = option(
        "OTEL_LOGS_EXPORTER", STRING, "otlp", "Exporter for logs: `otlp` or `none`.", support=LATER
    )
    traces_exporter: str = option(
        "OTEL_TRACES_EXPORTER",
        STRING,
        "otlp",
        "Exporter for traces: `otlp` or `none`.",
        support=LATER,
    )
    metrics_exporter: str = option(
        "OTEL_METRICS_EXPORTER",
        STRING,
        "otlp",
        "Exporter for metrics: `otlp` or `none`.",
        support=LATER,
    )


@section
class Concurrency(Struct, frozen=True):
    """`[Concurrency]`: limits of ld-relay on concurrent initial payloads."""

    max_concurrent: int = option(
        "INIT_MAX_CONCURRENT",
        COUNT,
        0,
        "All streams share one copy of the initial payload, so no limit is needed.",
        support=NO_EFFECT,
    )
    max_queued: int = option("INIT_MAX_QUEUED", COUNT, 0, "See `maxConcurrent`.", support=NO_EFFECT)
    send_timeout: float = option(
        "INIT_SEND_TIMEOUT",
        DURATION,
        120.0,
        "See `clientStallTimeout` of `[Main]`.",
        support=NO_EFFECT,
    )
