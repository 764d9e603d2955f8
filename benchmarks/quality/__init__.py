"""What quantization costs in quality: bits per byte of held-out text."""
