"""The shapes of requests and replies on the wire (pydantic), and nothing else."""
