"""Who gets how many rows in a step, and who must leave.

Owns the planner, a pure function of a snapshot; refuses to touch pages, tensors or clocks.
Invariant: a plan never grants more rows or pages than the snapshot says there are.
"""

from coppice.scheduling.interfaces import Grant, Plan, Planner, SequenceView, Snapshot
from coppice.scheduling.planner import StepPlanner

__all__ = ["Grant", "Plan", "Planner", "SequenceView", "Snapshot", "StepPlanner"]
