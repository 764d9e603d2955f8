"""A compiled decoder gives the bits its operators give one by one, and writes the same KV."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from coppice import kernels
from coppice.cache.pool import KVPool
from coppice.errors import EngineError
from coppice.kernels import get_ops
from coppice.kernels.pages import page_shape
from coppice.kernels.rows import Rows
from coppice.kernels.sampling import NOT_FINITE, RowParams, choose
from coppice.models.decoder import Decoder
from coppice.models.load import load_model
from tests.parity.toys import TOYS, reference

pytestmark = pytest.mark.skipif(
    not kernels.native_available(), reason="the native extension is not built"
)

MIXTURES = ("mixtral", "qwen3_moe")
DENSE = [(family, i) for family in TOYS if family not in MIXTURES for i in range(3)]
PAGE = 16
PAGES = [[3, 9, 4, 1, 11, 6, 8, 20], [2, 13, 5, 7, 15, 16, 17, 21], [0, 10, 12, 14, 18, 19, 22, 23]]


@pytest.fixture(scope="module", params=DENSE, ids=lambda case: f"{case[0]}-{case[1]}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, index = request.param
    path: Path = tmp_path_factory.mktemp(family)
    reference(family, copy.deepcopy(TOYS[family][index]), seed=70 + index).save_pretrained(path)
    return path


def rows_of(columns: dict[str, list[int]], prefix: list[int], wanted: list[int]) -> Rows:
    """Rows from plain lists; `slot` defaults to the position."""
    columns.setdefault("slot", columns["position"])
    count = len(columns["token"])
    made: dict[str, Any] = {name: torch.tensor(v, dtype=torch.int32) for name, v in columns.items()}
    return Rows(
        **made,
        adapter=torch.full((count,), -1, dtype=torch.int32),
        logit_rows=torch.tensor(wanted, dtype=torch.int32),
        page_table=torch.tensor(PAGES, dtype=torch.int32),
        prefix_len=torch.tensor(prefix, dtype=torch.int32),
    )


def steps() -> list[Rows]:
    """A prompt in chunks, three sequences at once, a token tree, decodes; logits of some."""
    tokens = [(7 * i * i + 3 * i) % 205 + 3 for i in range(120)]
    page_table = torch.tensor(PAGES[:1], dtype=torch.int32)

    def chunk(start: int, end: int, wanted: list[int]) -> Rows:
        whole = Rows.chunk(tokens[start:end], PAGES[0], start)
        return Rows(
            **{
                name: getattr(whole, name)
                for name in ("token", "position", "sequence", "parent", "slot", "adapter")
            },
            logit_rows=torch.tensor(wanted, dtype=torch.int32),
            page_table=page_table,
            prefix_len=whole.prefix_len,
        )

    several = rows_of(
        {
            "token": [5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
            "position": [37, 0, 1, 2, 3, 4, 0, 1, 2, 3],
            "sequence": [0, 1, 1, 1, 1, 1, 2, 2, 2, 2],
            "parent": [-1, -1, 1, 2, 3, 4, -1, 6, 7, 8],
        },
        [37, 0, 0],
        [0, 5, 9],
    )
    # Sequence 1 goes on with a tree: 0 -> {1, 2}, 1 -> {3, 4}, 2 -> 5; sequence 0 decodes.
    tree = rows_of(
        {
            "token": [50, 51, 52, 53, 54, 55, 90],
            "position": [5, 6, 6, 7, 7, 7, 38],
            "slot": [5, 6, 7, 8, 9, 10, 38],
            "sequence": [1, 1, 1, 1, 1, 1, 0],
            "parent": [-1, 0, 0, 1, 1, 2, -1],
        },
        [38, 5, 4],
        [0, 1, 2, 3, 4, 5, 6],
    )
    one = rows_of(
        {"token": [99], "position": [39], "sequence": [0], "parent": [-1]}, [39, 5, 4], [0]
    )
    unwanted = rows_of(
        {"token": [98, 97], "position": [40, 41], "sequence": [0, 0], "parent": [-1, 0]},
        [40, 5, 4],
        [],
    )
    return [chunk(0, 30, []), chunk(30, 37, [0, 6]), several, tree, one, unwanted]


def run(decoder: Decoder) -> tuple[list[Tensor], KVPool]:
    pool = KVPool(decoder.kv_layout(PAGE), 24)
    for tensor in (*pool.k, *pool.v):
        tensor.zero_()
    return [decoder.forward(rows, pool) for rows in steps()], pool


def by_operators(decoder: Decoder) -> Decoder:
    """The same decoder without its program."""
    plain = copy.copy(decoder)
    plain.program = None
    return plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_same_bits_as_operators_one_by_one(folder: Path, dtype: Any) -> None:
    decoder = load_model(folder, dtype=dtype, ops=get_ops(prefer="native")).decoder
    assert decoder.program is not None
    expected, kept = run(by_operators(decoder))
    found, pool = run(decoder)
    assert [len(logits) for logits in found] == [0, 2, 3, 7, 1, 0]
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"step {step} differs by {(a - b).abs().max()}"
    for a, b in zip((*pool.k, *pool.v), (*kept.k, *kept.v), strict=True):
        assert torch.equal(a, b)


@torch.inference_mode()
def test_same_bits_after_a_rotary_table_has_grown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grown table lies elsewhere: the program asks where."""
    one_by_one, compiled = (
        load_model(folder, ops=get_ops(prefer="native")).decoder for _ in range(2)
    )
    expected, _ = run(by_operators(one_by_one))
    monkeypatch.setattr("coppice.models.rope._BLOCK", 8)
    found, _ = run(compiled)
    assert all(map(torch.equal, found, expected))


