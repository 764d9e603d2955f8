"""Costs of steps that do not depend on how busy the machine is."""

from __future__ import annotations

import pytest

from coppice.cost import StepCost
from coppice.speculation import Controller


def rows_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes as long as any other: guessing ahead always pays."""
    monkeypatch.setattr(StepCost, "time", lambda self, rows: 1.0)
    monkeypatch.setattr(Controller, "step_took", lambda *args: None)
