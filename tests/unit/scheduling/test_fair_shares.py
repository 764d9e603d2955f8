"""Fair counters: the 2U bound, the lift, weights, and what the baselines lack."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from coppice.errors import ConfigError
from coppice.scheduling import Policy, StepPlanner
from coppice.scheduling.fairness import Accounts, service_differences
from coppice.scheduling.flows import (
    FairCounters,
    InOrder,
    MeanLength,
    RequestsPerMinute,
    RoundRobin,
    a10g_cost,
)
from coppice.scheduling.interfaces import FlowOrder
from coppice.scheduling.isolation import IsolatedCounters
from coppice.scheduling.planner import MAX_OVERTAKEN
from coppice.scheduling.policy import make_policy, read_weights
from coppice.scheduling.virtual import Sizes, VirtualEngine, VirtualSequence, play

POOL_TOKENS = 10_000
SIZES = Sizes(
    num_pages=POOL_TOKENS // 16,
    page_size=16,
    max_rows=512,
    max_sequences=500,
    prefill_chunk=512,
    prefix_cache=False,
)
LONGEST = 500
SECONDS = 35.0


def step_time(rows: int, keys: int, sequences: int) -> float:
    return 0.02 + 5e-5 * rows + 1e-7 * keys


Load = list[VirtualSequence]


def poisson(
    tenant: str, rate: float, seconds: float, rng: random.Random, *, on_s: float = 0.0
) -> Load:
    """Requests of one tenant; with ``on_s`` it is silent every other stretch of that length."""
    found: Load = []
    now = 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        if on_s and int(now / on_s) % 2:
            continue
        found.append(request(tenant, now, rng.randint(10, LONGEST), rng.randint(10, LONGEST)))
    return found


def request(tenant: str, at: float, prompt: int, answer: int) -> VirtualSequence:
    return VirtualSequence(
        arrival=0, num_prompt=prompt, num_answer=answer, submitted_s=at, tenant=tenant
    )


def merged(*loads: Load) -> Load:
    whole = sorted((s for load in loads for s in load), key=lambda s: s.submitted_s)
    for number, sequence in enumerate(whole):
        sequence.arrival = number
    return whole


class Watch:
    """Service of tenants, and the largest difference of two while both are backlogged."""

    def __init__(self, flows: FlowOrder, planner: StepPlanner | None = None) -> None:
        self.served: dict[str, float] = {}
        self._since: dict[tuple[str, str], float] = {}
        self.widest = 0.0
        self.tokens = 0
        self.accounts = Accounts()
        self._seen: set[int] = set()
        self.engine = VirtualEngine(
            step_time,
            SIZES,
            Policy(flows),
            planner=planner or StepPlanner(),
            on_token=self._token,
        )

    def run(self, load: Load, until_s: float) -> None:
        for s in load:
            self.served.setdefault(s.tenant, 0.0)
            self.accounts.ask(s.tenant, s.submitted_s, s.num_prompt, s.num_answer)
        play(self.engine, load, each_step=self._look, until_s=until_s)

    def _token(self, sequence: VirtualSequence, now: float) -> None:
        self.tokens += 1
        self.served[sequence.tenant] += 2.0
        self.accounts.wrote(sequence.tenant, now)

    def _look(self, engine: VirtualEngine) -> None:
        for s in engine.running:
            if s.arrival not in self._seen:
                self._seen.add(s.arrival)
                self.served[s.tenant] += s.num_prompt
                self.accounts.read(s.tenant, engine.now, s.num_prompt)
        queued = set(engine.waiting.tenants)
        for pair in itertools.combinations(sorted(self.served), 2):
            if not queued.issuperset(pair):
                self._since.pop(pair, None)
                continue
            gap = self.served[pair[0]] - self.served[pair[1]]
            start = self._since.setdefault(pair, gap)
            self.widest = max(self.widest, abs(gap - start))


def overload(seed: int) -> Load:
    """Two to eight tenants of very different rates, half of them on and off, too many at once."""
    rng = random.Random(seed)
    tenants = rng.randint(2, 8)
    loads = []
    for i in range(tenants):
        rate = rng.choice((0.5, 2.0, 8.0)) * (4 if i == 0 else 1)
        loads.append(poisson(f"t{i}", rate, SECONDS, rng, on_s=rng.choice((0.0, 10.0))))
    return merged(*loads)


def test_two_backlogged_tenants_never_differ_by_more_than_2u() -> None:
    """20 seeds. ``M``, the tokens a batch can hold, is the pool's; nothing is preempted."""
    bound = 2 * max(LONGEST, 2 * POOL_TOKENS)
    widest = {"fair": 0.0, "in order": 0.0}
    for seed in range(20):
        watch = Watch(FairCounters(jump_credit=0.0))
        watch.run(overload(seed), until_s=SECONDS)
        assert watch.widest <= bound, f"seed {seed}"
        widest["fair"] = max(widest["fair"], watch.widest)
    for seed in range(3):
        plain = Watch(InOrder())
        plain.run(overload(seed), until_s=SECONDS)
        widest["in order"] = max(widest["in order"], plain.widest)
    assert widest["in order"] > 2 * widest["fair"], f"the load is too easy: {widest}"


