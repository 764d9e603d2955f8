"""The suffix cache of ``arctic-inference`` as a contender, in its own interpreter.

Reads one line of JSON (traces and limits) and answers with one. Its cache keeps answers of all
requests and prompts of the running one; trees are allowed, and the factor that bounds a draft
by the length of its match is tried at its default of 1 and at 4.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from benchmarks.suffix.replay import replay

FACTORS = (1.0, 4.0)
DEPTH = 64


class Arctic:
    """`SuffixDecodingCache`, driven as its vLLM plug-in drives it."""

    def __init__(self, factor: float) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self._cache: Any = SuffixDecodingCache(DEPTH, -1)
        self._factor = factor
        self._text: list[int] = []
        self._number = 0

    def start(self, prompt: list[int]) -> None:
        """See `Contender`."""
        self._number += 1
        self._text = prompt[-DEPTH:]
        self._cache.start_request(self._number, prompt)

    def propose(self, limit: int) -> tuple[list[int], list[int]]:
        """See `Contender`."""
        if limit < 1:
            return [], []
        found = self._cache.speculate(
            self._number,
            self._text[-DEPTH:],
            max_spec_tokens=limit,
            max_spec_factor=self._factor,
            use_tree_spec=True,
        )
        return found.token_ids, found.parents

    def accept(self, tokens: list[int]) -> None:
        """See `Contender`."""
        self._cache.add_active_response(self._number, tokens)
        self._text += tokens

    def end(self) -> None:
        """See `Contender`."""
        self._cache.stop_request(self._number)


def main() -> None:
    """Replay everything that was asked for."""
    job = json.loads(sys.stdin.readline())
    scores = [
        {
            "trace": name,
            "limit": limit,
            "factor": factor,
            "score": asdict(replay(turns, warm, Arctic(factor), limit)),
        }
        for name, turns, warm in job["traces"]
        for limit in job["limits"]
        for factor in FACTORS
    ]
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
