"""Constraints inside the step: every answer obeys, and a broken one fails alone."""

from __future__ import annotations

import json
import re

import pytest

from coppice import LLM, SamplingParams
from coppice.engine.engine import Engine
from coppice.engine.request import Grammar, Request
from coppice.errors import GrammarError
from tests.kits.models import SMALL


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(SMALL)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_json_schema_holds_at_every_temperature(llm: LLM) -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    params = [
        SamplingParams(max_tokens=200, temperature=t, seed=s, grammar=grammar)
        for s, t in enumerate((0.0, 0.7, 1.0, 1.5, 1.5))
    ]
    for result in llm.generate(["Describe a person:"] * len(params), params):
        output = result.outputs[0]
        if output.finish_reason == "stop":
            assert set(json.loads(output.text)) == {"name", "age"}
        else:
            assert output.text.startswith("{")


def test_regex_beside_free_text(llm: LLM) -> None:
    grammar = Grammar("regex", r"(yes|no), [0-9]{3}")
    params = [SamplingParams(max_tokens=30, seed=1, grammar=grammar), SamplingParams(seed=1)]
    bound, free = llm.generate(["Answer:", "Answer:"], params)
    assert re.fullmatch(grammar.source, bound.outputs[0].text)
    alone = llm.generate("Answer:", SamplingParams(seed=1))[0]
    assert free.outputs[0].token_ids == alone.outputs[0].token_ids


def test_impossible_schema_is_refused_before_anything_runs(llm: LLM) -> None:
    grammar = Grammar("json_schema", json.dumps({"type": "string", "enum": []}))
    with pytest.raises(GrammarError):
        llm.generate("x", SamplingParams(grammar=grammar))
    assert not llm.engine.has_work


def test_a_constraint_that_breaks_fails_its_own_row(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Engine = llm.engine
    grammar = Grammar("regex", "[a-z]{40}")
    engine.submit(Request(id="bad", prompt=[5], sampling=SamplingParams(grammar=grammar)))
    engine.submit(Request(id="good", prompt=[5, 6], sampling=SamplingParams(seed=2)))
    broken = engine._requests["bad"][0].grammar
    assert broken is not None

    def fail() -> None:
        raise GrammarError("The constraint broke.")

    engine._requests["bad"][0].grammar = type("Broken", (), {"mask": staticmethod(fail)})()  # type: ignore[assignment]
    ends = {}
    while engine.has_work:
        ends |= {o.request_id: o for o in engine.step() if o.finish_reason}
    assert ends["bad"].finish_reason == "failed"
    assert ends["bad"].error == ("grammar_error", "The constraint broke.")
    assert ends["good"].finish_reason in ("length", "stop")
    engine.check_pages()