class Cost:
    """What steps take, for pressing deadlines."""

    def time(self, num_rows: int) -> float:
        return step_time(num_rows, 0, 1)

    def rows_within(self, seconds: float, most: int) -> int:
        return max(1, min(most, int((seconds - 0.02) / 5e-5)))


def test_pressing_deadlines_break_the_bound_by_no_more_than_their_credit() -> None:
    credit = 2_000.0
    bound = 2 * max(LONGEST, 2 * POOL_TOKENS) + credit
    in_time: dict[float, int] = {}
    for allowed in (0.0, credit):
        in_time[allowed] = 0
        for seed in range(4):
            load = overload(seed)
            for s in load[::3]:
                s.ttft_s = 3.0
            watch = Watch(FairCounters(jump_credit=allowed), StepPlanner(Cost()))
            watch.run(load, until_s=SECONDS)
            assert watch.widest <= bound, f"seed {seed}"
            in_time[allowed] += sum(
                0 < s.first_token_s <= s.submitted_s + 3.0 for s in load if s.ttft_s is not None
            )
    assert in_time[credit] > 1.1 * in_time[0.0], f"nobody jumped: {in_time}"


def test_a_stream_of_pressing_ones_does_not_starve_the_rest() -> None:
    """One without a wish is passed over so often and no more, then it is its turn."""
    sizes = replace(SIZES, max_sequences=1)
    engine = VirtualEngine(step_time, sizes, Policy(InOrder()), planner=StepPlanner(Cost()))
    patient = request("a", 0.001, 50, 1)
    load = [request("c", 0.0, 50, 10), patient]
    for i in range(60):
        load.append(request("b", 0.1 + i * 0.02, 50, 1))
        load[-1].ttft_s = 0.09
    play(engine, merged(load))
    before = [s for s in load[2:] if s.scheduled_s < patient.scheduled_s]
    assert 0 < len(before) <= MAX_OVERTAKEN


@pytest.mark.parametrize("jump_s", [-500.0, 1e6])
def test_a_limit_a_minute_survives_a_clock_that_jumps(jump_s: float) -> None:
    flows = RequestsPerMinute(2)
    engine = VirtualEngine(step_time, SIZES, Policy(flows))
    for i in range(4):
        s = request("a", engine.now, 10, 1)
        s.arrival = i
        engine.submit(s)
    engine.step()
    engine.step()
    assert len(engine.waiting) == 2, "the limit holds"
    engine.now += jump_s
    engine.step()
    assert not engine.waiting, "and does not hold anybody for longer than a minute"


