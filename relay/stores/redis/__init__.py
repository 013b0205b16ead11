"""The database Redis, in the layout that SDKs read."""
