"""Patients that are drawn, so that every point's true motion is known."""
