"""The command line: the verbs a person types.

It owns flags, progress bars and how answers and errors look in a terminal. It refuses to
do the work itself: every verb resolves its settings and calls one room below.

Invariant: ``coppice --help`` answers without loading PyTorch, FastAPI or a model.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line (the ``coppice`` script and ``python -m coppice``)."""
    from coppice.cli.app import run

    sys.exit(run(sys.argv[1:]))
