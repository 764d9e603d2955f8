"""The simulator beside the real engine."""
