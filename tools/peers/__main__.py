"""``python -m tools.peers [PEER...]``: build the peers, then the models in their forms."""

from __future__ import annotations

import argparse
import sys

from tools.peers import places
from tools.peers.models import MODELS, prepare
from tools.peers.recipes import RECIPES


def main() -> int:
    """Build what was asked for; 1 when something failed (the rest is usable all the same)."""
    parser = argparse.ArgumentParser(prog="tools.peers", description=__doc__)
    names = [recipe.name for recipe in RECIPES]
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(names)}; all")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement for PyTorch")
    parser.add_argument("--server", action="store_true", help="build llama-server too")
    args = parser.parse_args()
    if unknown := sorted(set(args.peers) - set(names)):
        parser.error(f"no peer is called {unknown[0]!r}; choose from {', '.join(names)}")
    print(f"Peers under {places.ROOT}; each step's output is in log.txt there.", file=sys.stderr)
    failed = []
    for recipe in RECIPES:
        if not args.peers or recipe.name in args.peers:
            reason = recipe.install(args.torch, with_server=args.server)
            failed += [f"{recipe.name}: {reason}"] if reason else []
    for model in args.models:
        failed += prepare(model)
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    for recipe in RECIPES:
        print(f"{recipe.name:12} {places.installed(recipe.name) or 'not installed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
