"""Relay: LaunchDarkly flags for serverless functions, from one long-lived process."""

__version__ = "0.1.0"
