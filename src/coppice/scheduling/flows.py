"""Whose turn it is among tenants: first come first served, fair counters, and baselines."""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from coppice.errors import ConfigError
from coppice.scheduling.interfaces import Event, Rank, SequenceView
from coppice.scheduling.queue import FlowQueues

Cost = Callable[[float, int], float]
"""``h(prompt tokens, generated tokens)``: service a request has had, in any unit."""

MOST_WEIGHT = 1e6
REBASE = 1e9
"""Counters are lowered together when the least passes this, which keeps floats exact."""


class TenantTurns:
    """Turns by a number for each tenant, least first, which a plan may only raise.

    Args:
        ranks: of the tenants that may have a turn.
        after: a tenant's rank once it had a sequence admitted; None ends its turns.
        credit: how far, in the first number of its rank, a tenant may be ahead of the least
            and still have an urgent sequence go first.
    """

    def __init__(
        self,
        ranks: dict[str, Rank],
        after: Callable[[Rank, SequenceView], Rank | None],
        credit: float = 0.0,
    ) -> None:
        self._ranks = ranks
        self._heap = [(rank, tenant) for tenant, rank in ranks.items()]
        heapq.heapify(self._heap)
        self._after = after
        self._credit = credit

    def tenant(self) -> str | None:
        """See `Turns`."""
        while self._heap:
            rank, tenant = self._heap[0]
            if self._ranks.get(tenant) == rank:
                return tenant
            heapq.heappop(self._heap)
        return None

    def took(self, sequence: SequenceView) -> None:
        """See `Turns`."""
        tenant = sequence.tenant
        later = self._after(self._ranks[tenant], sequence)
        if later is None:
            del self._ranks[tenant]
        else:
            self._ranks[tenant] = later
            heapq.heappush(self._heap, (later, tenant))

    def done(self, tenant: str) -> None:
        """See `Turns`."""
        self._ranks.pop(tenant, None)

    def may_jump(self, sequence: SequenceView) -> bool:
        """See `Turns`."""
        own, least = self._ranks.get(sequence.tenant), self.tenant()
        if own is None or least is None:
            return False
        return own[0] - self._ranks[least][0] <= self._credit


class InOrder:
    """Tenants do not matter: the best rank of all heads is next."""

    def enqueue(self, tenant: str, backlogged: Mapping[str, object], last: str) -> None:
        """See `FlowOrder`."""

    def charge(self, sequence: SequenceView, event: Event, tokens: int, now: float) -> None:
        """See `FlowOrder`."""

    def turns(self, queues: FlowQueues, now: float) -> TenantTurns:
        """See `FlowOrder`."""
        heads = {tenant: queue[0].rank for tenant, queue in queues.tenants.items()}
        taken: Counter[str] = Counter()

        def after(rank: Rank, sequence: SequenceView) -> Rank | None:
            del rank
            tenant = sequence.tenant
            taken[tenant] += 1
            queue = queues.tenants[tenant]
            return queue[taken[tenant]].rank if taken[tenant] < len(queue) else None

        return TenantTurns(heads, after)


def linear_cost(input_price: float = 1.0, output_price: float = 2.0) -> Cost:
    """``h = input_price * prompt + output_price * generated``; the paper's default is 1 and 2."""
    return lambda prompt, generated: input_price * prompt + output_price * generated


def a10g_cost(prompt: float, generated: int) -> float:
    """The authors' fit of step times of Llama-2-7B on an A10G, in their unit."""
    return (
        2.1 * prompt + generated + 0.04 * prompt * generated + 0.032 * generated**2 + 11.46
    )  # fmt: skip


@dataclass(slots=True)
class MeanLength:
    """Predicts a tenant's answer length: an exponential mean over about five answers."""

    means: dict[str, float] = field(default_factory=dict)

    def predict(self, tenant: str) -> int:
        """Tokens expected; 0 before the first answer ended."""
        return round(self.means.get(tenant, 0.0))

    def learn(self, tenant: str, tokens: int) -> None:
        """An answer ended."""
        mean = self.means.get(tenant, float(tokens))
        self.means[tenant] = mean + (tokens - mean) / 3.0


