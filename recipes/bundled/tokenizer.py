"""Train the byte-level BPE that both bundled models share.

Run ``python -m recipes.bundled.tokenizer`` once; it writes ``tokenizer.json`` and
``tokenizer_config.json`` to the work folder, from where the exporter copies them.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from recipes.bundled.corpus import DEFAULT_DATA, REPOSITORY, read_documents

VOCAB_SIZE = 4096
MAX_POSITIONS = 2048
END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = [END_OF_TEXT, IM_START, IM_END, PAD]
"""Special tokens; their ids are their positions here."""

# One digit a token; one leading blank joins a word; a run of blanks before it is one piece.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORK = REPOSITORY / "scratch" / "bundled"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a tokenizer of ``VOCAB_SIZE`` tokens, all 256 bytes among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """Return the content of ``tokenizer_config.json``, chat template included."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": PAD,
        "unk_token": None,
        "additional_special_tokens": [END_OF_TEXT, IM_START],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "added_tokens_decoder": {
            str(i): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, token in enumerate(SPECIAL)
        },
        "chat_template": TEMPLATE.read_text(encoding="utf-8"),
    }


def write_config(folder: Path) -> None:
    """Write ``tokenizer_config.json`` into ``folder``."""
    text = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Train on the training documents and save to the work folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the sources")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([d.text for d in read_documents(args.data) if not d.held_out])
    tokenizer.save(str(args.work / "tokenizer.json"))
    write_config(args.work)
    print(f"{tokenizer.get_vocab_size()} tokens -> {args.work / 'tokenizer.json'}")


if __name__ == "__main__":
    main()
