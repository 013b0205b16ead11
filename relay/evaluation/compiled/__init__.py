"""Flags compiled for speed; the interpreter beside this package is the definition."""
