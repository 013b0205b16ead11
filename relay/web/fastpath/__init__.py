"""The same responses without ASGI: a uvicorn protocol that answers hot requests itself."""
