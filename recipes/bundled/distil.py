"""Train the draft to imitate the target: ``python -m recipes.bundled.distil``.

The draft begins as a cut of the target, its embedding and some of its layers, and learns the
target's whole distribution (Hinton et al., Distilling the Knowledge in a Neural Network,
2015) over the recipe's data and over text that the target wrote itself (``write.py``).
Interrupted runs go on as those of ``train.py`` do.
"""

import argparse

import torch
from torch import Tensor

from recipes.bundled.data import MIXTURE
from recipes.bundled.evaluate import agreement
from recipes.bundled.export import load_model
from recipes.bundled.model import SHAPES, Llama
from recipes.bundled.train import Trainer, make_parser, run

WRITTEN = 0.6
"""Share of the windows that the target wrote."""


class Distiller(Trainer):
    """Trains against the target's distribution instead of the data's next token."""

    def __init__(self, args: argparse.Namespace) -> None:
        args.model = "draft"
        self.target = load_model("target").to(args.device)
        super().__init__(args)

    def initialise(self) -> None:
        """Start as the target with all but a few of its layers left out."""
        if SHAPES["draft"].hidden_size != SHAPES["target"].hidden_size:
            super().initialise()
            return
        self.model.load_state_dict(cut(self.target, kept_layers()))

    def mixture(self) -> dict[str, float]:
        """See `Trainer`; most windows are the target's own writing."""
        return {s: (1 - WRITTEN) * share for s, share in MIXTURE.items()} | {"written": WRITTEN}

    def mean_loss(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean divergence of the draft from the target, in nats per position."""
        with torch.no_grad():
            taught = self.target(ids).flatten(0, 1).log_softmax(-1)  # [B * T, V]
        learnt = self.model(ids).flatten(0, 1).log_softmax(-1)
        return torch.nn.functional.kl_div(learnt, taught, log_target=True, reduction="batchmean")

    def report(self, max_windows: int = 2) -> None:
        """Print how often the draft agrees on a little held-out text."""
        shares = agreement(self.model, self.target, self.args.work, max_windows=max_windows)
        print(" ".join(f"{k} {a:.3f} {b:.3f}" for k, (a, b) in shares.items()), flush=True)


def kept_layers() -> list[int]:
    """Numbers of the target's layers that the draft begins with, spread from first to last."""
    have, want = SHAPES["target"].num_layers, SHAPES["draft"].num_layers
    return [round(i * (have - 1) / max(1, want - 1)) for i in range(want)]


def cut(target: Llama, layers: list[int]) -> dict[str, Tensor]:
    """Return the target's weights with only ``layers`` of its layers, renumbered."""
    weights = {}
    for name, weight in target.state_dict().items():
        if ".layers." not in name:
            weights[name] = weight.clone()
            continue
        before, _, after = name.partition(".layers.")
        number, _, rest = after.partition(".")
        if int(number) in layers:
            weights[f"{before}.layers.{layers.index(int(number))}.{rest}"] = weight.clone()
    return weights


def main() -> None:
    """Parse the arguments and train the draft."""
    run(make_parser(__doc__), Distiller)


if __name__ == "__main__":
    main()
