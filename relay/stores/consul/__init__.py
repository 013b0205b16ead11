"""Data store in Consul's key-value store."""
