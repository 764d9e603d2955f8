"""Rotary append and paged attention against float64, and invariance to chunking."""

import pytest
import torch

from coppice import kernels
from coppice.kernels.pages import (
    page_shape,
    page_size_of,
    read_keys,
    read_values,
    write_keys,
    write_values,
)
from coppice.kernels.rows import Rows
from tests.unit.kernels import exact
from tests.unit.kernels.exact import attention, rms_norm, rotate

DTYPES = [torch.float32, torch.bfloat16]


def pages(num, kv_heads, page_size, head_dim, dtype=torch.float32):
    """K and V pages full of NaN: whatever is not written must not be read (-1 in int8: NaN too,
    where it is read as a scale)."""
    shape = page_shape(num, kv_heads, page_size, head_dim, dtype)
    stale = -1 if dtype == torch.int8 else torch.nan
    return torch.full(shape, stale, dtype=dtype), torch.full(shape, stale, dtype=dtype)


def fill(k, v, rows, length, head_dim, sequence=0):
    """Random keys and values in the first ``length`` slots of a sequence."""
    slot, page_size = torch.arange(length), page_size_of(k)
    page = rows.page_table[sequence][slot // page_size].long()
    for cache, write in ((k, write_keys), (v, write_values)):
        write(cache, page, slot % page_size, torch.randn(length, cache.shape[1], head_dim))


def page_ids(length, page_size, total=64):
    return torch.randperm(total)[: -(-length // page_size)].tolist()


def chunk(length, start, table):
    return Rows.chunk([0] * length, table, start)


def tree(prefix, parents, table):
    """Rows of a token tree on a cached prefix: siblings share a position, not a slot."""
    n = len(parents)
    depth = []
    for parent in parents:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    i32 = torch.int32
    return Rows(
        token=torch.zeros(n, dtype=i32),
        position=torch.tensor([prefix + d for d in depth], dtype=i32),
        sequence=torch.zeros(n, dtype=i32),
        parent=torch.tensor(parents, dtype=i32),
        slot=torch.arange(prefix, prefix + n, dtype=i32),
        adapter=torch.full((n,), -1, dtype=i32),
        logit_rows=torch.arange(n, dtype=i32),
        page_table=torch.tensor([table], dtype=i32),
        prefix_len=torch.tensor([prefix], dtype=i32),
    )


def check(ops, rows, length, shape, dtype=torch.float32, q_scale=1.0, **options):
    """One attention call against float64; returns its result."""
    heads, kv_heads, page_size, head_dim = shape
    k, v = pages(64, kv_heads, page_size, head_dim, dtype)
    fill(k, v, rows, length, head_dim)
    q = torch.randn(rows.num_rows, heads, head_dim) * q_scale
    options = {"scale": head_dim**-0.5, **options}
    got = ops.attention(q, rows, k, v, **options)
    want = attention(q, rows, k, v, **options)
    # Logits of size s carry an error of about s * 2^-22, which softmax passes on.
    tolerance = 2e-6 + 1e-6 * q_scale * head_dim**0.5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    return got


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("head_dim", [8, 20, 32, 64, 80, 96, 128, 256])
def test_head_dims(native, head_dim, dtype):
    torch.manual_seed(head_dim)
    rows = chunk(9, 61, page_ids(70, 16))
    check(native, rows, 70, (4, 2, 16, head_dim), dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (8, 1), (14, 2), (9, 3), (130, 1)])
def test_group_ratios(native, heads, kv_heads):
    rows = chunk(5, 14, page_ids(19, 16))
    check(native, rows, 19, (heads, kv_heads, 16, 16))


@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 112])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 129])
def test_lengths_around_page_and_block_boundaries(native, length, page_size):
    table = page_ids(length, page_size, 160)
    k, v = pages(160, 2, page_size, 16)
    rows = chunk(1, length - 1, table)
    fill(k, v, rows, length, 16)
    q = torch.randn(1, 4, 16)
    got = native.attention(q, rows, k, v, scale=0.25)
    want = attention(q, rows, k, v, scale=0.25)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 70, 1000])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_windows_and_softcap(native, window, softcap):
    rows = chunk(90, 50, page_ids(140, 16))
    check(native, rows, 140, (4, 2, 16, 16), window=window, softcap=softcap, q_scale=4.0)


