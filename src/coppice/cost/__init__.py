"""The cost model: how long a step of so many rows takes on this machine."""

from coppice.cost.curve import Sample, StepCurve, fit, read_curve, rows_within, save_curve
from coppice.cost.model import StepCost

__all__ = ["Sample", "StepCost", "StepCurve", "fit", "read_curve", "rows_within", "save_curve"]
