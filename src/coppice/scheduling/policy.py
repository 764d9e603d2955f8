"""Policies by name: what a setting says becomes the hooks of a planner."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from coppice.errors import ConfigError
from coppice.scheduling.flows import (
    FairCounters,
    InOrder,
    MeanLength,
    RequestsPerMinute,
    RoundRobin,
    check_weight,
)
from coppice.scheduling.interfaces import Admission, FlowOrder, RequestOrder, Retention
from coppice.scheduling.isolation import IsolatedCounters
from coppice.scheduling.orders import (
    ByAgedPriority,
    ByArrival,
    ByDeadline,
    BySessionService,
    ShortestPrompt,
)
from coppice.scheduling.retention import ByHazard
from coppice.scheduling.window import SessionWindow

TYPICAL_ROW_S = 1 / 4000
"""A small model on two cores; where nothing is measured."""
FAIR = ("fair", "fair-predicted", "isolated")
"""Policies that know weights."""

PolicyName = Literal["fcfs", "fair", "fair-predicted", "isolated", "rpm", "round-robin"]
OrderName = Literal["arrival", "aged", "shortest", "deadline", "sessions"]


@dataclass(frozen=True, slots=True)
class Policy:
    """The hooks one engine runs with.

    Attributes:
        flows: who is next among tenants.
        order: who is next inside a tenant.
        admission: which sessions may begin; None lets all.
        retention: whose pages stay while a tool runs; None keeps them as long as any prefix.
    """

    flows: FlowOrder = field(default_factory=InOrder)
    order: RequestOrder = field(default_factory=ByArrival)
    admission: Admission | None = None
    retention: Retention | None = None


def make_policy(
    name: PolicyName = "fcfs",
    order: OrderName = "arrival",
    *,
    weights: Iterable[str] = (),
    limit: int = 30,
    pool_tokens: int = 10_000,
    ageing_s: float = 30.0,
    per_row_s: Callable[[], float] = lambda: TYPICAL_ROW_S,
    page_size: int = 32,
) -> Policy:
    """The policy of a configuration.

    Args:
        name: among tenants.
        order: inside a tenant.
        weights: ``TENANT=WEIGHT`` each, for the fair policies.
        limit: admissions a tenant and minute, for ``rpm``.
        pool_tokens: tokens the KV pool holds; a twentieth is the quantum of ``round-robin``,
            and the credit of ``fair`` for pressing deadlines.
        ageing_s: seconds of waiting one level of priority is worth, for ``aged``.
        per_row_s: seconds a prompt token takes, for ``shortest`` and for ``sessions``, which brings
            the window and the retention of MARS with its order.
        page_size: tokens a page, for the latter.

    Raises:
        ConfigError: a weight is no share.
    """
    shares = read_weights(weights)
    credit = pool_tokens / 20
    flows: FlowOrder
    if name == "fair":
        flows = FairCounters(shares, jump_credit=credit)
    elif name == "fair-predicted":
        flows = FairCounters(shares, jump_credit=credit, lengths=MeanLength())
    elif name == "isolated":
        flows = IsolatedCounters(FairCounters(shares, jump_credit=credit))
    elif name == "rpm":
        flows = RequestsPerMinute(limit)
    elif name == "round-robin":
        flows = RoundRobin(credit)
    else:
        flows = InOrder()
    if order == "sessions":
        retention = ByHazard(lambda pages: pages * page_size * per_row_s())
        return Policy(flows, BySessionService(), SessionWindow(), retention)
    orders: dict[str, RequestOrder] = {
        "arrival": ByArrival(),
        "aged": ByAgedPriority(ageing_s),
        "shortest": ShortestPrompt(per_row_s),
        "deadline": ByDeadline(),
    }
    return Policy(flows, orders[order])


def read_weights(entries: Iterable[str]) -> dict[str, float]:
    """``TENANT=WEIGHT`` entries as a mapping.

    Raises:
        ConfigError: an entry is not of that form, names a tenant twice or is no share.
    """
    weights: dict[str, float] = {}
    for entry in entries:
        tenant, _, text = entry.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = float("nan")
        if not tenant or tenant in weights:
            raise ConfigError(
                f"tenant_weights wants TENANT=WEIGHT, each tenant once; got {entry!r}.",
                param="tenant_weights",
            )
        check_weight(tenant, weight)
        weights[tenant] = weight
    return weights
