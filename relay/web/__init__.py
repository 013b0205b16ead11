"""The HTTP side of the relay: the application, and the fast path before it."""
