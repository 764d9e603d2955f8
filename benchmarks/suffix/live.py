"""The bundled model on tasks that repeat themselves: the engine with and without suffixes."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import load_engine_model
from coppice.engine.request import Request, SamplingParams

ANSWER = 192
TASKS = (
    "def area_of_square(side):\n    return side * side\n\n\ndef area_of_",
    "Dear Sir,\n\nI am, with great respect,\n\nYour most obedient servant,\n\nDear Sir,\n\n",
    "import unittest\n\n\nclass TestOne(unittest.TestCase):\n    def test_one(self):\n"
    "        self.assertEqual(1, 1)\n\n    def test_two(self):\n        self.assertEqual(",
    'CONFIG = {\n    "name": "one",\n    "value": 1,\n}\n\nCONFIG_TWO = {\n    "name": ',
)


def live_speed_up(rounds: int) -> dict[str, float]:
    """Each task asked repeatedly, as agents retry: speculated over plain tokens per second.

    The first asking fills the history and is not counted; rounds alternate, in one process.
    """
    config = EngineConfig(speculate="suffix")
    model = load_engine_model(config)
    tokens = [model.tokenizer.encode(task) for task in TASKS]
    guessing = Engine(model, config)
    plain = Engine(model, replace(config, speculate="off"))
    answers = [_ask(engine, tokens, f"warm{i}")[1] for i, engine in enumerate((guessing, plain))]
    if answers[0] != answers[1]:
        raise AssertionError("speculation changed an answer")
    ratios = []
    before = guessing.stats()
    for number in range(rounds):
        spent = [_ask(engine, tokens, str(number))[0] for engine in (plain, guessing)]
        ratios.append(spent[0] / spent[1])
    after = guessing.stats()
    made = after.generated_tokens - before.generated_tokens
    return {
        "speed_up": statistics.median(ratios),
        "tokens_per_step": made / (after.steps - before.steps),
    }


def _ask(engine: Engine, prompts: list[list[int]], name: str) -> tuple[float, list[list[int]]]:
    answers: list[list[int]] = []
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True, seed=0)
        engine.submit(Request(id=f"{name}-{number}", prompt=prompt, sampling=sampling))
        answer: list[int] = []
        while engine.has_work:
            for output in engine.step():
                answer += output.tokens
        answers.append(answer)
    return time.perf_counter() - began, answers
