"""Prefixes brought back from RAM and disk beside computing them."""
