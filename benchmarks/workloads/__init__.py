"""Readers of the real traces and texts."""
