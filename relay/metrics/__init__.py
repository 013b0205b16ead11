"""Metrics of the relay, declared in one table."""
