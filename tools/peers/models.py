"""The compared models in every peer's own form, made once and kept under ``.peers/models``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.peers import places
from tools.peers.workshop import StepError, Workshop

MODELS = ("bundled", "qwen2.5-0.5b", "llama-3.2-1b")
FORMATS = ("bf16", "int8", "int4")
GGUF_FORMS = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
OPENVINO_FLAGS = {
    "bf16": ["--weight-format", "fp16"],
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--group-size", "64", "--ratio", "1.0", "--sym"],
}


def prepare(model: str) -> Iterator[str]:
    """Make what is missing of a model; yield a line for each form that cannot be made."""
    shop = Workshop(places.ROOT / "models" / model, model)
    try:
        make_checkpoint(model, shop.say)
        if places.installed("llama.cpp"):
            _make_ggufs(model, shop)
    except (StepError, OSError) as error:
        yield f"{model}: {error}"
        return
    if places.installed("openvino"):
        for form in FORMATS:
            try:
                _make_openvino(model, form, shop)
            except (StepError, OSError) as error:
                yield f"{model}, OpenVINO {form}: {error}"


def make_checkpoint(model: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """The Hugging Face style folder: random weights, or a copy of the bundled model.

    When what it is made of has changed, all forms of the model are made anew.
    """
    from coppice.models.locate import locate
    from tools.make_model import make_model

    folder = places.checkpoint(model)
    source, made_of = _source(model), folder.parent / "made-of"
    if folder.exists() and made_of.exists() and made_of.read_text() == source:
        return folder
    shutil.rmtree(folder.parent, ignore_errors=True)
    say("write the checkpoint")
    partial = folder.with_name("checkpoint.partial")
    partial.parent.mkdir(parents=True)
    if model == "bundled":
        shutil.copytree(locate(model), partial)
    else:
        make_model(model, partial)
    partial.rename(folder)
    made_of.write_text(source)
    return folder


def _source(model: str) -> str:
    """What a model is made of: its shape, or a digest of the bundled files."""
    from coppice.models.locate import locate
    from tools.make_model import SHAPES

    if model != "bundled":
        return json.dumps(SHAPES[model], sort_keys=True)
    digest = hashlib.sha256()
    for path in sorted(locate(model).iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _make_ggufs(model: str, shop: Workshop) -> None:
    from tools.peers.to_gguf import write_gguf

    whole = places.gguf(model, "bf16")
    if not whole.exists():
        shop.say("write bf16.gguf")
        write_gguf(places.checkpoint(model), whole)
    for form in ("q8_0", "q4_0"):
        out = places.gguf(model, form)
        if not out.exists():
            partial = out.with_name(out.name + ".partial")
            tool = places.llama_tool("llama-quantize")
            shop.step(f"quantize to {form}", [tool, whole, partial, form.upper()], always=True)
            os.replace(partial, out)


def _make_openvino(model: str, form: str, shop: Workshop) -> None:
    out = places.openvino_folder(model, form)
    if out.exists():
        return
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [
        places.python("openvino").with_name("optimum-cli"),
        *("export", "openvino", "--task", "text-generation-with-past"),
        *("--model", places.checkpoint(model)),
        *OPENVINO_FLAGS[form],
        partial,
    ]
    env = places.quiet_environment()
    shop.step(f"export for OpenVINO as {form}", command, env=env, always=True)
    partial.rename(out)


def main() -> int:
    """``python -m tools.peers.models NAME...``; 1 when something could not be made."""
    failed = [line for model in sys.argv[1:] or MODELS for line in prepare(model)]
    print(*failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
