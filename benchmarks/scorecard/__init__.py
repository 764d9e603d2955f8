"""About sixty things users of an OpenAI-compatible server count on, asked over HTTP."""
