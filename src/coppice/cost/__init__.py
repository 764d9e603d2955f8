"""The cost model: how long a step of so many rows takes on this machine."""

from coppice.cost.model import StepCost

__all__ = ["StepCost"]
