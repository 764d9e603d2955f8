"""``coppice doctor``: what this machine and this installation look like to Coppice."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from coppice.cli.console import err, out
from coppice.cli.machine import machine_facts, versions
from coppice.cli.options import Given, with_settings
from coppice.cli.rooms import ROOMS
from coppice.errors import CoppiceError
from coppice.settings import settings_of


@with_settings(*ROOMS)
def doctor(
    given: Given,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Measure memory and multiply rates.")
    ] = True,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Load the model, time its steps and keep the result (seconds)."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show machine, kernels, versions, and each setting with where its value comes from.

    Paste the output of `coppice doctor --json` into a bug report; secrets are not in it.
    """
    report = {
        "machine": machine_facts(),
        "kernels": kernel_facts(probe=probe),
        "versions": versions(),
        "settings": setting_facts(given),
    }
    if calibrate:
        report["steps"] = step_facts(given)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    _print(report)


def kernel_facts(*, probe: bool) -> dict[str, Any]:
    """Which operators would run here and, where the kernels can tell, how fast.

    A kernel room that cannot be loaded is a finding, not a crash: it is what this command
    is for.
    """
    from coppice import kernels

    with err().status("Loading kernels"):
        try:
            facts: dict[str, Any] = {
                "operators": kernels.get_ops().name,
                "description": kernels.describe(),
                "instruction_sets": kernels.available_isas(),
            }
        except (CoppiceError, ImportError, OSError) as error:
            return {"operators": "none", "error": str(error)}
    if probe and kernels.native_available():
        with err().status("Measuring memory and multiply rates"):
            facts["probe"] = dataclasses.asdict(kernels.probe())
    return facts


def step_facts(given: Given) -> dict[str, Any]:
    """Time the configured model's steps and keep the curve where engines look for it."""
    from rich.progress import Progress

    from coppice.cost import save_curve
    from coppice.engine.calibrate import calibrate, curve_path
    from coppice.engine.config import EngineConfig
    from coppice.engine.loading import load_engine_model

    config = given.resolve(EngineConfig).config
    with err().status(f"Loading {config.model}"):
        model = load_engine_model(config)
    with Progress(console=err(), transient=True) as bar:
        task = bar.add_task("Timing steps", total=None)
        curve = calibrate(
            model,
            kv=config.kv_cache_dtype,
            progress=lambda n, of: bar.update(task, completed=n, total=of),
        )
    path = curve_path(config.cache_folder, model.facts)
    save_curve(curve, path)
    timed = zip(curve.rows, curve.seconds, strict=True)
    facts: dict[str, Any] = {f"{rows} rows, ms": 1e3 * seconds for rows, seconds in timed}
    return {
        "model": model.facts.name,
        **facts,
        "1,000 keys, ms": 1e6 * curve.per_key_s,
        "kept in": str(path),
    }


def setting_facts(given: Given) -> dict[str, dict[str, str]]:
    """Each setting's value and origin, by its key in the YAML file; secrets are hidden."""
    facts = {}
    for room in ROOMS:
        resolved = given.resolve(room)
        for item in settings_of(room):
            value = item.show(getattr(resolved.config, item.name))
            facts[item.key] = {"value": value, "origin": str(resolved.origins[item.name])}
    return facts


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    for section in (name for name in report if name != "settings"):
        table = Table(title=section, title_justify="left", show_header=False, box=None)
        for name, value in _flat(report[section]):
            table.add_row(name, value)
        out().print(table)
        out().print()
    table = Table("setting", "value", "from", title="settings", title_justify="left", box=None)
    for name, fact in report["settings"].items():
        style = None if fact["origin"] == "default" else "bold"
        table.add_row(name, fact["value"], fact["origin"], style=style)
    out().print(table)


def _flat(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += [(f"{name}.{key}", text) for key, text in _flat(value)]
        elif isinstance(value, list):
            rows.append((name, " ".join(map(str, value)) or "none"))
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            rows.append((name, "none" if value is None else text))
    return rows
