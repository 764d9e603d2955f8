"""``make peers``: the systems Coppice is compared with, built under ``.peers/``.

Each peer has a folder and a virtual environment of its own; nothing of them enters the
project's environment. What is there already is left alone, and one that cannot be built does
not stop the others: a benchmark then says "not installed" for it.
"""
