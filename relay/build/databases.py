"""Where flags are stored: the configured databases, and documents."""

# ruff: noqa: PLC0415 - implementations are imported where they are chosen

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from msgspec import Struct

from relay.build.sources import http_session
from relay.config.schema import AutoConfig, Config, DynamoDB
from relay.errors import ConfigError
from relay.model.credential import AutoConfigKey
from relay.model.environment import EnvironmentSpec
from relay.stores import DataStore
from relay.stores.bigsegments import BigSegmentStore

if TYPE_CHECKING:
    from relay.stores.documents.connect import Places
    from relay.stores.listmirror import ListStore
    from relay.stores.redis.client import RedisClient


class Database(Struct, frozen=True):
    """A configured database.

    Args:
        kind: kind of database, as in `/status`.
        store_for: returns the store of an environment.
        has_tables: True if environments may have different tables.
        big_segments_for: returns the members of its big segments; None if it cannot hold any.
        list_for: returns what stores the list of environments of automatic configuration; None if
            it cannot.
    """

    kind: str
    store_for: Callable[[EnvironmentSpec], DataStore]
    big_segments_for: Callable[[EnvironmentSpec], BigSegmentStore] | None = None
    list_for: Callable[[AutoConfig], ListStore] | None = None
    has_tables: bool = False

    def table_of(self, spec: EnvironmentSpec) -> str:
        """Return the table of an environment; empty if the database has none."""
        return spec.table if self.has_tables else ""


def make_databases(config: Config) -> tuple[Database, ...]:
    """Return the configured databases.

    Raises:
        ConfigError: a file or variable that one of them needs is unusable, or a library is missing.
    """
    databases = []
    if redis := config.redis:
        from relay.stores.redis.connect import connect as connect_to_redis
        from relay.stores.redis.divided import data_store
        from relay.stores.redis.divided_bigsegments import big_segment_store

        client = connect_to_redis(redis)
        databases.append(
            Database(
                "redis",
                lambda spec: data_store(client, spec.prefix),
                lambda spec: big_segment_store(client, spec.prefix),
                partial(_redis_list, client),
            )
        )
    if consul := config.consul:
        from relay.stores.consul.connect import connect
        from relay.stores.consul.store import ConsulStore

        server, size = connect(consul, os.environ), consul.max_value_size
        databases.append(Database("consul", lambda spec: ConsulStore(server, spec.prefix, size)))
    if config.dynamodb:
        databases.append(_dynamodb(config.dynamodb))
    return tuple(databases)


def _redis_list(client: RedisClient, auto: AutoConfig) -> ListStore:
    from relay.stores.redis.list import RedisList

    key = AutoConfigKey(auto.key.reveal())
    return RedisList(client, auto.cache_key, key, auto.cache_encryption_key)


def _dynamodb(options: DynamoDB) -> Database:
    try:
        from relay.stores.dynamodb.bigsegments import DynamoDBBigSegmentStore
        from relay.stores.dynamodb.connect import connect
        from relay.stores.dynamodb.store import DynamoDBStore
    except ImportError as e:
        text = "[DynamoDB] enabled: DynamoDB needs the libraries for AWS: pip install 'relay[aws]'"
        raise ConfigError([text]) from e
    connection = connect(options.url, os.environ)

    def store_for(spec: EnvironmentSpec) -> DataStore:
        return DynamoDBStore(connection.share(), spec.table, spec.prefix)

    def big_segments_for(spec: EnvironmentSpec) -> BigSegmentStore:
        return DynamoDBBigSegmentStore(connection.share(), spec.table, spec.prefix)

    def list_for(auto: AutoConfig) -> ListStore:
        from relay.stores.dynamodb.list import DynamoDBList

        share, key = connection.share(), AutoConfigKey(auto.key.reveal())
        table, secret = options.table_name, auto.cache_encryption_key
        return DynamoDBList(share, table, auto.cache_key, key, secret)

    has_list = list_for if options.table_name else None
    return Database("dynamodb", store_for, big_segments_for, has_list, has_tables=True)


def memberships(
    databases: Sequence[Database],
) -> Callable[[EnvironmentSpec], BigSegmentStore] | None:
    """Return what makes stores of big segments, in the first database that can hold them."""
    return next(filter(None, (each.big_segments_for for each in databases)), None)


def make_places(config: Config) -> Places | None:
    """Return what makes the places for documents; None if there are no documents."""
    if not config.publish.to and not config.main.bootstrap_from:
        return None
    from relay.stores.documents.connect import Places

    urls = (*config.publish.to, *filter(None, [config.main.bootstrap_from]))
    return Places(lambda: http_session(config), config.proxy.url, urls)


def common_table(config: Config) -> str:
    """Return the table of environments that name none; empty without DynamoDB."""
    return config.dynamodb.table_name if config.dynamodb else ""
