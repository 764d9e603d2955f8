"""From settings to the scheduler's policies, and what is told of them."""

from __future__ import annotations

from coppice.cost import StepCost
from coppice.engine.config import EngineConfig
from coppice.engine.messages import SessionStats
from coppice.engine.pages import SequencePages
from coppice.engine.sequence import Sequence
from coppice.scheduling import Policy, make_policy
from coppice.scheduling.sessions import Sessions


def policy_of(config: EngineConfig, num_pages: int, cost: StepCost) -> Policy:
    """The configured policy for an engine of so many pages."""
    return make_policy(
        config.policy,
        config.order,
        weights=config.tenant_weights,
        limit=config.tenant_limit,
        pool_tokens=num_pages * config.page_size,
        ageing_s=config.priority_ageing_s,
        per_row_s=lambda: cost.per_row_s,
        page_size=config.page_size,
    )


def session_stats(sessions: Sessions[Sequence], pages: SequencePages) -> SessionStats:
    """Figures of the sessions and of what is kept for them."""
    return SessionStats(
        open=sessions.num_inside,
        paused=sessions.num_paused,
        waiting=len(sessions.outside),
        given_up=sessions.given_up,
        kept_pages=pages.num_kept,
        revoked_pages=pages.pins.num_revoked,
    )
