"""Redis in every shape: one real cluster, and one master with Sentinels, per test worker."""

from tests.support.rediscluster import cluster, sentinels, shared_cluster, shared_sentinels

__all__ = ["cluster", "sentinels", "shared_cluster", "shared_sentinels"]
