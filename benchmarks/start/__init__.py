"""How soon a model answers, and what it keeps resident."""