def test_sinks_take_mass(any_ops):
    rows = chunk(40, 30, page_ids(70, 16))
    for sinks in (torch.randn(4), torch.full((4,), 100.0), torch.full((4,), -100.0)):
        check(any_ops, rows, 70, (4, 2, 16, 32), sinks=sinks)


@pytest.mark.parametrize("q_scale", [0.0, 100.0, 1e-38])
def test_extreme_logits(native, q_scale):
    """±100 and far beyond: the largest logit wins and nothing overflows."""
    rows = chunk(20, 60, page_ids(80, 16))
    check(native, rows, 80, (2, 1, 16, 32), q_scale=q_scale, scale=1.0)


PARENTS = {
    "siblings": [-1, 0, 0, 0],
    "roots": [-1, -1, -1],
    "binary": [-1, 0, 0, 1, 1, 2, 2],
    "chain then fork": [-1, 0, 1, 2, 2, 4, 3],
    "comb": [-1, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14],
}


@pytest.mark.parametrize("window", [0, 5, 70])
@pytest.mark.parametrize("prefix", [0, 1, 16, 63, 64, 65, 100])
@pytest.mark.parametrize("shape", PARENTS)
def test_token_trees(native, shape, prefix, window):
    parents = PARENTS[shape]
    length = prefix + len(parents)
    rows = tree(prefix, parents, page_ids(length, 16))
    for dtype in (torch.float32, torch.int8):
        check(native, rows, length, (4, 2, 16, 16), dtype, window=window)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_tree_path_equals_the_same_tokens_in_a_row(native, dtype):
    """What a path through a tree computes is bitwise what plain decoding computes."""
    prefix, parents = 90, PARENTS["comb"]
    path = [0, 2, 4, 6, 8, 10, 12, 14]
    table = page_ids(120, 16)
    k, v = pages(64, 2, 16, 32, dtype)
    rows = tree(prefix, parents, table)
    fill(k, v, rows, prefix, 32)
    qkv = torch.randn(len(parents), 8 * 32)
    cos_sin = torch.randn(200, 2, 16)
    q = native.rope_append(qkv, rows, k, v, cos_sin, num_heads=4)
    branched = native.attention(q, rows, k, v, scale=0.2)
    for depth, node in enumerate(path):
        one = chunk(1, prefix + depth, table)
        q = native.rope_append(qkv[node : node + 1], one, k, v, cos_sin, num_heads=4)
        straight = native.attention(q, one, k, v, scale=0.2)
        assert torch.equal(straight[0], branched[node]), depth


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("window", [0, 33])
@pytest.mark.parametrize("head_dim", [24, 64])
def test_row_is_the_same_however_chunked(native, dtype, window, head_dim):
    torch.manual_seed(0)
    total, heads, kv_heads = 200, 14, 2
    qkv = torch.randn(total, (heads + 2 * kv_heads) * head_dim)
    cos_sin = torch.randn(256, 2, head_dim // 2)
    table = page_ids(total, 16)

    def run(sizes):
        k, v = pages(64, kv_heads, 16, head_dim, dtype)
        out, start = [], 0
        for size in sizes:
            rows = chunk(size, start, table)
            part = qkv[start : start + size]
            q = native.rope_append(part, rows, k, v, cos_sin, num_heads=heads)
            out.append(native.attention(q, rows, k, v, scale=0.1, window=window, softcap=30.0))
            start += size
        return torch.cat(out)

    whole = run([total])
    for sizes in ([1] * total, [64, 64, 64, 8], [33, 1, 5, 161], [2, 3, 5, 8, 16, 166]):
        assert torch.equal(run(sizes), whole), sizes


def test_neighbours_and_threads_do_not_change_a_row(native):
    lengths = [70, 1, 17, 130]
    tables = torch.arange(4 * 9, dtype=torch.int32).view(4, 9)
    k, v = (
        torch.randn(page_shape(36, 2, 16, 32, torch.float32)),
        torch.randn(page_shape(36, 2, 16, 32, torch.float32)),
    )
    i32 = torch.int32

    def batch(which):
        index = [lengths[i] - 1 for i in which]
        return Rows(
            token=torch.zeros(len(which), dtype=i32),
            position=torch.tensor(index, dtype=i32),
            sequence=torch.arange(len(which), dtype=i32),
            parent=torch.full((len(which),), -1, dtype=i32),
            slot=torch.tensor(index, dtype=i32),
            adapter=torch.full((len(which),), -1, dtype=i32),
            logit_rows=torch.arange(len(which), dtype=i32),
            page_table=tables[which].contiguous(),
            prefix_len=torch.tensor(index, dtype=i32),
        )

    q = torch.randn(4, 6, 32)
    together = native.attention(q, batch([0, 1, 2, 3]), k, v, scale=0.3)
    try:
        for threads in (1, 3):
            kernels.set_num_threads(threads)
            shuffled = native.attention(q[[2, 0, 3, 1]], batch([2, 0, 3, 1]), k, v, scale=0.3)
            assert torch.equal(shuffled, together[[2, 0, 3, 1]])
    finally:
        kernels.set_num_threads()
    for i in range(4):
        assert torch.equal(native.attention(q[[i]], batch([i]), k, v, scale=0.3)[0], together[i])


@pytest.mark.parametrize("window", [0, 700])
def test_long_contexts_are_the_same_however_shared_out(native, window):
    """Spans of keys are merged in order, by one thread or by several."""
    torch.manual_seed(3)
    heads, dim, prefix = 3, 32, 1530
    parents = PARENTS["comb"]
    table = page_ids(prefix + 20, 64)
    k, v = pages(64, 1, 64, dim)
    rows = tree(prefix, parents, table)
    fill(k, v, rows, prefix + len(parents), dim)
    q = torch.randn(len(parents), heads, dim)
    options = {"scale": 0.3, "window": window}
    one = chunk(1, prefix, table)
    try:
        kernels.set_num_threads(1)
        alone = native.attention(q[:1], one, k, v, **options)
        branched = native.attention(q, rows, k, v, **options)
        for threads in (2, 5):
            kernels.set_num_threads(threads)
            assert torch.equal(native.attention(q[:1], one, k, v, **options), alone)
            assert torch.equal(native.attention(q, rows, k, v, **options), branched)
    finally:
        kernels.set_num_threads()
    assert torch.equal(branched[:1], alone)
    want = attention(q, rows, k, v, **options)
    torch.testing.assert_close(branched.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary", [0, 2, 16, 24, 40])
@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
def test_rope_append(any_ops, qk_norm, rotary, dtype):
    torch.manual_seed(rotary)
    heads, kv_heads, head_dim, count, start = 6, 2, 40, 21, 5
    table = page_ids(count + start, 16)
    rows = chunk(count, start, table)
    k, v = pages(64, kv_heads, 16, head_dim, dtype)
    qkv = torch.randn(count, (heads + 2 * kv_heads) * head_dim)
    cos_sin = torch.randn(32, 2, rotary // 2)
    full = qk_norm == "full"
    weights = {
        "q_weight": torch.randn(head_dim * (heads if full else 1)),
        "k_weight": torch.randn(head_dim * (kv_heads if full else 1)),
    }
    if qk_norm == "none":
        weights = {}
    got = any_ops.rope_append(
        qkv, rows, k, v, cos_sin, num_heads=heads, qk_norm=qk_norm, eps=1e-5, **weights
    )
    q, key, value = qkv.double().split([heads * head_dim, *[kv_heads * head_dim] * 2], -1)
    if full:
        q = rms_norm(q, weights["q_weight"], 1e-5)
        key = rms_norm(key, weights["k_weight"], 1e-5)
    q, key = q.view(count, heads, head_dim), key.view(count, kv_heads, head_dim)
    if qk_norm == "head":
        q = rms_norm(q, weights["q_weight"], 1e-5)
        key = rms_norm(key, weights["k_weight"], 1e-5)
    rough = (
        {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    for i in range(count):
        cos, sin = cos_sin[start + i].double()
        page, offset = table[(start + i) // 16], (start + i) % 16
        keys = torch.stack([exact.key(k, page, head, offset, head_dim) for head in range(kv_heads)])
        values = torch.stack(
            [exact.value(v, page, head, offset, head_dim) for head in range(kv_heads)]
        )
        torch.testing.assert_close(got[i].double(), rotate(q[i], cos, sin), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(keys, rotate(key[i], cos, sin), **rough)
        stored = value[i].view(kv_heads, head_dim).to(dtype)
        assert torch.equal(values, stored.double())
    assert k.isnan().sum() == k.numel() - count * kv_heads * head_dim


def heads_of(case, count, dim):
    """Heads that are hard to store in eight bits."""
    x = torch.randn(count, dim)
    if case == "constant":
        x[:] = torch.linspace(-100, 100, count)[:, None]
    elif case == "tiny":
        x *= 10.0 ** torch.linspace(-44, -28, count)[:, None]
    elif case == "one large":
        x[:, 3] = 1e30
    elif case == "halves":  # exactly between two codes
        x = torch.randint(-127, 127, (count, dim)) + 0.5
        x[:, 0] = 127
    return x


@pytest.mark.parametrize("case", ["noise", "constant", "tiny", "one large", "halves"])
def test_int8_pages_are_the_same_as_the_reference_writes(native, case):
    torch.manual_seed(5)
    kv_heads, dim, count = 2, 40, 33
    rows = chunk(count, 0, page_ids(count, 16))
    kv = heads_of(case, count * 2 * kv_heads, dim).view(count, 2, kv_heads, dim)
    qkv = torch.cat([torch.zeros(count, 2 * dim), kv.flatten(1)], 1)
    written = []
    for ops in (native, kernels.get_ops(prefer="reference")):
        k, v = pages(64, kv_heads, 16, dim, torch.int8)
        ops.rope_append(qkv, rows, k, v, torch.zeros(1, 2, 0), num_heads=2)
        written.append((k, v))
    for which, (got, want) in enumerate(zip(*written, strict=True)):
        assert torch.equal(got, want)
        read = (read_keys, read_values)[which]
        page, at = rows.page_table[0, rows.slot // 16].long(), (rows.slot % 16).long()
        error = (read(got, page, at, dim) - kv[:, which]).abs().amax(-1)
        assert (error <= kv[:, which].abs().amax(-1) / 253 + 1e-30).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_int8_pages_do_not_hide_what_is_no_number(any_ops, bad):
    rows = chunk(20, 0, page_ids(20, 16))
    qkv = torch.randn(20, 4 * 16)
    qkv[7, 2 * 16 + 5] = bad  # a key of row 7
    k, v = pages(64, 1, 16, 16, torch.int8)
    q = any_ops.rope_append(qkv, rows, k, v, torch.zeros(1, 2, 0), num_heads=2)
    out = any_ops.attention(q, rows, k, v, scale=0.2)
    assert out[7:].isnan().all()


def test_rows_outside_their_pages_are_refused(native):
    k, v = pages(4, 1, 16, 16)
    q, cos_sin = torch.zeros(1, 2, 16), torch.zeros(16, 2, 8)
    beyond = chunk(1, 16, [0])
    with pytest.raises(IndexError, match="slot"):
        native.attention(q, beyond, k, v, scale=1.0)
    with pytest.raises(IndexError, match="slot"):
        native.rope_append(torch.zeros(1, 64), beyond, k, v, cos_sin, num_heads=2)
    for page in (-1, 4):
        with pytest.raises(IndexError, match="page"):
            native.attention(q, chunk(1, 3, [page]), k, v, scale=1.0)
    with pytest.raises(IndexError, match="rotary table"):
        native.rope_append(torch.zeros(1, 64), chunk(1, 17, [0, 1]), k, v, cos_sin, num_heads=2)


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 5.0}])
def test_reference_matches_float64(options):
    ops = kernels.get_ops(prefer="reference")
    rows = chunk(12, 30, page_ids(42, 16))
    check(ops, rows, 42, (4, 2, 16, 24), **options)
    rows = tree(20, PARENTS["binary"], page_ids(27, 16))
    check(ops, rows, 27, (4, 2, 16, 24), **options)


@pytest.mark.parametrize("length", [40, 600, 3000])
@pytest.mark.parametrize("first", [True, False])
def test_blocks_of_keys_that_are_no_numbers_are_not_passed_over(any_ops, length, first):
    """The largest of only NaN is minus infinity, as where nothing is visible."""
    rows = chunk(2, length - 2, page_ids(length, 16, 200))
    k, v = pages(200, 2, 16, 32)
    fill(k, v, rows, length, 32)
    bad = torch.arange(length)[:256] if first else torch.arange(length)[-256:]
    page = rows.page_table[0][bad // 16].long()
    write_keys(k, page, bad % 16, torch.full((len(bad), 2, 32), torch.nan))
    out = any_ops.attention(torch.randn(2, 4, 32), rows, k, v, scale=0.2)
    assert out.isnan().all()
