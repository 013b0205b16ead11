"""Time that functions wait for their first flag when many of them start at once.

Real SDKs in processes of their own, which a barrier releases together: see bench/README.md.
"""
