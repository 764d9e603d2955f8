"""Suffix decoding on recorded work."""
