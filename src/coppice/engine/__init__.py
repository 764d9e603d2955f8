"""The step loop and the life of a request.

Owns requests from acceptance to outcome, and the one place where tokens are chosen and
committed; refuses to know HTTP, text formats or devices. Invariant: every accepted request
ends exactly once, and between steps every KV page is accounted for.

Importing this package loads no model library; `Engine` and `LLM` do.
"""
