"""``coppice simulate``: what a policy would do with a trace, in seconds instead of an hour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coppice.cli.console import err, out, print_note
from coppice.cli.options import Given, with_settings
from coppice.engine.config import EngineConfig
from coppice.errors import ConfigError

if TYPE_CHECKING:
    from coppice.cost import StepCurve
    from coppice.scheduling.record import Record

Trace = Annotated[
    Path, typer.Argument(help="Azure, Mooncake, VTC or AdaServe trace; plain or gzip.")
]
Divide = Annotated[float, typer.Option(help="Divide lengths by this.", min=0.001)]
Pace = Annotated[float, typer.Option(help="Play so many times as fast.", min=1e-6)]
Wish = Annotated[float | None, typer.Option(help="Wish for the first token.", min=1e-6)]
BaseTpot = Annotated[
    float | None,
    typer.Option(help="Base time a token, for traces with wishes for it.", min=1e-9),
]
Picture = Annotated[Path | None, typer.Option("--svg", help="Write a picture here.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@with_settings(EngineConfig)
def simulate(
    given: Given,
    trace: Trace,
    *,
    divide: Divide = 1.0,
    pace: Pace = 1.0,
    ttft_s: Wish = None,
    base_tpot_s: BaseTpot = None,
    svg: Picture = None,
    as_json: AsJson = False,
) -> None:
    """Play a trace through the scheduler on a virtual clock.

    Step times are those of the model on this machine, as 'coppice doctor --calibrate' keeps
    them (measured now where they were not); sizes and policy are the engine's settings.
    """
    from coppice.cost import StepCost
    from coppice.engine.policies import policy_of
    from coppice.scheduling import record as records
    from coppice.scheduling.traces import as_sequences, read_trace
    from coppice.scheduling.virtual import Sizes

    config = given.resolve(EngineConfig).config
    arrivals = read_trace(trace)
    with err().status("Reading the step curve"):
        curve, num_pages, context = _machine(config)
    sequences = as_sequences(
        arrivals,
        divide=divide,
        pace=pace,
        max_context=context,
        base_tpot_s=base_tpot_s,
        ttft_s=ttft_s,
    )
    if not sequences:
        raise ConfigError(
            f"No request of the trace fits a context of {context} tokens; raise --divide.",
            param="trace",
        )
    sizes = Sizes(
        num_pages=num_pages,
        page_size=config.page_size,
        max_rows=config.max_rows,
        max_sequences=config.max_sequences,
        prefill_chunk=config.prefill_chunk,
        prefix_cache=config.prefix_cache,
    )
    policy = policy_of(config, num_pages, StepCost(curve))
    with err().status("Simulating"):
        record = records.simulate(sequences, _step_time(curve), sizes, policy)
    name = f"{trace.name}: policy {config.policy}, order {config.order}"
    if svg is not None:
        from coppice.cli.plot import picture

        svg.write_text(picture(record, name))
    left_out = len(arrivals) - len(sequences)
    _print(record, name, left_out=left_out, as_json=as_json)


def _machine(config: EngineConfig) -> tuple[StepCurve, int, int]:
    """Step curve, pages and context length of the model here."""
    from coppice.cost import read_curve, save_curve
    from coppice.engine.calibrate import calibrate, curve_path
    from coppice.engine.loading import load_engine_model

    model = load_engine_model(config)
    path = curve_path(config.cache_folder, model.facts)
    curve = read_curve(path)
    if curve is None:
        curve = calibrate(model, seconds=2.0)
        save_curve(curve, path)
    layout = model.decoder.kv_layout(config.page_size).stored_as(config.kv_cache_dtype)
    num_pages = max(1, (config.kv_cache_mib << 20) // layout.page_bytes)
    context = min(config.context_length or model.facts.context_length, num_pages * config.page_size)
    return curve, num_pages, min(context, model.facts.context_length)


def _step_time(curve: StepCurve) -> Any:
    def step_time(rows: int, keys: int, sequences: int) -> float:
        del sequences
        return curve.time(rows, keys) if rows else 0.0

    return step_time


def _print(record: Record, name: str, *, left_out: int, as_json: bool) -> None:
    from coppice.scheduling.record import spread

    done = [a for a in record.answers if a.finished]
    figures = {
        "time to first token": [1e3 * v for v in spread(a.ttft for a in done)],
        "time per token": [1e3 * v for v in spread(a.tpot for a in done)],
        "whole answer": [1e3 * v for v in spread(a.e2e for a in done)],
    }
    service = {
        tenant: sum(amount for _, amount in account.served)
        for tenant, account in record.accounts.tenants.items()
    }
    facts = {
        "requests": len(record.answers),
        "finished": len(done),
        "left out": left_out,
        "seconds": record.seconds,
        "tokens a second": record.tokens_per_s,
        "most waiting": max((m.waiting for m in record.moments), default=0),
        "most pages": max((m.pages for m in record.moments), default=0),
        "steps": record.steps,
        "preemptions": record.preemptions,
    }
    wished = [a for a in done if a.tpot_wish_s is not None]
    if wished:
        facts["wishes met"] = sum(a.tpot <= (a.tpot_wish_s or 0.0) for a in wished) / len(wished)
    if as_json:
        latency = {
            key: dict(zip(("p50", "p95", "p99"), v, strict=True)) for key, v in figures.items()
        }
        typer.echo(
            json.dumps({"title": name, **facts, "ms": latency, "service": service}, indent=2)
        )
        return
    from rich.table import Table

    table = Table("", "p50", "p95", "p99", "unit", title=name, title_justify="left")
    for label, values in figures.items():
        table.add_row(label, *(f"{v:.4g}" for v in values), "ms")
    out().print(table)
    shares = Table("tenant", "service", "share", title="Most served", title_justify="left")
    whole = sum(service.values()) or 1.0
    for tenant in sorted(service, key=lambda t: -service[t])[:10]:
        shares.add_row(tenant, f"{service[tenant]:.0f}", f"{service[tenant] / whole:.1%}")
    out().print(shares)
    print_note(", ".join(f"{key} {value:.6g}" for key, value in facts.items()))
