"""Types of the C++ extension (native/module.cpp). ``int`` addresses, ``0`` for null."""

from typing_extensions import Buffer

class Packed:
    def __init__(self, *addresses_and_shape: int) -> None:
        """data, scales, zeros, bias; n, k, group, format (see kernels.h)."""

class RowArrays:
    def __init__(self, *addresses_and_sizes: int) -> None:
        """position, sequence, parent, slot, page_table, prefix_len; rows, sequences, max_pages."""
    @property
    def positions(self) -> int:
        """One more than the largest position."""

class Cache:
    def __init__(self, *addresses_and_shape: int) -> None:
        """k, v; pages, kv_heads, page_size, head_dim; kind of the elements."""

class Layer:
    """The layer of a `Program`: packed weights, addresses of norms and of the rotary table."""

    def __init__(
        self,
        *,
        qkv: Packed,
        output: Packed,
        gate_up: Packed,
        down: Packed,
        before_attention: int,
        after_attention: int,
        before_mlp: int,
        after_mlp: int,
        q_norm: int,
        k_norm: int,
        cos_sin: int,
        half: int,
        window: int,
    ) -> None: ...

class Program:
    """A decoder's forward pass (native/program.h)."""

    def __init__(
        self,
        *,
        embedding: Packed,
        head: Packed,
        norm: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_position: int,
        qk_norm: int,
        activation: int,
        eps: float,
        attention_scale: float,
        attention_softcap: float,
        embedding_scale: float,
        layers: list[Layer],
    ) -> None: ...
    def use_pages(self, pages: list[Cache], /) -> None: ...
    def run(
        self, token: int, rows: RowArrays, wanted: int, num_wanted: int, logits: int, /
    ) -> None: ...
    def run_greedy(
        self, token: int, rows: RowArrays, wanted: int, num_wanted: int, vocabulary: int, /
    ) -> list[int]: ...

class Team:
    """Threads of their own for operators of the threads that enter (native/parallel.h)."""

    def __init__(self, threads: int, /) -> None: ...
    def enter(self) -> None: ...
    @staticmethod
    def leave() -> None: ...

class SuffixIndex:
    """A text and where its tokens were seen before (native/suffix.h)."""

    def __init__(self, most: int, last: int, /) -> None: ...
    def __len__(self) -> int: ...
    def extend(self, tokens: list[int], /) -> None: ...
    def end_text(self) -> None: ...
    def tokens(self) -> list[int]: ...
    def propose(
        self, history: SuffixIndex | None, limit: int
    ) -> tuple[list[int], list[int], list[float]]: ...
    @property
    def size_bytes(self) -> int: ...

def checksum(buffer: Buffer, /) -> int: ...
def available() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def num_threads() -> int: ...
def set_num_threads(threads: int, /) -> None: ...
def expect_work() -> None: ...
def advise_huge(address: int, size_bytes: int, /) -> None: ...
def read_probe(address: int, count: int, rounds: int, /) -> float: ...
def fma_probe(rounds: int, /) -> float: ...
def int8_probe(rounds: int, /) -> float: ...
def linear(packed: Packed, x: int, residual: int, out: int, rows: int, /) -> None: ...
def pack(packed: Packed, source: int, source_bf16: bool, first: int, count: int, /) -> None: ...
def pack_codes(
    packed: Packed, codes: int, scales: int, zeros: int, first: int, count: int, /
) -> None: ...
def unpack(packed: Packed, out: int, /) -> None: ...
def gather(packed: Packed, token: int, out: int, rows: int, /) -> None: ...
def norm(x: int, weight: int, out: int, rows: int, n: int, eps: float, /) -> None: ...
def gate(gate_up: int, out: int, rows: int, n: int, kind: int, /) -> None: ...
def rope(
    qkv: int,
    cos_sin: int,
    q_weight: int,
    k_weight: int,
    q: int,
    cache: Cache,
    rows: RowArrays,
    heads: int,
    half: int,
    qk_norm: int,
    eps: float,
    max_position: int,
    /,
) -> None: ...
def sample(
    logits: int,
    params: int,
    position: int,
    mask: int,
    mask_words: int,
    token: int,
    fault: int,
    logprob: int,
    top_token: int,
    top_logprob: int,
    rows: int,
    vocab: int,
    top_columns: int,
    /,
) -> None: ...
def rank(
    logits: int,
    params: int,
    position: int,
    token: int,
    share: int,
    sharpness: float,
    rows: int,
    vocab: int,
    width: int,
    /,
) -> None: ...
def gumbel(seed: int, position: int, n: int, out: int, /) -> None: ...
def attention(
    q: int,
    sinks: int,
    out: int,
    cache: Cache,
    rows: RowArrays,
    heads: int,
    scale: float,
    softcap: float,
    window: int,
    /,
) -> None: ...
