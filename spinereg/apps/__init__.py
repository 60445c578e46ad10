"""Notebooks that papermill runs."""

from .paths import app, apps

__all__ = ["app", "apps"]