def test_what_is_beyond_a_share_fades_after_a_clock_went_back() -> None:
    flows = IsolatedCounters(FairCounters(), memory_s=20.0)
    greedy, polite = request("a", 0.0, 1000, 1), request("b", 0.0, 10, 1)
    flows.charge(greedy, "admitted", 1000, 1e6)
    flows.charge(polite, "admitted", 10, 1e6)
    assert flows.over({"a", "b"}) == {"a"}
    flows.charge(polite, "admitted", 10, 5.0)
    for second in range(300):
        flows.charge(polite, "generated", 1, 5.0 + second)
    assert flows.over({"a", "b"}) != {"a"}


def share_after_idling(flows: FlowOrder) -> float:
    """A tenant idles for 150 s beside a busy one: its share of the 50 s after its return."""
    rng = random.Random(3)
    busy = poisson("busy", 8.0, 200, rng)
    back = [s for s in poisson("back", 8.0, 200, rng) if s.submitted_s > 150]
    first = request("back", 0.0, 10, 10)
    watch = Watch(flows)
    watch.run(merged([first], busy, back), until_s=200)
    after = {
        tenant: sum(amount for time, amount in account.served if time > 150)
        for tenant, account in watch.accounts.tenants.items()
    }
    return after["back"] / sum(after.values())


def test_idle_time_is_no_credit() -> None:
    assert 0.45 <= share_after_idling(FairCounters()) <= 0.55
    assert share_after_idling(FairCounters(lift=False)) > 0.7


def test_weights_are_shares() -> None:
    rng = random.Random(5)
    weights = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    watch = Watch(FairCounters(weights))
    watch.run(merged(*(poisson(t, 12.0, 240, rng) for t in weights)), until_s=240)
    whole = sum(watch.served.values())
    for tenant, weight in weights.items():
        assert watch.served[tenant] / whole == pytest.approx(weight / 10, rel=0.05)


