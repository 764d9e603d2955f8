"""Write the shipped folders: ``python -m recipes.bundled.export``."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from recipes.bundled.checkpoint import load_checkpoint
from recipes.bundled.corpus import REPOSITORY
from recipes.bundled.model import SHAPES, Llama, Shape
from recipes.bundled.tokenizer import END_OF_TEXT, IM_END, PAD, SPECIAL, WORK, write_config

SHIPPED = REPOSITORY / "src" / "coppice" / "models" / "bundled"


def hf_config(shape: Shape) -> dict[str, object]:
    """Return the ``config.json`` of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": [SPECIAL.index(IM_END), SPECIAL.index(END_OF_TEXT)],
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pad_token_id": SPECIAL.index(PAD),
        "pretraining_tp": 1,
        "rms_norm_eps": shape.rms_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def generation_config() -> dict[str, object]:
    """Return the ``generation_config.json`` of both models."""
    return {
        "do_sample": True,
        "eos_token_id": [SPECIAL.index(IM_END), SPECIAL.index(END_OF_TEXT)],
        "pad_token_id": SPECIAL.index(PAD),
        "temperature": 0.7,
        "top_p": 0.9,
    }


def export(name: str, work: Path, shipped: Path = SHIPPED) -> Path:
    """Write the folder of one model from its latest checkpoint and return it."""
    weights, _, progress = load_checkpoint(work / f"{name}.checkpoint.safetensors")
    folder = shipped / name
    folder.mkdir(parents=True, exist_ok=True)
    halves = {k: v.to(torch.bfloat16).contiguous() for k, v in weights.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    for file, content in (
        ("config.json", hf_config(SHAPES[name])),
        ("generation_config.json", generation_config()),
    ):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(work / "tokenizer.json", folder / "tokenizer.json")
    write_config(folder)
    print(f"{name}: step {progress.step}, {progress.tokens} tokens -> {folder}")
    return folder


def load_model(name: str, shipped: Path = SHIPPED) -> Llama:
    """Return a shipped model in float32, ready to evaluate."""
    model = Llama(SHAPES[name])
    weights = load_file(shipped / name / "model.safetensors")
    scales = {k.removesuffix("_scale"): v for k, v in weights.items() if k.endswith("_scale")}
    model.load_state_dict(
        {
            k: v.float() * scales[k].float() if k in scales else v.float()
            for k, v in weights.items()
            if not k.endswith("_scale")
        }
    )
    return model.eval()


def main() -> None:
    """Export one or both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the checkpoints")
    parser.add_argument("--model", choices=sorted(SHAPES), action="append")
    args = parser.parse_args()
    for name in args.model or sorted(SHAPES):
        export(name, args.work)


if __name__ == "__main__":
    main()
