"""Measures Relay beside another relay and nginx: `python -m bench --help`."""
