"""``coppice bench``: how fast this machine serves this model."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from coppice.cli.console import err, out, print_note
from coppice.cli.load import load_llm
from coppice.cli.options import Given, with_settings
from coppice.engine.config import EngineConfig
from coppice.errors import ConfigError

if TYPE_CHECKING:
    from coppice import LLM
    from coppice.cli.measure import Shape, Spread

bench = typer.Typer(
    help="Measure this machine with this model, in this process and without HTTP.",
    no_args_is_help=True,
)

Rows = dict[str, "tuple[Spread | float, str]"]
"""Figures by name, each with its unit."""

PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens in a prompt.")]
AnswerTokens = Annotated[int, typer.Option(min=2, help="Tokens in an answer.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
BenchSeed = Annotated[int, typer.Option("--bench-seed", help="Seed of prompts and lengths.")]


@bench.command("latency")
@with_settings(EngineConfig)
def latency(
    given: Given,
    *,
    prompt_tokens: PromptTokens = 128,
    answer_tokens: AnswerTokens = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Requests measured.")] = 5,
    bench_seed: BenchSeed = 0,
    as_json: AsJson = False,
) -> None:
    """One request at a time: time to first token, time per token.

    One request of the same shape warms up first. Median and quartiles are of the repeats.
    """
    from coppice.cli.measure import Shape, Spread, measure

    llm = load_llm(given.resolve(EngineConfig).config)
    facts = llm.engine.facts()
    shape = Shape(prompt_tokens, answer_tokens)
    _check_fits(shape, facts.context_length)
    timings = []
    with err().status("Measuring"):
        for repeat in range(repeats + 1):
            seed = bench_seed + repeat
            timings += measure(
                llm.engine, [shape], concurrency=1, vocab_size=facts.vocab_size, seed=seed
            )
    measured = timings[1:]
    rows: Rows = {
        "time to first token": (Spread.of([t.ttft * 1e3 for t in measured]), "ms"),
        "time per token": (Spread.of([t.tpot * 1e3 for t in measured]), "ms"),
        "prefill": (Spread.of([prompt_tokens / t.ttft for t in measured]), "tok/s"),
        "decode": (Spread.of([1 / t.tpot for t in measured]), "tok/s"),
    }
    title = f"{repeats} requests of {prompt_tokens} + {answer_tokens} tokens, one at a time"
    _report(llm, title, rows, as_json=as_json)


@bench.command("serving")
@with_settings(EngineConfig)
def serving(
    given: Given,
    *,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Requests measured.")] = 32,
    prompt_tokens: PromptTokens = 128,
    answer_tokens: AnswerTokens = 64,
    bench_seed: BenchSeed = 0,
    as_json: AsJson = False,
) -> None:
    """Many requests at once, of log-normal lengths: throughput and latency.

    As many requests as are in flight warm up first. The given lengths are medians.
    """
    from coppice.cli.console import track
    from coppice.cli.measure import Spread, draw_shapes, measure

    llm = load_llm(given.resolve(EngineConfig).config)
    facts = llm.engine.facts()
    shapes = draw_shapes(
        requests,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        context_length=facts.context_length,
        seed=bench_seed,
    )
    with err().status("Warming up"):
        measure(
            llm.engine,
            shapes[:concurrency],
            concurrency=concurrency,
            vocab_size=facts.vocab_size,
            seed=bench_seed + 1,
        )
    bar = track(range(len(shapes)), total=len(shapes), label="Measuring")
    next(bar)

    def advance() -> None:
        next(bar, None)

    begin = time.perf_counter()
    timings = measure(
        llm.engine,
        shapes,
        concurrency=concurrency,
        vocab_size=facts.vocab_size,
        seed=bench_seed,
        on_end=advance,
    )
    spent_s = time.perf_counter() - begin
    answered = sum(t.num_tokens for t in timings)
    prompts = sum(shape.prompt_tokens for shape in shapes)
    rows: Rows = {
        "answer tokens": (answered / spent_s, "tok/s"),
        "all tokens": ((answered + prompts) / spent_s, "tok/s"),
        "requests": (len(shapes) / spent_s, "1/s"),
        "time to first token": (Spread.of([t.ttft * 1e3 for t in timings]), "ms"),
        "time per token": (Spread.of([t.tpot * 1e3 for t in timings]), "ms"),
    }
    _report(llm, f"{requests} requests, {concurrency} in flight", rows, as_json=as_json)


def _check_fits(shape: Shape, context_length: int) -> None:
    if shape.prompt_tokens + shape.answer_tokens > context_length:
        raise ConfigError(
            f"{shape.prompt_tokens} + {shape.answer_tokens} tokens do not fit the context of "
            f"{context_length}; lower --prompt-tokens or --answer-tokens.",
            param="prompt_tokens",
        )


def _report(llm: LLM, title: str, rows: Rows, *, as_json: bool) -> None:
    import msgspec

    from coppice.cli.machine import machine_facts

    facts = llm.engine.facts()
    if as_json:
        figures = {
            name.replace(" ", "_"): {"unit": unit} | _figures(value)
            for name, (value, unit) in rows.items()
        }
        report = {
            "title": title,
            "figures": figures,
            "model": msgspec.to_builtins(facts),
            "machine": machine_facts(),
        }
        typer.echo(json.dumps(report, indent=2))
        return
    from rich.table import Table

    table = Table("", "median", "quartiles", "p99", "unit", title=title, title_justify="left")
    for name, (value, unit) in rows.items():
        table.add_row(name, *_cells(value), unit)
    out().print(table)
    print_note(f"{facts.name}, {facts.weight_format}, {facts.kernels}")


def _figures(value: Spread | float) -> dict[str, float]:
    return {"value": value} if isinstance(value, int | float) else dataclasses.asdict(value)


def _cells(value: Spread | float) -> tuple[str, str, str]:
    if isinstance(value, int | float):
        return f"{value:.4g}", "", ""
    return f"{value.median:.4g}", f"{value.low:.4g} to {value.high:.4g}", f"{value.p99:.4g}"
