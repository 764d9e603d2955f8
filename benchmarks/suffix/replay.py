"""Replaying recorded answers: how many tokens a step each way of guessing would have brought.

Standard library only: contenders replay in interpreters that have nothing else of ours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Contender(Protocol):
    """Guesses ahead in one conversation after the other."""

    def start(self, prompt: list[int]) -> None:
        """A call of the model begins."""
        ...

    def propose(self, limit: int) -> tuple[Sequence[int], Sequence[int]]:
        """Tokens and parents (-1 for the root) of at most ``limit`` nodes."""
        ...

    def accept(self, tokens: list[int]) -> None:
        """These came next."""
        ...

    def end(self) -> None:
        """The answer is complete."""
        ...


@dataclass
class Score:
    """What a replay brought.

    Attributes:
        sizes: steps by number of nodes verified.
        propose_s: seconds spent proposing and taking in what came.
    """

    tokens: int = 0
    sizes: dict[int, int] = field(default_factory=dict)
    propose_s: float = 0.0

    @property
    def steps(self) -> int:
        """Steps of the target."""
        return sum(self.sizes.values())

    @property
    def tokens_per_step(self) -> float:
        """Mean accept length, the target's own token included."""
        return self.tokens / max(1, self.steps)

    def speed_up(self, step_s: Sequence[float]) -> float:
        """Plain over speculated decoding time, ``step_s[n]`` being a step of ``n`` rows."""
        spent = sum(count * step_s[1 + nodes] for nodes, count in self.sizes.items())
        return self.tokens * step_s[1] / (spent + self.propose_s)


def replay(
    turns: Sequence[tuple[str, list[int], list[int]]],
    warm: int,
    contender: Contender,
    limit: int,
) -> Score:
    """Walk the recorded answers step by step.

    Args:
        turns: conversation, prompt and answer of each call, in order.
        warm: conversations at the beginning that are learned from and not counted.
        contender: who guesses.
        limit: most nodes of a step.
    """
    score = Score()
    runs = list(dict.fromkeys(run for run, _, _ in turns))
    for run, prompt, answer in turns:
        counted = run not in runs[:warm]
        contender.start(prompt)
        at = 0
        while at < len(answer):
            began = time.perf_counter()
            tokens, parents = contender.propose(min(limit, len(answer) - at - 1))
            took = time.perf_counter() - began
            new = walk(tokens, parents, answer, at) + 1
            began = time.perf_counter()
            contender.accept(answer[at : at + new])
            took += time.perf_counter() - began
            at += new
            if counted:
                score.sizes[len(tokens)] = score.sizes.get(len(tokens), 0) + 1
                score.propose_s += took
        contender.end()
        score.tokens += counted * len(answer)
    return score


def walk(tokens: Sequence[int], parents: Sequence[int], answer: Sequence[int], at: int) -> int:
    """How many levels of a tree the answer follows from ``at`` on; not to its very end."""
    node, level = -1, 0
    for i, token in enumerate(tokens):
        if at + level + 1 >= len(answer):
            break
        if parents[i] == node and token == answer[at + level]:
            node = i
            level += 1
    return level
