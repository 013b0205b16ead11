"""Fast path: a uvicorn protocol that answers hot requests itself, without ASGI."""
