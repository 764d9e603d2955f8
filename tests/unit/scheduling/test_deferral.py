"""Deferral windows: no late batch, larger ones than eager, work packed on few devices."""

from __future__ import annotations

import random

import pytest

from coppice.errors import ConfigError
from coppice.scheduling.deferral import Deferral, Dispatcher, Profile, Served

PROFILE = Profile(1.082e-3, 5.204e-3)
BUDGET_S = 0.025


def serve(rate: float, models: int = 1, *, seconds: float = 1.5, **rule: bool) -> Served:
    rng = random.Random(4)
    arrivals, now = [], 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        arrivals.append((now, rng.randrange(models)))
    rules = [Deferral(PROFILE, BUDGET_S, **rule) for _ in range(models)]
    served = Dispatcher(rules, 8).run(arrivals)
    assert served.requests == len(arrivals), "a request was lost"
    return served


@pytest.mark.parametrize("models", [1, 8, 32])
@pytest.mark.parametrize("rate", [300, 1500, 6000])
def test_nothing_dispatched_is_late(models: int, rate: float) -> None:
    served = serve(rate, models)
    assert served.late == 0
    assert served.on_time > 0


def test_at_low_load_few_devices_do_the_work() -> None:
    deferred, eager = serve(1500), serve(1500, eager=True)
    assert deferred.share_on_time == eager.share_on_time == 1.0
    assert sum(deferred.busy_s) < 0.5 * sum(eager.busy_s)
    assert deferred.on_time / deferred.batches > 3 * eager.on_time / eager.batches
    assert deferred.busy_s == sorted(deferred.busy_s, reverse=True)


def test_under_load_more_is_on_time_than_with_plain_batching() -> None:
    assert serve(4800).share_on_time > 0.99
    assert serve(4800, blind=True).share_on_time < 0.5


def test_with_many_models_waiting_is_given_up() -> None:
    assert serve(1800, 32).share_on_time >= 0.97 * serve(1800, 32, eager=True).share_on_time


def test_one_far_deadline_waits_and_a_hopeless_one_is_dropped() -> None:
    rule = Deferral(PROFILE, BUDGET_S)
    found = rule.gather([1.0], 0.0, 4)
    assert found.batch == 1
    assert found.exec_s == pytest.approx(1.0 - PROFILE.time(2))
    assert found.latest_s == pytest.approx(1.0 - PROFILE.time(1))
    assert rule.gather([0.001], 0.0, 4).drops == 1
    assert rule.bounds([1.0], 0.0) == (found.exec_s, found.latest_s)


def test_the_target_grows_with_the_rate() -> None:
    rule = Deferral(PROFILE, BUDGET_S)
    sizes = [rule.target(rate) for rate in (1, 100, 1000, 5000)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] > 10


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
def test_profiles_that_are_none_are_refused(price: float) -> None:
    with pytest.raises(ConfigError, match="batch profile"):
        Profile(price, 0.0)
