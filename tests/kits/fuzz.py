"""Opens mutated files in a process of its own: ``python -m tests.kits.fuzz KIND COUNT SEED``.

Each mutation must open or be refused as `CoppiceError`, within twice the file's size of
Python memory (and a fixed allowance for objects of the parser itself). Exit status 0 says
that all of them did; a crash or another exception ends the process otherwise, and the last
line printed names the mutation.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from coppice.cache.marks import Marks
from coppice.cache.segment import SegmentForm
from coppice.cache.segments import FOLDER, SegmentStore
from coppice.errors import CheckpointError, CoppiceError
from coppice.models.adapter import Adapter
from coppice.models.checkpoint import open_folder
from coppice.models.gguf import open_gguf
from coppice.models.safetensors import SafetensorsFile
from coppice.models.tokenizer import Tokenizer
from tests.kits.adapter import make_adapter
from tests.kits.fake_model import write_fake_model
from tools.make_model import make_model

MARKS = Marks(b"s" * 32, b"fuzz")
ALLOWANCE_BYTES = 512 << 10
INTERESTING = (
    b"\xff" * 8,
    b"\0" * 8,
    b"\xff\xff\xff\x7f",
    b"1e999",
    b"-1",
    b"[[[[",
    b'"',
    b"\\ud800",
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four edits: bytes, interesting values, cuts, repetitions."""
    made = bytearray(data)
    head = min(len(made), 2048)  # headers are where decisions are made
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(head if rng.random() < 0.8 else len(made)) if made else 0
        kind = rng.randrange(5)
        if kind == 0:
            made[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            value = rng.choice(INTERESTING)
            made[at : at + len(value)] = value
        elif kind == 2:
            del made[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 3:
            made[at:at] = made[at : at + rng.choice((1, 8, 64))]
        elif rng.random() < 0.2:
            del made[at:]
        head = max(1, min(len(made), 2048))
        if not made:
            break
    return bytes(made)


def safetensors_file(folder: Path) -> Path:
    """Three small tensors."""
    path = folder / "model.safetensors"
    save_file({name: torch.ones(4, 8) for name in ("a", "b", "c")}, path)
    return path


def open_safetensors(path: Path) -> None:
    """Read every tensor."""
    file = SafetensorsFile(path)
    try:
        for name in list(file.entries):
            file.read(name)
    finally:
        file.close()


def gguf_file(folder: Path) -> Path:
    """A few keys and two tensors."""
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_file(folder: Path) -> Path:
    """Bytes and a template."""
    return write_fake_model(folder) / "tokenizer.json"


def adapter_file(folder: Path) -> Path:
    """Factors for a toy model, which lies beside them."""
    make_model("toy-llama", folder / "base", dtype="float32", tokenizer=False)
    made = make_adapter(folder / "adapter", folder / "base", rank=2, alpha=4.0)
    return made / "adapter_model.safetensors"


def add_adapter(path: Path) -> None:
    """Open it, hold it against its model and read all it changes."""
    source = open_folder(path.parent.parent / "base").source
    try:
        adapter = Adapter(path.parent)
        try:
            adapter.check(source)
            for name in adapter.factors:
                adapter.change(name)
        finally:
            adapter.close()
    finally:
        source.close()


SEGMENT = SegmentForm(b"f" * 32, page_size=16, page_bytes=256, slots=8)
SEGMENT_PAGES = [
    (MARKS.child(MARKS.root("fuzz"), [i] * 16), np.full(256, i, np.uint8)) for i in range(6)
]


def segment_file(folder: Path) -> Path:
    """Six KV pages on disk."""
    store = open_segments(folder)
    for key, page in SEGMENT_PAGES:
        store.write(key, page)
    store.close()
    (path,) = (folder / FOLDER).glob("*.kv")
    return path


def open_segments(folder: Path) -> SegmentStore:
    """The store in a folder."""
    return SegmentStore(folder, SEGMENT, bound_bytes=1 << 20, max_age_s=1e9).open()


def read_segment(path: Path) -> None:
    """Ask for every page: each comes as it was written or not at all."""
    store = open_segments(path.parents[1])
    try:
        asked, damaged = [key for key, _ in SEGMENT_PAGES], False
        while asked:
            found = store.read(asked)
            for key, page in zip(asked, found, strict=False):
                damaged |= page is None
                if page is not None and not (page == key.tokens[0]).all():
                    raise AssertionError("a damaged page was believed")
            asked = asked[len(found) :]
    finally:
        store.close()
    if damaged:
        raise CheckpointError("Some pages are damaged.")


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "safetensors": (safetensors_file, open_safetensors),
    "gguf": (gguf_file, open_gguf),
    "adapter": (adapter_file, add_adapter),
    "adapter settings": (
        lambda folder: adapter_file(folder).with_name("adapter_config.json"),
        add_adapter,
    ),
    "kv-segment": (segment_file, read_segment),
    "tokenizer": (tokenizer_file, lambda path: Tokenizer.from_folder(path.parent)),
}


def main() -> int:
    """Try them all."""
    parser = argparse.ArgumentParser(prog="tests.kits.fuzz", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("count", type=int, help="mutations")
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    kind, count, seed = args.kind, args.count, args.seed
    make, open_ = KINDS[kind]
    with tempfile.TemporaryDirectory() as name:
        path = make(Path(name))
        original = path.read_bytes()
        open_(path)  # as it is, it opens; and what is loaded once is loaded now
        opened = worst = 0
        tracemalloc.start()
        for number in range(count):
            data = mutate(original, random.Random(seed * 1_000_003 + number))
            path.write_bytes(data)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                open_(path)
                opened += 1
            except CoppiceError:
                pass
            except BaseException as error:
                print(f"{kind} mutation {number} of seed {seed}: {error!r}", flush=True)
                return 1
            used = tracemalloc.get_traced_memory()[1] - before
            worst = max(worst, used - 2 * len(data))
            if worst > ALLOWANCE_BYTES:
                print(f"{kind} mutation {number} of seed {seed}: {used} bytes for {len(data)}")
                return 1
    print(f"{kind}: {count} mutations, {opened} opened, the others refused")
    return 0 if 0 < opened < count else 2


if __name__ == "__main__":
    raise SystemExit(main())
