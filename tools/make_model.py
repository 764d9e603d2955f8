"""Write a random-weight checkpoint of a known shape, for benchmarks and tests.

    python tools/make_model.py qwen2.5-0.5b models/qwen
    python tools/make_model.py toy-gemma3 models/toy --dtype float32 --shards 3

The same name, dtype and seed give the same bytes. A random model talks nonsense; its speed
and memory are those of the real one.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coppice.models.plan import make_plan
from coppice.models.registry import read_config

DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float32": (torch.float32, "F32")}
BUNDLED = Path(__file__).parents[1] / "src/coppice/models/bundled/target"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TOY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "rope_scaling": LLAMA3_SCALING,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "toy-llama": {**TOY, "model_type": "llama"},
    "toy-mistral": {**TOY, "model_type": "mistral", "sliding_window": 96},
    "toy-qwen2": {**TOY, "model_type": "qwen2", "tie_word_embeddings": True},
    "toy-qwen3": {**TOY, "model_type": "qwen3"},
    "toy-gemma2": {**TOY, "model_type": "gemma2", "sliding_window": 96},
    "toy-gemma3": {**TOY, "model_type": "gemma3_text", "sliding_window": 96},
    "toy-phi3": {**TOY, "model_type": "phi3"},
    "toy-olmo2": {**TOY, "model_type": "olmo2"},
    "toy-smollm3": {**TOY, "model_type": "smollm3"},
    "toy-mixtral": {
        **TOY,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "toy-qwen3-moe": {
        **TOY,
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of this configuration."""
    return make_plan(read_config(config), {"model.embed_tokens.weight"}).tensors()


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values that keep activations in range, a function of name, shape, dtype and seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    out = torch.empty(shape, dtype=dtype)
    if len(shape) == 1:
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        return out.normal_(centre, 0.1, generator=generator)
    if "embed_tokens" in name:
        return out.normal_(0.0, 0.5, generator=generator)
    width = math.sqrt(3.0 / shape[-1])  # uniform is several times faster than normal
    return out.uniform_(-width, width, generator=generator)


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> int:
    """Write one safetensors file, tensor after tensor; return the bytes of its tensors."""
    kind, label = DTYPES[dtype]
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * kind.itemsize
        header[name] = {"dtype": label, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    blob = json.dumps(header).encode()
    blob += b" " * (-len(blob) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(blob)) + blob)
        for name, shape in shapes.items():
            tensor = random_tensor(name, shape, kind, seed)
            file.write(tensor.view(torch.uint8).numpy().data)
    return offset


def make_model(
    shape: str,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    shards: int = 1,
    tokenizer: bool = True,
) -> int:
    """Write a whole checkpoint folder; return the bytes of its tensors."""
    config = {**SHAPES[shape], "dtype": dtype, "eos_token_id": 0}
    tensors = tensor_shapes(config)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        for name in TOKENIZER_FILES:
            if (BUNDLED / name).exists():
                shutil.copyfile(BUNDLED / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        return write_shard(folder / "model.safetensors", tensors, dtype, seed)
    names = list(tensors)
    total, weight_map = 0, {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        total += write_shard(folder / file, {n: tensors[n] for n in part}, dtype, seed)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def main() -> int:
    """Read the arguments, write the checkpoint, say what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--no-tokenizer", action="store_true", help="weights only")
    args = parser.parse_args()
    start = time.perf_counter()
    size = make_model(
        args.shape,
        args.folder,
        dtype=args.dtype,
        seed=args.seed,
        shards=args.shards,
        tokenizer=not args.no_tokenizer,
    )
    took = time.perf_counter() - start
    print(f"{args.folder}: {args.shape}, {size / 2**20:.1f} MiB of {args.dtype} in {took:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
