"""Whole models: Coppice and its peers beside the machine's limits, in one run."""
