"""Encode the corpus: ``python -m recipes.bundled.prepare`` after the tokenizer."""

import argparse
from pathlib import Path

from recipes.bundled.corpus import DEFAULT_DATA
from recipes.bundled.data import build_streams
from recipes.bundled.tokenizer import WORK


def main() -> None:
    """Write one token stream per source and split to the work folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the sources")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the results")
    args = parser.parse_args()
    build_streams(args.data, args.work)


if __name__ == "__main__":
    main()
