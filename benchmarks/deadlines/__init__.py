"""Wishes for time per token, met and missed."""
