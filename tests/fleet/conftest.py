"""One real server per test worker, emptied before each test."""

from tests.support.redis import empty_redis, shared_redis

__all__ = ["empty_redis", "shared_redis"]
