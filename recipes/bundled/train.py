"""Train one bundled model: ``python -m recipes.bundled.train --model target``.

The schedule is warm-up, stable, decay. The budget is ``--hours`` of training time, or
``--tokens`` where a run must repeat exactly. A run that is killed goes on from its last
checkpoint when started again with the same arguments.
"""

import argparse
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from recipes.bundled.checkpoint import Progress, load_checkpoint, save_checkpoint
from recipes.bundled.data import MIXTURE, WindowSampler, load_stream
from recipes.bundled.evaluate import bits_per_byte
from recipes.bundled.model import SHAPES, Llama, num_params
from recipes.bundled.optimiser import export_moments, import_moments, make_optimiser
from recipes.bundled.tokenizer import WORK


@dataclass(frozen=True)
class Schedule:
    """How rate and window length follow the share of the budget that is used.

    Attributes:
        peak: learning rate between warm-up and decay.
        warmup_steps: steps of linear warm-up.
        decay_from: share of the budget after which the rate falls to zero linearly.
        lengths: window length in tokens from each share of the budget on.
    """

    peak: float
    warmup_steps: int = 100
    decay_from: float = 0.6
    lengths: tuple[tuple[float, int], ...] = ((0.0, 256), (0.6, 512), (0.88, 1024), (0.95, 2048))

    def length(self, used: float) -> int:
        """Return the window length, in tokens."""
        return max(length for start, length in self.lengths if used >= start)

    def rate(self, step: int, used: float) -> float:
        """Return the learning rate of a step."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.peak * warm * min(1.0, max(0.02, (1 - used) / (1 - self.decay_from)))


class Trainer:
    """Owns model, optimisers and progress of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.schedule = Schedule(args.rate, decay_from=args.decay_from)
        self.path: Path = args.work / f"{args.model}.checkpoint.safetensors"
        self.model = Llama(SHAPES[args.model])
        self.initialise()
        self.model.to(args.device)
        self.optimiser = make_optimiser(self.model, args.weight_decay)
        self.progress = Progress()
        if self.path.exists():
            weights, moments, self.progress = load_checkpoint(self.path)
            self.model.load_state_dict(weights)
            import_moments(self.model, self.optimiser, moments)
        mixture = self.mixture()
        streams = {s: load_stream(args.work, "train", s)[0] for s in mixture}
        self.sampler = WindowSampler(streams, args.seed, self.progress.cursor, mixture)
        self.stopped = False

    def initialise(self) -> None:
        """Give the new model its first weights."""
        self.model.initialise(self.args.seed)

    def mixture(self) -> dict[str, float]:
        """Return the share of the windows drawn from each source."""
        return MIXTURE

    def mean_loss(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean cross entropy of ``[B, T]`` inputs and targets, in nats."""
        return functional.cross_entropy(self.model(ids).flatten(0, 1), wanted.flatten())

    def used(self) -> float:
        """Return the share of the budget that is used, 0 to 1."""
        shares = [0.0]
        if self.args.hours:
            shares.append(self.progress.elapsed_s / (3600 * self.args.hours))
        if self.args.tokens:
            shares.append(self.progress.tokens / self.args.tokens)
        return max(shares)

    def step(self, used: float) -> float:
        """Do one optimiser step and return its loss in nats per token."""
        length = self.schedule.length(used)
        rows = max(1, self.args.batch_tokens // length)
        batch = torch.from_numpy(self.sampler.batch(rows, length)).to(self.args.device)
        loss = self.mean_loss(batch[:, :-1], batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = self.schedule.rate(self.progress.step, used)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.progress.step += 1
        self.progress.tokens += rows * length
        return loss.item()

    def save(self) -> None:
        """Write the checkpoint."""
        moments = export_moments(self.model, self.optimiser)
        save_checkpoint(self.path, self.model.state_dict(), moments, self.progress)

    def run(self) -> None:
        """Train until the budget is used or a signal asks to stop."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopped", True))
        signal.signal(signal.SIGINT, lambda *_: setattr(self, "stopped", True))
        print(f"{self.args.model}: {num_params(self.model)} weights", flush=True)
        mean, saved, last = 0.0, time.monotonic(), time.monotonic()
        while (used := self.used()) < 1 and not self.stopped:
            tokens = self.progress.tokens
            loss = self.step(used)
            now = time.monotonic()
            self.progress.elapsed_s += now - last
            rate, last = (self.progress.tokens - tokens) / (now - last), now
            mean = loss if mean == 0 else 0.8 * mean + 0.2 * loss
            if self.progress.step % self.args.log_every == 0:
                print(
                    f"step {self.progress.step} used {used:.3f} loss {mean:.3f} "
                    f"tok/s {rate:.0f} tokens {self.progress.tokens} "
                    f"elapsed_s {self.progress.elapsed_s:.0f}",
                    flush=True,
                )
            if now - saved > self.args.save_s:
                self.save()
                self.report()
                saved = last = time.monotonic()
        self.save()
        if not self.stopped:
            self.report()

    def report(self, max_windows: int = 2) -> None:
        """Print bits per byte on a little held-out text; ``evaluate`` measures all of it."""
        scores = bits_per_byte(self.model, self.args.work, self.args.device, max_windows)
        print("bpb " + " ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the arguments that every kind of training has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the token streams")
    parser.add_argument("--hours", type=float, help="training time, resumed runs included")
    parser.add_argument("--tokens", type=int, help="tokens to see; repeats exactly")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--decay-from", type=float, default=0.6)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--save-s", type=float, default=600, help="seconds between checkpoints")
    parser.add_argument("--log-every", type=int, default=20)
    return parser


def run(parser: argparse.ArgumentParser, trainer: type[Trainer]) -> None:
    """Parse the arguments and train."""
    args = parser.parse_args()
    if not args.hours and not args.tokens:
        parser.error("give --hours or --tokens")
    torch.set_num_threads(args.threads)
    trainer(args).run()


def main() -> None:
    """Train from data alone."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), required=True)
    run(parser, Trainer)


if __name__ == "__main__":
    main()
