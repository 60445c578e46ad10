"""Notebooks that papermill runs."""

from .paths import app, apps, given_parameters, sample_case

__all__ = ["app", "apps", "given_parameters", "sample_case"]
