"""Draft trees over a target of real cost and real acceptance, beside llama.cpp's speculation."""
