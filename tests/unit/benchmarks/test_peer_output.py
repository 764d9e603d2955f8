"""What llama.cpp's programs print, read right."""

from __future__ import annotations

import pytest

from benchmarks.peers.llama_cpp import batched_rate, bench_rate

BENCH = (
    'ggml_init: some line before\n{"build_commit": "unknown", "n_prompt": 0, "n_gen": 128, '
    '"n_depth": 128, "avg_ns": 59672731, "avg_ts": 2145.033382, "samples_ts": [ 2145.03 ]}\n'
)
BATCHED = (
    '{"pp": 128, "tg": 128, "pl": 8, "n_kv": 2048, "t_pp": 0.144725, "speed_pp": 7075.5, '
    '"t_tg": 0.292934, "speed_tg": 3495.667969, "t": 0.437659, "speed": 4679.4}\n\n'
)


def test_the_rate_of_a_single_test():
    assert bench_rate(BENCH) == 2145.033382


def test_the_decoding_rate_and_not_that_of_the_prompts():
    assert batched_rate(BATCHED) == 3495.667969


@pytest.mark.parametrize("text", ["", "error: unable to load model\n", BENCH + BENCH])
def test_anything_but_one_test_is_an_error(text):
    with pytest.raises(ValueError, match="unpack"):
        bench_rate(text)
    with pytest.raises(ValueError, match="unpack"):
        batched_rate(text)
