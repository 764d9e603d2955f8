"""The request timeline: bounded, per tenant, and without text."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from coppice.server.timeline import Timeline


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeCall:
    """What the timeline reads of a call."""

    id: str
    arrived: float
    tenant: str = "default"
    route: str = "/v1/chat/completions"
    generation: Any = None
    key: Any = field(init=False)

    def __post_init__(self) -> None:
        self.key = SimpleNamespace(tenant=self.tenant)


def generation(**changes: Any) -> SimpleNamespace:
    values = {
        "queue_s": None, "first_token_s": None, "prompt_tokens": 7, "cached_tokens": 4,
        "completion_tokens": 0, "text": "secret words",
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


def test_a_request_passes_through_its_phases() -> None:
    clock = Clock()
    timeline = Timeline(clock=clock)
    call = FakeCall("a", arrived=100.0)
    timeline.begin(call)  # type: ignore[arg-type]
    (record,) = timeline.view()["requests"]
    assert record["outcome"] is record["e2e_s"] is record["ttft_s"] is record["queue_s"] is None

    clock.now = 100.5
    call.generation = generation(first_token_s=100.3, completion_tokens=5)
    (record,) = timeline.view()["requests"]
    assert record["ttft_s"] == 100.3 - 100.0
    assert (record["prompt_tokens"], record["completion_tokens"]) == (7, 5)
    assert record["e2e_s"] is None

    clock.now = 102.0
    call.generation = generation(first_token_s=100.3, queue_s=0.1, completion_tokens=30)
    timeline.end(call, "finished")  # type: ignore[arg-type]
    clock.now = 200.0
    view = timeline.view()
    (record,) = view["requests"]
    assert view["now_s"] == 200.0
    assert (record["e2e_s"], record["queue_s"], record["outcome"]) == (2.0, 0.1, "finished")


def test_ended_twice_is_one_record_and_refused_has_no_phases() -> None:
    timeline = Timeline(clock=Clock(101.0))
    call = FakeCall("a", arrived=100.0)
    timeline.begin(call)  # type: ignore[arg-type]
    timeline.end(call, "refused")  # type: ignore[arg-type]
    timeline.end(call, "cancelled")  # type: ignore[arg-type]
    (record,) = timeline.view()["requests"]
    assert (record["outcome"], record["e2e_s"], record["ttft_s"]) == ("refused", 1.0, None)


def test_memory_is_bounded_and_the_newest_come_first() -> None:
    clock = Clock()
    timeline = Timeline(kept=5, clock=clock)
    for number in range(50):
        call = FakeCall(str(number), arrived=float(number))
        timeline.begin(call)  # type: ignore[arg-type]
        timeline.end(call, "finished")  # type: ignore[arg-type]
    live = FakeCall("live", arrived=49.5)
    timeline.begin(live)  # type: ignore[arg-type]
    ids = [record["id"] for record in timeline.view()["requests"]]
    assert ids == ["live", "49", "48", "47", "46", "45"]
    assert [record["id"] for record in timeline.view(shown=2)["requests"]] == ["live", "49"]


def test_a_tenant_sees_its_own_requests_only() -> None:
    timeline = Timeline(clock=Clock())
    mine, theirs = FakeCall("mine", 1.0, "me"), FakeCall("theirs", 2.0, "them")
    ended = FakeCall("ended", 3.0, "them")
    for call in (mine, theirs, ended):
        timeline.begin(call)  # type: ignore[arg-type]
    timeline.end(ended, "finished")  # type: ignore[arg-type]
    assert [r["id"] for r in timeline.view("me")["requests"]] == ["mine"]
    assert [r["id"] for r in timeline.view("them")["requests"]] == ["ended", "theirs"]
    assert len(timeline.view(None)["requests"]) == 3


def test_no_text_leaves_and_all_is_json() -> None:
    timeline = Timeline(clock=Clock())
    call = FakeCall("a", 1.0, generation=generation())
    timeline.begin(call)  # type: ignore[arg-type]
    timeline.end(call, "cancelled")  # type: ignore[arg-type]
    assert "secret" not in json.dumps(timeline.view())