def sampled(logits: Tensor, vocab_size: int) -> list[int]:
    """What the sampler says of each row at temperature 0: a token, or ``-fault``."""
    params = [RowParams(vocab_size=vocab_size) for _ in logits]
    for row in params:
        row.publish()
    found = choose(logits.numpy(), params, [0] * len(params))
    return [
        -f if f else t for t, f in zip(found.tokens.tolist(), found.faults.tolist(), strict=True)
    ]


@torch.inference_mode()
def test_greedy_is_what_the_sampler_chooses(folder: Path) -> None:
    decoder = load_model(folder, ops=get_ops(prefer="native")).decoder
    pools = [KVPool(decoder.kv_layout(PAGE), 24) for _ in range(2)]
    for rows in steps():
        for vocab_size in (211, 90, 16, 0):
            found = decoder.greedy(rows, pools[0], vocab_size)
            expected = sampled(decoder.forward(rows, pools[1]), vocab_size)
            assert found == (None if decoder.config.logit_softcap else expected)


@torch.inference_mode()
def test_greedy_over_a_vocabulary_in_pieces(tmp_path: Path) -> None:
    """Ties go to the lowest token, within a piece and across; a damaged row faults alone."""
    settings = {**TOYS["llama"][0], "vocab_size": 40_000}
    model = reference("llama", settings, seed=6)
    with torch.no_grad():
        head = model.lm_head.weight
        head *= 0.1
        head[[20, 25, 17_000, 39_999]] = torch.randn(48) * 9  # one of these or its opposite
        head[[30, 35, 16_384, 33_000]] = -head[20]
        model.model.embed_tokens.weight[7] = torch.nan
    model.save_pretrained(tmp_path)
    decoder = load_model(tmp_path, dtype="float32", ops=get_ops(prefer="native")).decoder
    tokens = [5, 6, 8, 9, 10, 11, 12, 13]
    pools = [KVPool(decoder.kv_layout(PAGE), 24) for _ in range(2)]
    rows = Rows.chunk(tokens, PAGES[0])
    winners = set()
    for vocab_size in (40_000, 39_999, 30_000, 16_384, 10):
        found = decoder.greedy(rows, pools[0], vocab_size)
        assert found == sampled(decoder.forward(rows, pools[1]), vocab_size)
        winners |= set(found or ())
    assert winners & {20, 30}, "no tie decided anything: the test would be blind"
    damaged = rows_of(
        {"token": [5, 7], "position": [0, 0], "sequence": [0, 1], "parent": [-1, -1]},
        [0, 0, 0],
        [0, 1],
    )
    found = decoder.greedy(damaged, pools[0], 40_000)
    assert found is not None
    assert found[0] >= 0
    assert found[1] == -NOT_FINITE


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_run_by_operators(tmp_path: Path, family: str) -> None:
    reference(family, copy.deepcopy(TOYS[family][0]), seed=3).save_pretrained(tmp_path)
    assert load_model(tmp_path, ops=get_ops(prefer="native")).decoder.program is None


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path: Path = tmp_path_factory.mktemp("llama")
    reference("llama", copy.deepcopy(TOYS["llama"][1]), seed=5).save_pretrained(path)
    return load_model(path, ops=get_ops(prefer="native")).decoder


