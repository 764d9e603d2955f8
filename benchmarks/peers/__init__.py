"""Peers, each started the same way every time."""
