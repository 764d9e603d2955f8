"""Widen a small Llama to a larger shape without changing what it computes.

    python tools/widen.py src/coppice/models/bundled/target qwen2.5-0.5b models/wide

A random model of a real shape has real costs but accepts no draft; the widened one has the
small model's answers, so both acceptance and cost are real. Added hidden dims hold zeros
(norm weights and epsilon make up for the wider mean), added heads and layers write nothing,
added vocabulary entries are kept from winning: one added hidden dim holds the same tiny value
for every real token, and the output matrix reads it as a large negative logit for the rest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tools.make_model import SHAPES, TOKENIZER_FILES, tensor_shapes

MARK = 2.0**-10
"""What a real token's embedding holds in the marked dim; its square is lost in any mean."""


class Widener:
    """Places the small model's numbers in the large model's tensors.

    Args:
        small: its config.
        large: the target shape's config.
    """

    def __init__(self, small: dict[str, Any], large: dict[str, Any]) -> None:
        self.small, self.large = small, large
        group = [c["num_attention_heads"] // c["num_key_value_heads"] for c in (small, large)]
        self._check(group)
        # Query head h of KV head g must stay with its KV head.
        self.heads = [
            h // group[0] * group[1] + h % group[0] for h in range(small["num_attention_heads"])
        ]
        self.shrink = (small["hidden_size"] / large["hidden_size"]) ** 0.5

    def _check(self, group: list[int]) -> None:
        small, large = self.small, self.large
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")
        fits = all(small[n] <= large[n] for n in names) and group[0] <= group[1]
        if not fits or small["vocab_size"] > large["vocab_size"]:
            raise SystemExit("The large shape is not larger in every way.")
        if small["head_dim"] != head_dim(large):
            raise SystemExit("Both shapes need the same head size.")
        if small["hidden_size"] == large["hidden_size"]:
            raise SystemExit("The hidden size must grow: one added dim is needed.")

    def config(self) -> dict[str, Any]:
        """The widened model's config: the large shape with the small one's meaning."""
        kept = ("rope_theta", "max_position_embeddings", "eos_token_id", "hidden_act")
        eps = self.small["rms_norm_eps"] * self.shrink**2
        return {
            **self.large,
            **{name: self.small[name] for name in kept},
            "rope_scaling": None,
            "rms_norm_eps": eps,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        }

    def place(self, name: str, part: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """The large tensor ``name``, from the small one of that name if there is one."""
        out = torch.zeros(shape)
        if name.endswith("norm.weight"):
            out.fill_(self.shrink)
        if name == "model.norm.weight":
            out[self.small["hidden_size"]] = 1.0 / MARK
        if part is not None:
            self._write(name, part.float(), out)
        return out

    def _write(self, name: str, part: Tensor, out: Tensor) -> None:
        hidden = self.small["hidden_size"]
        if name.endswith("norm.weight"):
            out[:hidden] = part * self.shrink
        elif name.endswith("embed_tokens.weight"):
            real = part.shape[0]
            out[:real, :hidden] = part
            out[:real, hidden] = MARK
            out[real:, hidden] = -1.0 / MARK
        elif name.endswith("q_proj.weight"):
            out.view(-1, self.small["head_dim"], out.shape[1])[self.heads, :, :hidden] = part.view(
                len(self.heads), -1, hidden
            )
        elif name.endswith("o_proj.weight"):
            out.view(out.shape[0], -1, self.small["head_dim"])[:hidden, self.heads] = part.view(
                hidden, len(self.heads), -1
            )
        else:  # rows and columns that grew at their end
            out[: part.shape[0], : part.shape[1]] = part


def head_dim(config: dict[str, Any]) -> int:
    """Dims of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def widen(source: Path, large: dict[str, Any], folder: Path) -> None:
    """Write ``source``, a Llama checkpoint folder, in a larger shape, such as one of `SHAPES`."""
    small = json.loads((source / "config.json").read_text())
    widener = Widener(small, large)
    config = widener.config()
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, "chat_template.jinja"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {}
    with safe_open(source / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        have = set(file.keys())
        for name, wide in tensor_shapes(config).items():
            part = file.get_tensor(name) if name in have else None
            tensors[name] = widener.place(name, part, tuple(wide)).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> int:
    """Read the arguments and write the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    widen(args.source, SHAPES[args.shape], args.folder)
    print(f"{args.folder}: {args.source} in the shape of {args.shape}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
