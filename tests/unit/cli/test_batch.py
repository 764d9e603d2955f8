"""Files of requests: both line formats, order, and errors that stay on their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coppice import RequestOutput, SamplingParams
from coppice.cli.batch import GROUP, answer_all, read_lines, to_json
from coppice.engine.outputs import CompletionOutput
from coppice.errors import ConfigError, ContextOverflowError

DEFAULTS = {"max_tokens": 7, "temperature": 0.5}


class EchoModel:
    """Answers with the prompt in capitals; refuses a call that holds a long prompt."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.seen: list[SamplingParams] = []

    def generate(self, prompts: Any, params: Any = None) -> list[RequestOutput]:
        self.calls.append(len(prompts))
        if any(len(prompt) > 20 for prompt in prompts):
            raise ContextOverflowError("The prompt is too long.")
        self.seen += params
        return [
            RequestOutput(
                "r", prompt, [1, 2], [CompletionOutput(0, prompt.upper(), [3], None, "length")]
            )
            for prompt in prompts
        ]

    def chat(self, messages: Any, params: Any = None) -> list[RequestOutput]:
        return self.generate([m[-1]["content"] for m in messages], params)


def batch(tmp_path: Path, *lines: object) -> list[dict[str, Any]]:
    path = tmp_path / "requests.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return [to_json(line) for line in answer_all(EchoModel(), read_lines(path, DEFAULTS))]


def test_plain_and_enveloped_lines_in_order(tmp_path: Path) -> None:
    answers = batch(
        tmp_path,
        {"prompt": "one"},
        {"custom_id": "b", "messages": [{"role": "user", "content": "two"}]},
        "",
        {
            "custom_id": "c",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "any", "prompt": "three", "max_tokens": 3, "stop": "x"},
        },
    )
    assert [a["custom_id"] for a in answers] == ["line-1", "b", "c"]
    assert [a["choices"][0]["text"] for a in answers] == ["ONE", "TWO", "THREE"]
    assert answers[0]["usage"] == {"prompt_tokens": 2, "completion_tokens": 1}


def test_line_fields_beat_the_flags(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "max_completion_tokens": 9, "stop": "s"}\n')
    model = EchoModel()
    list(answer_all(model, read_lines(path, DEFAULTS)))
    assert [(p.max_tokens, p.temperature, p.stop) for p in model.seen] == [
        (7, 0.5, ()),
        (9, 0.5, ("s",)),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ({"max_tokens": 3}, "either 'prompt' or 'messages'"),
        ({"prompt": "a", "messages": []}, "either 'prompt' or 'messages'"),
        ({"prompt": "a", "temprature": 1}, "Unknown field 'temprature'"),
        ({"prompt": "a", "temperature": "hot"}, "Expected `float`"),
        ({"prompt": "a", "temperature": -1}, "temperature must lie between"),
        ({"prompt": 3}, "Expected `str | array"),
        ({"body": {"prompt": "a"}, "ulr": "x"}, "Unknown field 'ulr'"),
        ({"body": {"prompt": "a"}, "url": "/v1/embeddings"}, "url must be one of"),
    ],
)
def test_a_wrong_line_is_refused_and_the_next_is_answered(
    tmp_path: Path, line: object, says: str
) -> None:
    wrong, right = batch(tmp_path, line, {"prompt": "fine"})
    assert says in wrong["error"]["message"]
    assert wrong["error"]["code"] == "invalid_request"
    assert right["choices"][0]["text"] == "FINE"


def test_one_refused_request_does_not_cost_its_neighbours(tmp_path: Path) -> None:
    prompts = [f"p{i}" for i in range(40)]
    prompts[17] = "x" * 50
    answers = batch(tmp_path, *({"prompt": prompt} for prompt in prompts))
    assert answers[17]["error"]["code"] == "context_overflow"
    kept = [a["choices"][0]["text"] for i, a in enumerate(answers) if i != 17]
    assert kept == [p.upper() for i, p in enumerate(prompts) if i != 17]


def test_lines_go_to_the_engine_together(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "a"}\n' * (GROUP + 1))
    model = EchoModel()
    assert len(list(answer_all(model, read_lines(path, DEFAULTS)))) == GROUP + 1
    assert model.calls == [GROUP, 1]


def test_empty_missing_and_repeated(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(ConfigError, match="Cannot read"):
        read_lines(path, {})
    path.write_text("\n\n")
    with pytest.raises(ConfigError, match="holds no requests"):
        read_lines(path, {})
    path.write_text('{"custom_id": "a", "prompt": "x"}\n' * 2)
    with pytest.raises(ConfigError, match="the id 'a' twice"):
        read_lines(path, {})
