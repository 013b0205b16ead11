"""Flags compiled for speed; `relay.evaluation.evaluator` defines the results."""
