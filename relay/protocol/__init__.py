"""Conversion between bytes and values, one module for each format. Pure."""
