"""Streams of server-sent events: channels, subscribers, fan-out."""
