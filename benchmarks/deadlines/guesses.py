"""What the bundled draft's guesses are worth, one record a position, from real answers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.speculation.prompts import held_out
from coppice import LLM, SamplingParams
from recipes.bundled.export import load_model

TEMPERATURE = 0.8
BINS = 16
SURE = 0.99


class Guess(NamedTuple):
    """The draft's token at a position: its estimated chance, and whether it came true."""

    chance: float
    true: bool


def record(prompts: int, length: int) -> list[Guess]:
    """Guesses at each position of sampled answers to held-out prose and code, in their order.

    Draft and target rank their tokens with the same noise (Gumbel-max coupling), as the engine
    does. How far the draft's first is ahead of its second tells how often it is right: estimates
    are the shares found in one half of the answers, and what is returned is the other half.

    Args:
        prompts: of each kind, at most.
        length: tokens of an answer.
    """
    llm = LLM("bundled", speculate="off")
    texts = [text for kind in held_out(llm.tokenizer, prompts).values() for text in kind]
    params = SamplingParams(max_tokens=length, temperature=TEMPERATURE, ignore_eos=True, seed=1)
    answers = llm.generate(texts, params)
    models = load_model("draft"), load_model("target")
    random = np.random.default_rng(1)
    halves: tuple[list[tuple[float, bool]], list[tuple[float, bool]]] = ([], [])
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        prompt = llm.tokenizer.encode(text)
        tokens = torch.tensor([[*prompt, *answer.outputs[0].token_ids]])
        with torch.no_grad():
            draft, target = (
                m(tokens[:, :-1])[0, len(prompt) - 1 :].numpy() / TEMPERATURE for m in models
            )
        noise = random.gumbel(size=draft.shape)
        first = (draft + noise).argmax(-1)
        ahead = np.partition(draft + noise, -2)[:, -2:] @ np.array([-1.0, 1.0])
        halves[i % 2].extend(zip(ahead, first == (target + noise).argmax(-1), strict=True))
    return _estimated(*halves)


def _estimated(
    known: Sequence[tuple[float, bool]], asked: Sequence[tuple[float, bool]]
) -> list[Guess]:
    edges = np.quantile([ahead for ahead, _ in known], np.linspace(0, 1, BINS + 1)[1:-1]).tolist()
    tried, came = [2.0] * BINS, [1.0] * BINS
    for ahead, true in known:
        at = bisect_right(edges, ahead)
        tried[at] += 1
        came[at] += true
    return [
        Guess(min(SURE, came[at] / tried[at]), bool(true))
        for ahead, true in asked
        for at in (bisect_right(edges, ahead),)
    ]
