"""Step time against rows and keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from coppice.cost import StepCost
from coppice.cost.curve import Sample, StepCurve, fit, read_curve, save_curve
from coppice.errors import ConfigError

CURVE = StepCurve((1, 8, 64), (0.010, 0.012, 0.068), 1e-7)


def test_lines_between_and_beyond_what_was_measured() -> None:
    assert CURVE.time(1) == 0.010
    assert CURVE.time(8) == pytest.approx(0.012)
    assert CURVE.time(36) == pytest.approx(0.040)
    assert CURVE.time(128) == pytest.approx(0.132)
    assert CURVE.time(8, keys=10_000) == pytest.approx(0.013)


def test_rows_within_is_the_inverse() -> None:
    for rows in (1, 3, 8, 40, 64, 200):
        assert CURVE.rows_within(CURVE.time(rows) + 1e-9, 500) == rows
    assert CURVE.rows_within(0.001, 500) == 1
    assert CURVE.rows_within(9.0, 500) == 500


def test_fit_recovers_a_curve_through_an_outlier() -> None:
    samples = [
        Sample(rows, keys, CURVE.time(rows, keys))
        for rows in CURVE.rows
        for keys in (0, 100, 5000)
        for _ in range(3)
    ]
    samples.append(Sample(8, 0, 0.5))
    found = fit(samples)
    assert found.rows == CURVE.rows
    assert found.seconds == pytest.approx(CURVE.seconds)
    assert found.per_key_s == pytest.approx(CURVE.per_key_s)


def test_a_curve_never_falls_and_keys_never_pay() -> None:
    found = fit([Sample(1, 0, 0.02), Sample(4, 0, 0.01), Sample(4, 10, 0.001)])
    assert found.seconds == (0.02, 0.02)
    assert found.per_key_s == 0.0
    with pytest.raises(ConfigError, match="calibrate again"):
        fit([Sample(1, 5, 0.1)])


def test_saved_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "curve.json"
    save_curve(CURVE, path)
    assert read_curve(path) == CURVE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"rows": [], "seconds": [], "per_key_s": 0}',
        '{"rows": [2, 1], "seconds": [1, 2], "per_key_s": 0}',
        '{"rows": [1, 2], "seconds": [1], "per_key_s": 0}',
        '{"rows": [1], "seconds": [-1], "per_key_s": 0}',
    ],
)
def test_a_damaged_file_is_no_curve(tmp_path: Path, text: str) -> None:
    path = tmp_path / "curve.json"
    path.write_text(text)
    assert read_curve(path) is None
    assert read_curve(tmp_path / "absent.json") is None


def test_a_calibrated_estimate_keeps_the_shape_and_follows_the_height() -> None:
    cost = StepCost(CURVE)
    assert cost.rows_within(0.0401, 500) == 36
    for _ in range(200):
        cost.observe(8, 2 * CURVE.time(8))
    assert cost.scale == pytest.approx(2.0, rel=0.02)
    assert cost.rows_within(0.080, 500) in (35, 36)
    assert cost.per_row_s == pytest.approx(2 * 0.001, rel=0.1)


def test_without_a_curve_a_line_is_fitted() -> None:
    cost = StepCost()
    assert cost.rows_within(0.1, 77) == 77
    for rows in (1, 50, 3, 40) * 50:
        cost.observe(rows, 0.004 + 0.001 * rows)
    assert cost.per_row_s == pytest.approx(0.001, rel=0.01)
    assert cost.base_s == pytest.approx(0.004, rel=0.05)
    assert cost.rows_within(0.104, 500) in (99, 100)
