"""Measure the models on held-out text: ``python -m recipes.bundled.evaluate``."""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from recipes.bundled.data import load_stream
from recipes.bundled.export import load_model
from recipes.bundled.model import Llama
from recipes.bundled.tokenizer import WORK

HELD_OUT = ("novels", "plays", "python", "chat")
WINDOW = 1024


def _windows(work: Path, source: str, max_windows: int | None) -> tuple[list[Tensor], float]:
    """Return ``[1, <= WINDOW + 1]`` windows of a held-out stream, and bytes per token."""
    stream, num_bytes = load_stream(work, "held", source)
    ids = torch.from_numpy(stream.astype("int64"))
    starts = range(0, len(ids) - 1, WINDOW)
    windows = [ids[None, s : s + WINDOW + 1] for s in starts]
    return windows[:max_windows], num_bytes / len(ids)


@torch.no_grad()
def bits_per_byte(
    model: Llama, work: Path, device: str = "cpu", max_windows: int | None = None
) -> dict[str, float]:
    """Return bits per byte of UTF-8 text for each held-out source.

    Special tokens cost bits and stand for no bytes. ``max_windows`` limits the windows
    of each source; a window sees nothing of the one before it.
    """
    scores = {}
    for source in HELD_OUT:
        windows, bytes_per_token = _windows(work, source, max_windows)
        nats, tokens = 0.0, 0
        for ids in windows:
            logits = model(ids[:, :-1].to(device))
            targets = ids[0, 1:].to(device)
            nats += functional.cross_entropy(logits[0], targets, reduction="sum").item()
            tokens += len(targets)
        scores[source] = nats / math.log(2) / (tokens * bytes_per_token)
    return scores


@torch.no_grad()
def agreement(
    draft: Llama, target: Llama, work: Path, best: int = 4, max_windows: int | None = None
) -> dict[str, list[float]]:
    """Return how often the target's greedy token is the draft's first, or among its best.

    Returns:
        ``[top-1 share, top-best share]`` for each held-out source, both 0 to 1.
    """
    shares = {}
    for source in HELD_OUT:
        first = among = total = 0
        for ids in _windows(work, source, max_windows)[0]:
            wanted = target(ids[:, :-1])[0].argmax(-1, keepdim=True)  # [T, 1]
            hits = draft(ids[:, :-1])[0].topk(best, dim=-1).indices == wanted  # [T, best]
            first += int(hits[:, 0].sum())
            among += int(hits.any(-1).sum())
            total += len(wanted)
        shares[source] = [first / total, among / total]
    return shares


def main() -> None:
    """Print both measures of the shipped weights as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the token streams")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {name: load_model(name) for name in ("target", "draft")}
    report = {f"bpb_{n}": bits_per_byte(m, args.work) for n, m in models.items()}
    report["agreement_top1_top4"] = agreement(models["draft"], models["target"], args.work)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
