"""The Python API: what vLLM users expect, on a real small model."""

from __future__ import annotations

import pytest

from coppice import LLM, SamplingParams
from coppice.errors import ConfigError, ContextOverflowError, RequestError
from tests.kits.models import SMALL

PROMPT = "It was the best of times"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(SMALL)


def greedy(**fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_eos=True, **fields)  # type: ignore[arg-type]


def test_text_and_token_ids_prompts_agree(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    by_text = llm.generate(PROMPT, greedy(max_tokens=12))[0]
    by_ids = llm.generate(ids, greedy(max_tokens=12))[0]
    assert by_text.prompt == PROMPT
    assert by_ids.prompt is None
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids == ids
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
    assert len(by_text.outputs[0].token_ids) == 12
    assert by_text.outputs[0].finish_reason == "length"
    assert by_text.outputs[0].text == llm.tokenizer.decode(by_text.outputs[0].token_ids)


def test_results_keep_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["one two", "a rather longer prompt than the first, to end later", "x"]
    params = [greedy(max_tokens=n) for n in (9, 3, 6)]
    results = llm.generate(prompts, params)
    assert [r.prompt for r in results] == prompts
    assert [len(r.outputs[0].token_ids) for r in results] == [9, 3, 6]


def test_a_stop_string_ends_text_and_tokens_together(llm: LLM) -> None:
    whole = llm.generate(PROMPT, greedy(max_tokens=40))[0].outputs[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    cut = llm.generate(PROMPT, greedy(max_tokens=40, stop=(stop,), logprobs=1))[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert cut.logprobs is not None
    assert len(cut.logprobs) == len(cut.token_ids)
    assert not llm.engine.has_work


def test_streamed_pieces_are_the_whole_answer(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, seed=4, ignore_eos=True)
    assert "".join(llm.stream(PROMPT, params)) == llm.generate(PROMPT, params)[0].outputs[0].text


def test_leaving_a_stream_gives_its_pages_back(llm: LLM) -> None:
    stream = llm.stream(PROMPT, greedy(max_tokens=200))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work
    assert llm.engine.stats().pages_used == 0
    llm.engine.check_pages()


def test_chat_renders_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    one = llm.chat(messages, greedy(max_tokens=4))[0]
    several = llm.chat([messages, messages], greedy(max_tokens=4))
    assert "<|im_start|>" in llm.tokenizer.decode(one.prompt_token_ids)
    assert [r.outputs[0].token_ids for r in several] == [one.outputs[0].token_ids] * 2


def test_seeds_of_requests_without_one_follow_the_engines(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    first, second = (LLM(SMALL, seed=9).generate(PROMPT, params)[0] for _ in range(2))
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_one_bad_prompt_runs_nothing(llm: LLM) -> None:
    with pytest.raises(ContextOverflowError):
        llm.generate([[5], [5] * 5000])
    with pytest.raises(RequestError):
        llm.generate([[5], []])
    with pytest.raises(RequestError):
        llm.generate([[10**9]])
    assert not llm.engine.has_work


def test_more_tokens_than_fit_are_refused_not_cut(llm: LLM) -> None:
    with pytest.raises(ContextOverflowError, match=r"5000 are asked for.*2048"):
        llm.generate("x", greedy(max_tokens=5000))
    whole = llm.generate([5] * 2040, greedy(max_tokens=None))[0].outputs[0]
    assert len(whole.token_ids) == 8


def test_quantization_is_named_and_repeats(llm: LLM) -> None:
    tokens = {}
    for name in ("int8", "int4"):
        found = [LLM(SMALL, quantization=name) for _ in range(2)]
        facts = [one.engine.model.facts for one in found]
        assert facts[0].weight_format.startswith(name)
        assert facts[0].fingerprint == facts[1].fingerprint
        assert facts[0].fingerprint != llm.engine.model.facts.fingerprint
        assert facts[0].weight_bytes < 0.6 * llm.engine.model.facts.weight_bytes
        answers = [one.generate("Once upon a time", greedy(max_tokens=12)) for one in found]
        tokens[name] = [answer[0].outputs[0].token_ids for answer in answers]
        assert tokens[name][0] == tokens[name][1]


def test_what_is_not_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantization"):
        LLM(SMALL, quantization="awq")
    with pytest.raises(ConfigError, match="page_size"):
        LLM(SMALL, page_siz=16)
