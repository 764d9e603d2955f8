"""What waits, as admission counts it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from coppice.engine.request import Request, SamplingParams
from coppice.server import ServerConfig
from coppice.server.admission import Admission, Load
from coppice.server.replay import LiveRequest
from coppice.server.unread import Unread


def test_prompts_that_were_answered_do_not_wait_until_their_whole_call_has_ended() -> None:
    engine: Any = SimpleNamespace(live={}, stats=None, facts=None)
    admission = Admission(ServerConfig(), engine)
    permit = admission.admit("somebody", Load(sequences=3, prompt_tokens=300))
    assert admission.waiting_tokens() == 300
    for name in "abc":
        request = Request(id=name, prompt=[1] * 100, sampling=SamplingParams(seed=1))
        engine.live[name] = LiveRequest(request, Unread())
    permit.hand_over()
    assert admission.waiting_tokens() == 300
    engine.live["a"].started = True
    assert admission.waiting_tokens() == 200
    engine.live["b"].parked = True
    assert admission.waiting_tokens() == 100, "its reader is waited for, not the engine"
    engine.live["b"].parked = False
    del engine.live["a"]
    assert admission.waiting_tokens() == 200
    engine.live.clear()
    assert admission.waiting_tokens() == 0 and admission.promised.sequences == 3
    permit.release()
    permit.release()
    assert admission.waiting_tokens() == 0 == admission.promised.prompt_tokens
    admission.admit("somebody", Load(sequences=1, prompt_tokens=50)).resize(Load(1, 40))
    assert admission.waiting_tokens() == 40
