"""Relay's parts that run as AWS Lambda functions."""
