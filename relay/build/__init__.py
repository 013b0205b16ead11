"""Build a relay from a configuration: the only place that chooses implementations of its parts.

Imports of implementations are local, so that only what a configuration uses is loaded: a start with
a flags file imports neither the HTTP client nor the Redis driver.
"""
