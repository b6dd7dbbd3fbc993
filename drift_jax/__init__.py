"""Drifting Models in JAX: one-step generators trained by a drifting field."""

__version__ = "0.1.0"
