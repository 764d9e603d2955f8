"""Shares of tenants: the VTC trace and a greedy tenant."""
