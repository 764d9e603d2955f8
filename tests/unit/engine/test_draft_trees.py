"""Trees of a draft model inside the engine, and the rules that keep a distribution."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from coppice import LLM, SamplingParams
from coppice.errors import ConfigError
from coppice.models.locate import BUNDLED, BUNDLED_DRAFT, locate

PROMPTS = [
    "It was a dark and stormy night, and the old man",
    "def read_file(path):\n    ",
    "She looked at him with a smile",
]
SMALL = {"context_length": 256, "kv_cache_mib": 16, "max_sequences": 8, "max_rows": 96}


def engine(**settings: Any) -> LLM:
    """The bundled pair; rows cost so little that trees are always worth it."""
    llm = LLM(BUNDLED, **{**SMALL, **settings})
    if settings.get("speculate", "off") != "off":
        speculator = llm.engine._speculator
        assert speculator is not None
        speculator._controller._step_s = lambda rows: 1.0 + 0.01 * rows
    return llm


def answers(llm: LLM, temperature: float, tokens: int = 32, **more: Any) -> list[Any]:
    params = [
        SamplingParams(temperature=temperature, max_tokens=tokens, seed=i, **more)
        for i in range(len(PROMPTS))
    ]
    return [result.outputs[0] for result in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def plain() -> LLM:
    return engine()


@pytest.fixture(scope="module", params=["match", "chain", "mss", "swor"])
def speculating(request: pytest.FixtureRequest) -> LLM:
    return engine(speculate="draft", verify=request.param)


def test_greedy_answers_are_the_same_under_every_rule(plain: LLM, speculating: LLM) -> None:
    ours = answers(speculating, 0.0, logprobs=2)
    wanted = answers(plain, 0.0, logprobs=2)
    assert [o.token_ids for o in ours] == [o.token_ids for o in wanted]
    assert [o.logprobs for o in ours] == [o.logprobs for o in wanted]


def test_trees_are_accepted_at_any_temperature(plain: LLM, speculating: LLM) -> None:
    before = dict(speculating.engine.speculated)
    ours = answers(speculating, 0.8, ignore_eos=True)
    found = speculating.engine.speculated
    accepted = found["accepted"] - before.get("accepted", 0)
    assert accepted > 0.3 * sum(len(o.token_ids) for o in ours)
    assert found["faults"] == 0
    if speculating.engine.config.verify == "match":
        wanted = answers(plain, 0.8, ignore_eos=True)
        assert [o.token_ids for o in ours] == [o.token_ids for o in wanted]


def test_a_rule_has_its_say_in_cuts_and_logprobs(speculating: LLM) -> None:
    for output in answers(speculating, 1.0, top_k=3, logprobs=3, ignore_eos=True):
        assert output.logprobs is not None
        for token, chosen in zip(output.token_ids, output.logprobs, strict=True):
            assert chosen.token == token
            assert token in [t for t, _ in chosen.top]


def test_what_was_accepted_is_cached_as_a_prefill_would_be(plain: LLM, speculating: LLM) -> None:
    """The KV behind a speculated answer serves its continuation bit for bit."""
    (first,) = speculating.generate(
        [PROMPTS[0]], SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
    )
    text = [*first.prompt_token_ids, *first.outputs[0].token_ids]
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=2, ignore_eos=True)
    (cached,) = speculating.generate([text], params)
    assert cached.num_cached_tokens >= 64
    cold = engine(prefix_cache=False)
    (fresh,) = cold.generate([text], params)
    assert cached.outputs[0].logprobs == fresh.outputs[0].logprobs
    speculating.engine.check_pages()


def test_a_draft_with_another_vocabulary_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "stranger"
    shutil.copytree(locate(BUNDLED_DRAFT), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[500:502]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"stranger.*another vocabulary"):
        engine(speculate="draft", draft_model=str(folder))


def test_speculation_without_a_draft_names_the_setting(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(locate(BUNDLED), folder)
    with pytest.raises(ConfigError, match="draft_model"):
        LLM(str(folder), speculate="draft", **SMALL)
