"""``coppice bench speculation``: which way of guessing ahead pays for somebody's prompts."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coppice.cli.bench import AsJson, bench
from coppice.cli.console import out, print_note, track
from coppice.cli.options import Given, with_settings
from coppice.engine.config import EngineConfig, Speculate
from coppice.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from coppice.engine.engine import Engine

WAYS: tuple[Speculate, ...] = ("off", "lookup", "suffix", "draft", "self", "auto")
PAYS = 1.05
"""Gain below which the advice is to leave it off."""


@dataclass(slots=True)
class Tally:
    """What one way took for all prompts."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0


@bench.command("speculation")
@with_settings(EngineConfig)
def speculation(
    given: Given,
    prompts: Annotated[
        Path, typer.Argument(help='One prompt a line, as text or as JSON with a "prompt".')
    ],
    *,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Tokens in an answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Your prompts, one after the other, with each way of guessing ahead; which one to use.

    Answers are the same with all of them. The first prompt warms up and is not counted.
    """
    texts = read_prompts(prompts)
    config = given.resolve(EngineConfig).config
    found = compare(config, texts, answer_tokens=answer_tokens, temperature=temperature)
    plain = found["off"]
    gains = {
        way: (tally.tokens / tally.seconds) / (plain.tokens / plain.seconds)
        for way, tally in found.items()
    }
    advice = advise(gains)
    if as_json:
        ways = {
            way: {
                "tok_s": tally.tokens / tally.seconds,
                "tokens_per_step": tally.tokens / tally.steps,
                "gain": gains[way],
            }
            for way, tally in found.items()
        }
        typer.echo(json.dumps({"ways": ways, "advice": advice}, indent=2))
        return
    from rich.table import Table

    title = f"{len(texts) - 1} prompts, up to {answer_tokens} tokens each, one at a time"
    table = Table("--speculate", "tok/s", "tokens a step", "gain", title=title)
    for way, tally in found.items():
        rate, accept = tally.tokens / tally.seconds, tally.tokens / tally.steps
        table.add_row(way, f"{rate:.4g}", f"{accept:.2f}", f"{gains[way]:.2f}x")
    out().print(table)
    print_note(f"For prompts like these: --speculate {advice}")


def advise(gains: dict[str, float]) -> str:
    """The way to switch on: the fastest, or ``off`` where none pays."""
    best = max(gains, key=lambda way: gains[way])
    return best if gains[best] >= PAYS else "off"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, at least two.

    Raises:
        ConfigError: it cannot be read, holds too few, or a line of JSON has no prompt.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}.", param="prompts") from error
    if len(lines) < 2:  # noqa: PLR2004 - one to warm up, one to measure
        raise ConfigError(f"{path} needs two lines or more, a prompt each.", param="prompts")
    return [_prompt(line, path, number) for number, line in enumerate(lines, 1)]


def _prompt(line: str, path: Path, number: int) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        found: Any = json.loads(line)
    except ValueError:
        return line
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise ConfigError(
            f'{path}, line {number}: JSON needs a "prompt" that is text.', param="prompts"
        )
    return str(found["prompt"])


def compare(
    config: EngineConfig, texts: list[str], *, answer_tokens: int, temperature: float
) -> dict[str, Tally]:
    """Every prompt with every way, the order turning, over one loaded model."""
    from coppice.engine.engine import Engine
    from coppice.engine.loading import load_engine_model
    from coppice.engine.request import Request, SamplingParams

    model = load_engine_model(config)
    engines: dict[str, Engine] = {}
    for way in WAYS:
        try:
            wanted = replace(config, speculate=way, prefix_cache=False)
            engines[way] = Engine(model, wanted)
        except ConfigError:
            if way not in ("draft", "self"):  # no draft model, or weights of another kind
                raise
    found = {way: Tally() for way in engines}
    for number, text in enumerate(track(texts, total=len(texts), label="Measuring")):
        sampling = SamplingParams(max_tokens=answer_tokens, temperature=temperature, seed=number)
        tokens = model.tokenizer.encode(text)
        room = engines["off"].context_length - answer_tokens
        request = Request(id=str(number), prompt=tokens[-room:], sampling=sampling)
        answers = set()
        for turn in range(len(engines)):
            turned = list(engines)[(number + turn) % len(engines)]
            answers.add(_run(engines[turned], request, found[turned] if number else Tally()))
        if len(answers) > 1:
            raise EngineError("Guessing ahead changed an answer: please report this.")
    return found


def _run(engine: Engine, request: Any, tally: Tally) -> tuple[int, ...]:
    steps = engine.stats().steps
    began = time.perf_counter()
    engine.submit(request)
    answer: list[int] = []
    while engine.has_work:
        for output in engine.step():
            answer += output.tokens
            if output.finish_reason == "failed":
                raise EngineError(f"A prompt failed: {output.error}.")
    tally.seconds += time.perf_counter() - began
    tally.tokens += len(answer)
    tally.steps += engine.stats().steps - steps
    return tuple(answer)
