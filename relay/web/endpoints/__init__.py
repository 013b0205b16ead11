"""Endpoints of the application, one module for each kind."""
