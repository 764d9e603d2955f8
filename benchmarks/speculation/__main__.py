"""``python -m benchmarks.speculation [--quick]``: draft trees at batch 1.

The bundled target is widened to the shape of Qwen2.5-0.5B without changing its function
(``tools/widen.py``), so that a step costs what a 0.5B model's does and the bundled draft is
right as often as it really is. Prompts are prose and code held out from the training of both.
A run whose answers with and without speculation differ in a token ends there. llama.cpp runs the
same two models as GGUF, with its own speculation and without.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import Goal, Report
from benchmarks.speculation import llama
from benchmarks.speculation.prompts import KINDS, held_out
from coppice import LLM, SamplingParams
from coppice.kernels.threads import usable_cores
from coppice.models.locate import BUNDLED, BUNDLED_DRAFT, locate
from tools.make_model import SHAPES
from tools.peers import places
from tools.peers.models import GGUF_FORMS
from tools.peers.to_gguf import write_gguf
from tools.peers.workshop import StepError, Workshop
from tools.widen import widen

TARGET, DRAFT = "wide-0.5b", "bundled-draft"
TEMPERATURES = (0.0, 0.8)
BOUNDS = {0.0: 2.2, 0.8: 1.4}


class Figure(NamedTuple):
    """One contender on all prompts of one kind."""

    tok_s: float
    per_step: float = 1.0
    tokens: tuple[tuple[int, ...], ...] = ()
    drafted: int = 0
    accepted: int = 0


def main() -> int:
    """Run, print, keep; non-zero when a goal is missed."""
    args = _arguments()
    target = _widened()
    report = Report(
        f"speculation{'-quick' if args.quick else ''}",
        ["weights", "temperature", "kind", "who", "tok/s", "speed-up", "tokens a step"],
    )
    gains: dict[float, list[float]] = {t: [] for t in TEMPERATURES}
    against: dict[str, list[float]] = {"llama.cpp, speculating": [], "llama.cpp, plain": []}
    for form in args.formats:
        found = _coppice(target, form, args)
        peers = {} if args.no_peers else _llama(form, target, args)
        for (temperature, kind), (plain, ours) in found.items():
            gains[temperature].append(ours.tok_s / plain.tok_s)
            rows = {"coppice, plain": plain, "coppice, speculating": ours}
            rows |= {name: f[temperature, kind] for name, f in peers.items()}
            for name, figure in rows.items():
                case = [form, f"{temperature:g}", kind, name]
                report.rows.append(case + _cells(figure, plain if "coppice" in name else None))
                report.metrics[f"{form} {temperature} {kind} {name}"] = figure.tok_s
            for name, ratios in against.items():
                if name in rows:
                    ratios.append(ours.tok_s / rows[name].tok_s)
    for temperature, bound in BOUNDS.items():
        mean = sum(gains[temperature]) / len(gains[temperature])
        report.goals.append(
            Goal.at_least(f"mean speed-up at temperature {temperature:g}", mean, bound)
        )
    for name, ratios in against.items():
        goal = f"tokens/s over {name}, mean"
        if ratios:
            report.goals.append(Goal.at_least(goal, sum(ratios) / len(ratios), 3.0))
        else:
            report.goals.append(Goal.unmeasured(goal, ">= 3", "run `make peers` first"))
    return report.finish()


def _cells(figure: Figure, plain: Figure | None) -> list[str]:
    """Rate, gain over plain decoding and tokens a step; only the rate of a peer."""
    if plain is None:
        return [f"{figure.tok_s:.1f}", "", ""]
    return [f"{figure.tok_s:.1f}", f"{figure.tok_s / plain.tok_s:.2f}", f"{figure.per_step:.2f}"]


Found = dict[tuple[float, str], tuple[Figure, Figure]]


def _coppice(target: Path, form: str, args: argparse.Namespace) -> Found:
    """Plain and speculating, in turns within a round; of the rounds the one of median gain."""
    engines = {}
    for speculate in ("off", "draft"):
        engines[speculate] = LLM(
            str(target),
            quantization=form,
            speculate=speculate,
            draft_model=BUNDLED_DRAFT if speculate == "draft" else None,
        )
        engines[speculate].generate("Once upon a time", _params(0.0, 16, 1))
    prompts = held_out(engines["off"].tokenizer, args.prompts)
    found: Found = {}
    for temperature in TEMPERATURES:
        for kind in KINDS:
            pairs = []
            for _ in range(args.rounds):
                plain, ours = (
                    _run(engines[s], prompts[kind], args.tokens, temperature)
                    for s in ("off", "draft")
                )
                if plain.tokens != ours.tokens:
                    raise SystemExit(f"{form} {kind}: the answers differ with speculation on.")
                pairs.append((plain, ours))
            pairs.sort(key=lambda pair: pair[1].tok_s / pair[0].tok_s)
            found[temperature, kind] = pairs[len(pairs) // 2]
    return found


def _run(llm: LLM, prompts: Sequence[str], tokens: int, temperature: float) -> Figure:
    """Decode one prompt after the other; prompts' own time is not counted."""
    answers, seconds, steps = [], 0.0, 0
    for i, prompt in enumerate(prompts):
        params = _params(temperature, tokens, 5 + i)
        llm.generate(prompt, _params(temperature, 1, 5 + i))  # its prompt is cached now
        before = llm.engine.stats().steps
        began = time.perf_counter()
        (result,) = llm.generate(prompt, params)
        seconds += time.perf_counter() - began
        steps += llm.engine.stats().steps - before
        answers.append(tuple(result.outputs[0].token_ids))
    made = sum(map(len, answers))
    return Figure(made / seconds, made / steps, tuple(answers))