VARIANTS: dict[str, Callable[[], FlowOrder]] = {
    "predicted": lambda: FairCounters(lengths=MeanLength()),
    "general cost": lambda: FairCounters(cost=a10g_cost),
    "round robin": lambda: RoundRobin(POOL_TOKENS / 20),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_fairer_than_order_at_equal_throughput(name: str) -> None:
    def run(flows: FlowOrder) -> Watch:
        watch = Watch(flows)
        watch.run(overload(2), until_s=SECONDS)
        return watch

    plain, fair = run(InOrder()), run(VARIANTS[name]())
    assert fair.widest < 0.5 * plain.widest
    assert sum(fair.served.values()) > 0.97 * sum(plain.served.values())


def test_a_limit_a_minute_is_kept_and_wastes_the_machine() -> None:
    rng = random.Random(7)
    watch = Watch(RequestsPerMinute(30))
    load = merged(poisson("a", 4.0, 170, rng), poisson("b", 0.1, 170, rng))
    watch.run(load, until_s=170)
    admitted = sorted(s.scheduled_s for s in load if s.scheduled_s and s.tenant == "a")
    assert len(admitted) >= 60
    assert all(b - a >= 60 for a, b in zip(admitted, admitted[30:], strict=False))
    plain = Watch(InOrder())
    plain.run(merged(poisson("a", 4.0, 170, random.Random(7))), until_s=170)
    assert watch.tokens < 0.5 * plain.tokens


def latency_of_the_polite(greed: float, flows: FlowOrder) -> float:
    """Mean latency of nine tenants beside one that asks ``greed`` times as much."""
    rates = [(f"t{i}", 1.5) for i in range(9)] + ([("greedy", 1.5 * greed)] if greed else [])
    loads = [poisson(t, rate, 30, random.Random(i)) for i, (t, rate) in enumerate(rates)]
    for s in (s for load in loads for s in load):
        s.num_prompt = s.num_tokens = 10 + s.num_prompt // 3
        s.num_answer = 10 + s.num_answer // 3
    load = merged(*loads)
    engine = VirtualEngine(
        lambda rows, keys, sequences: 0.0005 + 0.00015 * rows,
        replace(SIZES, max_sequences=16, prefill_chunk=64),
        Policy(flows),
    )
    play(engine, load)
    polite = [s for s in load if s.tenant != "greedy"]
    return sum(s.ended_s - s.submitted_s for s in polite) / len(polite)


def test_isolated_tenants_hardly_feel_a_greedy_one() -> None:
    solo = latency_of_the_polite(0, FairCounters())
    assert latency_of_the_polite(10, IsolatedCounters(FairCounters())) < 1.15 * solo
    assert latency_of_the_polite(10, FairCounters()) > 2 * solo


def test_alone_nobody_is_beyond_a_share() -> None:
    flows = IsolatedCounters(FairCounters())
    s = request("a", 0.0, 100, 1)
    flows.charge(s, "admitted", 100, 1.0)
    assert flows.over({"a"}) == set()
    s.tenant = "b"
    flows.charge(s, "admitted", 1, 0.5)  # a clock that went back is no harm
    assert flows.over({"a", "b"}) == {"a"}
    assert flows.over({"a"}) == set(), "somebody must get rows"


def test_prediction_is_settled_when_an_answer_ends() -> None:
    lengths = MeanLength()
    flows = FairCounters(lengths=lengths)
    for answer in (40, 10, 100):
        engine = VirtualEngine(step_time, SIZES, Policy(flows))
        before = flows.counters.get("a", 0.0)
        play(engine, [request("a", 0.0, 20, answer)])
        assert flows.counters["a"] - before == pytest.approx(20 + 2 * answer)
    assert lengths.predict("a") == round(40 + (10 - 40) / 3 + (100 - 30) / 3)


def test_cached_tokens_are_cheap_but_never_free() -> None:
    flows = FairCounters(cached_price=0.1)
    s = request("a", 0.0, 100, 1)
    s.cached_tokens = 90
    flows.charge(s, "admitted", 100, 0.0)
    assert flows.counters["a"] == pytest.approx(10 + 9)


def test_a_recomputed_prompt_is_not_charged_again() -> None:
    sizes = Sizes(num_pages=40, page_size=16, max_sequences=8, prefill_chunk=64, max_rows=128)
    whole = merged(*([request("a", 0.0, 100, 200)] for _ in range(4)))
    flows = FairCounters()
    engine = VirtualEngine(step_time, sizes, Policy(flows))
    play(engine, whole)
    assert engine.preemptions > 0
    assert flows.counters["a"] == pytest.approx(4 * (100 + 2 * 200))


def test_counters_are_lowered_together_and_idle_tenants_forgotten() -> None:
    flows = FairCounters()
    flows.counters = {"old": 5.0, "a": 3e9, "b": 3e9 + 7}
    flows.enqueue("c", {"a": [], "b": []}, "")
    assert flows.counters == {"a": 0.0, "b": 7.0, "c": 0.0}


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e7, 1e-7])
def test_absurd_weights_are_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="weight of tenant 'a'"):
        FairCounters({"a": weight})


@pytest.mark.parametrize("entry", ["a", "=2", "a=", "a=x", "a=-1", "a=0"])
def test_weights_that_are_none_are_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="weight"):
        read_weights([entry])


def test_a_tenant_named_twice_is_refused_and_odd_names_are_read() -> None:
    with pytest.raises(ConfigError, match="each tenant once"):
        read_weights(["a=1", "a=2"])
    assert read_weights(["a=b=2", "c=0.5"]) == {"a=b": 2.0, "c": 0.5}


def test_an_unknown_tenant_has_a_normal_share() -> None:
    flows = make_policy("fair", weights=["known=4"]).flows
    assert isinstance(flows, FairCounters)
    assert flows.weight("known") == 4.0
    assert flows.weight("never seen") == 1.0


def test_the_measure_of_the_paper() -> None:
    accounts = Accounts()
    accounts.ask("a", 0.0, 0, 100)
    accounts.ask("b", 0.0, 0, 100)
    accounts.ask("c", 0.0, 10, 0)
    accounts.wrote("a", 1.0, 80)
    accounts.wrote("b", 1.0, 20)
    accounts.read("c", 2.0, 10)
    found = service_differences(accounts, window_s=10, until_s=10)
    # a: it got most. b: 160 - 40. c: it got all it asked for.
    assert found.most == found.mean == 120.0
