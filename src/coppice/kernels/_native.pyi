"""Types of the C++ extension (native/module.cpp). ``int`` addresses, ``0`` for null."""

class Packed:
    def __init__(self, *addresses_and_shape: int) -> None:
        """data, scales, zeros, bias; n, k, group, format (see kernels.h)."""

class RowArrays:
    def __init__(self, *addresses_and_sizes: int) -> None:
        """position, sequence, parent, slot, page_table, prefix_len; rows, sequences, max_pages."""

class Cache:
    def __init__(self, *addresses_and_shape: int) -> None:
        """k, v; pages, kv_heads, page_size, head_dim; whether bfloat16."""

def available() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def num_threads() -> int: ...
def set_num_threads(threads: int, /) -> None: ...
def advise_huge(address: int, size_bytes: int, /) -> None: ...
def read_probe(address: int, count: int, rounds: int, /) -> float: ...
def fma_probe(rounds: int, /) -> float: ...
def linear(packed: Packed, x: int, residual: int, out: int, rows: int, /) -> None: ...
def pack(packed: Packed, source: int, source_bf16: bool, first: int, count: int, /) -> None: ...
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