@torch.inference_mode()
def test_threads_do_not_change_bits(decoder: Decoder) -> None:
    expected, _ = run(decoder)
    before = kernels.num_threads()
    try:
        for threads in (1, 3):
            kernels.set_num_threads(threads)
            found, _ = run(decoder)
            assert all(map(torch.equal, found, expected))
    finally:
        kernels.set_num_threads(before)


@torch.inference_mode()
def test_one_native_call_a_step(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's part of a forward pass is one call, however many layers there are."""
    from coppice.kernels import _native

    calls: list[str] = []
    for name in ("linear", "norm", "gate", "rope", "attention", "gather"):
        monkeypatch.setattr(_native, name, lambda *_, name=name: calls.append(name))
    program: Any = decoder.program
    inner = program._native

    class Counting:
        def use_pages(self, *args: Any) -> None:
            inner.use_pages(*args)

        def run(self, *args: Any) -> None:
            calls.append("run")
            inner.run(*args)

    monkeypatch.setattr(program, "_native", Counting())
    run(decoder)
    assert calls == ["run"] * len(steps())


@torch.inference_mode()
def test_pools_may_change_between_steps(decoder: Decoder) -> None:
    first = steps()[1]
    pools = [KVPool(decoder.kv_layout(PAGE), 24) for _ in range(2)]
    for pool in pools:
        decoder.forward(steps()[0], pool)
    logits = [decoder.forward(first, pool) for pool in (*pools, *pools)]
    assert all(torch.equal(x, logits[0]) for x in logits)


@torch.inference_mode()
def test_rows_that_lead_nowhere_are_refused(decoder: Decoder) -> None:
    pool = KVPool(decoder.kv_layout(PAGE), 24)
    good = {"token": [9], "position": [0], "sequence": [0], "parent": [-1]}
    decoder.forward(rows_of(dict(good), [0, 0, 0], [0]), pool)
    for name, value, words in (
        ("token", 211, "vocabulary"),
        ("token", -1, "vocabulary"),
        ("sequence", 3, "sequence"),
        ("slot", 8 * PAGE, "slot"),
        ("parent", 0, "parent"),
        ("position", -1, "position"),
    ):
        bad = {**good, name: [value]}
        bad.setdefault("slot", [0])
        with pytest.raises(IndexError, match=words):
            decoder.forward(rows_of(bad, [0, 0, 0], [0]), pool)
    with pytest.raises(IndexError, match="wanted"):
        decoder.forward(rows_of(dict(good), [0, 0, 0], [1]), pool)
    with pytest.raises(IndexError, match="prefix"):
        decoder.forward(rows_of(dict(good), [8 * PAGE + 1, 0, 0], [0]), pool)
    with pytest.raises(EngineError, match="beyond the context"):
        decoder.forward(rows_of({**good, "position": [512]}, [0, 0, 0], [0]), pool)


@torch.inference_mode()
def test_pages_of_another_model_are_refused(decoder: Decoder) -> None:
    shape = page_shape(4, 7, PAGE, decoder.config.head_dim, torch.float32)
    k, v = ([torch.zeros(shape) for _ in decoder.config.layers] for _ in range(2))
    with pytest.raises(IndexError, match="another model"):
        decoder.forward(steps()[0], SimpleNamespace(k=k, v=v))
