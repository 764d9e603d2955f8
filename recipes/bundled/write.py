"""Let the target write: ``python -m recipes.bundled.write`` after ``prepare``.

A draft is asked about text its target has written, so that is what it should learn from
(Zhou et al., DistillSpec, ICLR 2024: on-policy data). Beginnings come from the training part
of the streams; half of the continuations are greedy, half drawn at temperature 0.8 or 1.
"""

import argparse
from pathlib import Path

import numpy as np

from coppice import LLM, SamplingParams
from recipes.bundled.data import END_OF_TEXT_ID, MIXTURE, load_stream
from recipes.bundled.tokenizer import WORK

PROMPT, ANSWER = 64, 192
TEMPERATURES = (0.0, 0.8, 0.0, 1.0)


def beginnings(work: Path, count: int, seed: int) -> list[list[int]]:
    """Return ``count`` pieces of `PROMPT` training tokens, by source as training mixes them."""
    rng = np.random.default_rng([seed, count])
    pieces = []
    for source, share in MIXTURE.items():
        stream, _ = load_stream(work, "train", source)
        for start in rng.integers(len(stream) - PROMPT, size=round(share * count)):
            pieces.append(stream[start : start + PROMPT].astype(int).tolist())
    rng.shuffle(pieces)
    return pieces


def write(model: str, work: Path, tokens: int, seed: int) -> Path:
    """Write about ``tokens`` tokens to ``work/train_written.npy`` and return the path."""
    llm = LLM(model, max_sequences=32, speculate="off")
    prompts = beginnings(work, tokens // (PROMPT + ANSWER), seed)
    path, parts = work / "train_written.npy", []
    for at in range(0, len(prompts), 128):
        some = prompts[at : at + 128]
        params = [
            SamplingParams(temperature=TEMPERATURES[i % 4], max_tokens=ANSWER, seed=seed + at + i)
            for i in range(len(some))
        ]
        for result in llm.generate(some, params):
            ids = [*result.prompt_token_ids, *result.outputs[0].token_ids, END_OF_TEXT_ID]
            parts.append(np.array(ids, np.uint16))
        np.save(path, np.concatenate(parts))
        print(f"{sum(map(len, parts))} tokens written", flush=True)
    path.with_suffix(".bytes").write_text("0\n")
    return path


def main() -> None:
    """Parse the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the token streams")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write(args.model, args.work, args.tokens, args.seed)


if __name__ == "__main__":
    main()
