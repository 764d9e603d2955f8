"""Sessions of agents: admission, order and pages while tools run."""