def _params(temperature: float, tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_tokens=tokens, seed=seed, ignore_eos=True)


def _llama(
    form: str, target: Path, args: argparse.Namespace
) -> dict[str, dict[tuple[float, str], Figure]]:
    """llama.cpp's figures; nothing where it was not built."""
    if places.installed("llama.cpp") is None or not places.llama_tool("llama-server").exists():
        return {}
    try:
        models = [_gguf(TARGET, target, form), _gguf(DRAFT, locate(BUNDLED_DRAFT), form)]
    except (StepError, OSError) as error:
        print(f"llama.cpp: {error}", file=sys.stderr)
        return {}
    tokenizer = LLM(BUNDLED).tokenizer
    prompts = held_out(tokenizer, args.prompts)
    found: dict[str, dict[tuple[float, str], Figure]] = {}
    for name, draft in (("llama.cpp, plain", None), ("llama.cpp, speculating", models[1])):
        figures = found[name] = {}
        with llama.server(models[0], draft, usable_cores()) as address:
            llama.rate(address, ["Once upon a time"], 8, 0.0)
            for temperature in TEMPERATURES:
                for kind in KINDS:
                    got: dict[str, Any] = llama.rate(
                        address, prompts[kind], args.tokens, temperature
                    )
                    figures[temperature, kind] = Figure(
                        got["tok_s"], drafted=got["drafted"], accepted=got["accepted"]
                    )
                    print(f"{form} {name} {temperature} {kind}: {got}", file=sys.stderr)
    return found


def _widened() -> Path:
    """The bundled target in the shape of a 0.5B model, made once for what it is made of."""
    folder = places.checkpoint(TARGET)
    source = locate(BUNDLED)
    made_of = folder.parent / "made-of"
    mark = str((source / "model.safetensors").stat().st_mtime_ns)
    if not made_of.exists() or made_of.read_text() != mark:
        widen(source, SHAPES["qwen2.5-0.5b"], folder)
        made_of.write_text(mark)
    return folder


def _gguf(name: str, source: Path, form: str) -> Path:
    """A model as GGUF in one of llama.cpp's own formats, newer than what it is made of."""
    shop = Workshop(places.ROOT / "models" / name, name)
    whole, out = places.gguf(name, "bf16"), places.gguf(name, GGUF_FORMS[form])
    made = (source / "model.safetensors").stat().st_mtime
    if not whole.exists() or whole.stat().st_mtime < made:
        write_gguf(source, whole)
    if not out.exists() or out.stat().st_mtime < whole.stat().st_mtime:
        tool = places.llama_tool("llama-quantize")
        shop.step(f"quantize to {form}", [tool, whole, out, out.stem.upper()], always=True)
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.speculation", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two prompts a kind, one round")
    parser.add_argument("--formats", nargs="*", choices=("int8", "int4"), default=["int8", "int4"])
    parser.add_argument("--prompts", type=int, default=None, help="of each kind")
    parser.add_argument("--tokens", type=int, default=None, help="of each answer")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--no-peers", action="store_true", help="Coppice alone")
    args = parser.parse_args()
    args.prompts = args.prompts or (2 if args.quick else 5)
    args.tokens = args.tokens or (64 if args.quick else 128)
    args.rounds = args.rounds or (1 if args.quick else 3)
    return args


if __name__ == "__main__":
    sys.exit(main())