class FairCounters:
    """The tenant that has had least service is next.

    Each tenant's counter grows with what it is given, divided by its weight. A tenant that
    comes back is lifted to the least counter among those that have queued work (or, when none
    has, to that of the tenant whose queue ran empty last), so idle time is no credit. Two
    tenants that are both backlogged then differ by at most ``2U``, ``U`` being the larger of
    the dearest prompt and the price of all tokens a batch can hold.

    Args:
        weights: share of a tenant; 1 where it is not named.
        cost: price of a request; tokens from the prefix cache count ``cached_price`` each.
        cached_price: reduced price of a cached prompt token, over that of another; above 0.
        lift: False gives the counter without the lift, a baseline that lets idle tenants save.
        jump_credit: service over weight by which a tenant may be ahead and still have a request
            served first whose deadline presses; the bound becomes ``2U`` and this.
        lengths: charges a predicted answer at admission and settles at the end.

    Source: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024): VTC.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        cost: Cost | None = None,
        cached_price: float = 0.1,
        lift: bool = True,
        jump_credit: float = 0.0,
        lengths: MeanLength | None = None,
    ) -> None:
        self._weights = dict(weights or {})
        for tenant, weight in self._weights.items():
            check_weight(tenant, weight)
        self._cost = cost or linear_cost()
        self._cached_price = cached_price
        self._lift = lift
        self._jump_credit = jump_credit
        self._lengths = lengths
        self._prepaid: dict[int, int] = {}
        self.counters: dict[str, float] = {}
        """Service over weight, by tenant."""

    def enqueue(self, tenant: str, backlogged: Mapping[str, object], last: str) -> None:
        """See `FlowOrder`: the lift."""
        own = self.counters.get(tenant, 0.0)
        if self._lift:
            if backlogged:
                own = max(own, min(self.counters[other] for other in backlogged))
            elif last:
                own = max(own, self.counters.get(last, 0.0))
        self.counters[tenant] = own
        if own > REBASE:
            self._rebase(backlogged)

    def charge(self, sequence: SequenceView, event: Event, tokens: int, now: float) -> None:
        """See `FlowOrder`."""
        tenant = sequence.tenant
        if event == "admitted":
            amount = self.price(sequence)
            if self._lengths is not None:
                self._prepaid[sequence.arrival] = self._lengths.predict(tenant)
        else:
            prompt = self._prompt(sequence)
            generated = sequence.num_tokens - sequence.num_prompt
            prepaid = self._prepaid.get(sequence.arrival, 0)
            if event == "generated":
                before = max(prepaid, generated - tokens)
                amount = self._difference(prompt, before, max(prepaid, generated))
            else:
                amount = self._difference(prompt, max(prepaid, generated), generated)
                self._prepaid.pop(sequence.arrival, None)
                if self._lengths is not None and generated:
                    self._lengths.learn(tenant, generated)
        self._add(tenant, amount)

    def turns(self, queues: FlowQueues, now: float) -> TenantTurns:
        """See `FlowOrder`."""
        counters = self.counters
        ranks: dict[str, Rank] = {tenant: (counters[tenant],) for tenant in queues.tenants}

        def after(rank: Rank, sequence: SequenceView) -> Rank:
            return (rank[0] + self.price(sequence) / self.weight(sequence.tenant),)

        return TenantTurns(ranks, after, self._jump_credit)

    def weight(self, tenant: str) -> float:
        """The tenant's share; 1 unless it was given one."""
        return self._weights.get(tenant, 1.0)

    def price(self, sequence: SequenceView) -> float:
        """What admitting it costs its tenant, before weighing."""
        ahead = 0 if self._lengths is None else self._lengths.predict(sequence.tenant)
        return self._cost(self._prompt(sequence), ahead)

    def _prompt(self, sequence: SequenceView) -> float:
        return sequence.num_prompt - (1.0 - self._cached_price) * sequence.cached_tokens

    def _difference(self, prompt: float, before: int, after: int) -> float:
        return 0.0 if before == after else self._cost(prompt, after) - self._cost(prompt, before)

    def _add(self, tenant: str, amount: float) -> None:
        self.counters[tenant] = self.counters.get(tenant, 0.0) + amount / self.weight(tenant)

    def _rebase(self, backlogged: Mapping[str, object]) -> None:
        """Forget idle tenants that are behind (the lift makes them anew), lower the rest."""
        least = min((self.counters[t] for t in backlogged), default=min(self.counters.values()))
        self.counters = {
            tenant: counter - least
            for tenant, counter in self.counters.items()
            if counter >= least or tenant in backlogged
        }


