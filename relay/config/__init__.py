"""Configuration: options, their sources, and their validation."""
