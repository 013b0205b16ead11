"""Evaluation: which variation of a flag a context gets, and why (spec: evaluation)."""
