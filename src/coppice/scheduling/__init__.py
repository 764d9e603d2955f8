"""Who gets how many rows in a step, and who must leave.

Owns the planner, a pure function of a snapshot, the policies it asks and the simulator that
runs both on a virtual clock; refuses to touch pages, tensors or the machine's clock.
Invariant: a plan never grants more rows or pages than the snapshot says there are.
"""

from coppice.scheduling.budget import rows_of_guesses
from coppice.scheduling.interfaces import Grant, Plan, Planner, SequenceView, Snapshot
from coppice.scheduling.planner import StepPlanner
from coppice.scheduling.policy import Policy, make_policy
from coppice.scheduling.queue import FlowQueues
from coppice.scheduling.slo import tokens_needed

__all__ = [
    "FlowQueues",
    "Grant",
    "Plan",
    "Planner",
    "Policy",
    "SequenceView",
    "Snapshot",
    "StepPlanner",
    "make_policy",
    "rows_of_guesses",
    "tokens_needed",
]
