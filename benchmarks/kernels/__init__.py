"""Single operators beside PyTorch's and the machine's limits."""
