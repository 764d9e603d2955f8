"""Architectures, checkpoints, tokenizers and chat templates.

Owns what a model is: from files to a `Decoder` that turns rows into logits. Refuses to know
requests, schedules or devices. Invariant: a file is checked before anything it says is
believed, and nothing in a file is ever executed.
"""
