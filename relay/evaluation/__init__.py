"""Flag evaluation: the variation of a flag for a context, and the reason (spec: evaluation)."""
