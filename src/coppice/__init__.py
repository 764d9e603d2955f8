"""Coppice: serve, tune and place generative models on the machines people have."""