class RequestsPerMinute:
    """At most ``limit`` admissions a tenant in any minute, in order of rank: a baseline.

    It leaves the machine idle while tenants over their limit wait, which is its fault.
    """

    def __init__(self, limit: int, window_s: float = 60.0) -> None:
        self._limit = limit
        self._window_s = window_s
        self._admitted: dict[str, deque[float]] = {}

    def enqueue(self, tenant: str, backlogged: Mapping[str, object], last: str) -> None:
        """See `FlowOrder`."""

    def charge(self, sequence: SequenceView, event: Event, tokens: int, now: float) -> None:
        """See `FlowOrder`."""
        if event == "admitted":
            times = self._admitted.setdefault(sequence.tenant, deque())
            times.append(now)
            while times[0] <= now - self._window_s:
                times.popleft()

    def turns(self, queues: FlowQueues, now: float) -> TenantTurns:
        """See `FlowOrder`."""
        left: dict[str, int] = {}
        ranks: dict[str, Rank] = {}
        for tenant, queue in queues.tenants.items():
            # What lies ahead of the clock was admitted before it was set back: it is forgotten.
            recent = sum(now - self._window_s < t <= now for t in self._admitted.get(tenant, ()))
            if recent < self._limit:
                left[tenant] = self._limit - recent
                ranks[tenant] = queue[0].rank

        def after(rank: Rank, sequence: SequenceView) -> Rank | None:
            left[sequence.tenant] -= 1
            return rank if left[sequence.tenant] > 0 else None

        return TenantTurns(ranks, after)


class RoundRobin:
    """Deficit round robin, paid afterwards: a tenant in debt sits out rounds.

    A round gives every backlogged tenant ``quantum`` service. Turns go to the tenant that needs
    fewest rounds to be out of debt, and among those in the order they came.

    Args:
        quantum: service a round; the authors' baseline has a twentieth of the KV pool.
        cost: price of a request.
    """

    def __init__(self, quantum: float, cost: Cost | None = None) -> None:
        if not quantum > 0:
            raise ConfigError(f"A round must give more than {quantum} service.", param="policy")
        self._quantum = quantum
        self._cost = cost or linear_cost()
        self._debt: dict[str, float] = {}
        self._seat: dict[str, int] = {}
        self._seats = 0

    def enqueue(self, tenant: str, backlogged: Mapping[str, object], last: str) -> None:
        """See `FlowOrder`: the tenant sits down last, with its debt but without credit."""
        self._seats += 1
        self._seat[tenant] = self._seats
        self._debt[tenant] = max(0.0, self._debt.get(tenant, 0.0))

    def charge(self, sequence: SequenceView, event: Event, tokens: int, now: float) -> None:
        """See `FlowOrder`."""
        tenant = sequence.tenant
        if event == "admitted":
            rounds = self._rounds(self._debt.get(tenant, 0.0))
            for other in self._debt:
                self._debt[other] = max(0.0, self._debt[other] - rounds * self._quantum)
            self._debt[tenant] += self._cost(sequence.num_prompt, 0)
            self._seats += 1
            self._seat[tenant] = self._seats
        elif event == "generated":
            done = sequence.num_tokens - sequence.num_prompt
            paid = self._cost(sequence.num_prompt, done - tokens)
            self._debt[tenant] += self._cost(sequence.num_prompt, done) - paid

    def turns(self, queues: FlowQueues, now: float) -> TenantTurns:
        """See `FlowOrder`."""
        debts = {tenant: self._debt[tenant] for tenant in queues.tenants}
        ranks: dict[str, Rank] = {
            t: (self._rounds(debt), self._seat[t]) for t, debt in debts.items()
        }

        def after(rank: Rank, sequence: SequenceView) -> Rank | None:
            del rank
            debts[sequence.tenant] += self._cost(sequence.num_prompt, 0)
            return (self._rounds(debts[sequence.tenant]), math.inf)

        return TenantTurns(ranks, after)

    def _rounds(self, debt: float) -> int:
        return math.ceil(debt / self._quantum)


def check_weight(tenant: str, weight: float) -> None:
    """Refuse a weight that is no share.

    Raises:
        ConfigError: zero, negative, not finite, or beyond a million to one.
    """
    if not 1.0 / MOST_WEIGHT <= weight <= MOST_WEIGHT:  # also refuses NaN
        raise ConfigError(
            f"The weight of tenant {tenant!r} must lie between {1 / MOST_WEIGHT:g} and "
            f"{MOST_WEIGHT:g}, got {weight!r}; 1 is a normal share.",
            param="tenant_weights",
        )
