"""Deferral windows against eager batching."""
