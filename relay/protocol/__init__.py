"""Bytes and JSON ↔ values; one file for each grammar. Pure."""
