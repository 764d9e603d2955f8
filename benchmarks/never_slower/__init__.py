"""Speculation left on must not cost: ``auto`` beside plain decoding."""
