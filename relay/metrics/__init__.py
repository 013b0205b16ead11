"""The metrics of the relay, declared once."""
