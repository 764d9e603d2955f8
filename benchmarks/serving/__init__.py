"""Serving benchmark: Coppice beside `transformers` under closed-loop load."""
