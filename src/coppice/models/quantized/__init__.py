"""Quantized checkpoints: reading those of others, and making our own."""
