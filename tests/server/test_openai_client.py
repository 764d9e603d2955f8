"""The official client over completions and chat, streamed and whole."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest

from tests.kits.server import ServerProcess

MESSAGES: Any = [{"role": "user", "content": "Say héllo 🙂"}]


def gather_chat(stream: Any) -> dict[int, dict[str, Any]]:
    """Put streamed chunks together as a client would; choices by index, usage under -1."""
    made: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        if not chunk.choices:
            made[-1] = {"usage": chunk.usage}
        for choice in chunk.choices:
            entry = made.setdefault(
                choice.index, {"text": "", "roles": [], "logprobs": [], "finish": None}
            )
            entry["text"] += choice.delta.content or ""
            if choice.delta.role:
                entry["roles"].append(choice.delta.role)
            if choice.logprobs:
                entry["logprobs"] += choice.logprobs.content
            entry["finish"] = choice.finish_reason or entry["finish"]
            entry["stop"] = getattr(choice, "stop_reason", None)
    return made


CHAT_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "short": {"max_tokens": 5},
    "max_completion_tokens": {"max_completion_tokens": 7},
    "three choices": {"n": 3, "max_tokens": 30},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "max_tokens": 24},
    "logprobs without alternatives": {"logprobs": True, "max_tokens": 24},
    "stop string": {"stop": "llo"},
    "stop strings over several tokens": {"stop": ["zzz", "hé", "Say h"], "max_tokens": 40},
    "stop kept": {"stop": "llo", "extra_body": {"include_stop_str_in_output": True}},
    "stop token": {"extra_body": {"stop_token_ids": [72]}, "max_tokens": 40},
    "split characters": {"max_tokens": 16},
    "ignore eos": {"max_tokens": 90, "extra_body": {"ignore_eos": True}},
    "special tokens shown": {"max_tokens": 30, "extra_body": {"skip_special_tokens": False}},
    "all knobs": {
        "temperature": 0.7, "top_p": 0.9, "seed": 11, "frequency_penalty": 0.1,
        "presence_penalty": -0.1, "logit_bias": {"5": -100}, "user": "me", "max_tokens": 9,
        "extra_body": {
            "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "priority": 3,
            "deadline_s": 30, "ttft_s": 1.5, "tpot_s": 0.1, "cache_salt": "x", "speculate": "auto",
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CHAT_CASES, ids=str)
def test_streamed_chat_equals_unstreamed(server: ServerProcess, case: str) -> None:
    client, fields = server.client(), CHAT_CASES[case]
    whole = client.chat.completions.create(model="fake", messages=MESSAGES, **fields)
    streamed = gather_chat(
        client.chat.completions.create(
            model="fake", messages=MESSAGES, stream=True,
            stream_options={"include_usage": True}, **fields,
        )
    )  # fmt: skip
    usage = streamed.pop(-1)["usage"]
    assert usage == whole.usage
    assert sorted(streamed) == [choice.index for choice in whole.choices]
    for choice in whole.choices:
        got = streamed[choice.index]
        assert got["roles"] == ["assistant"]
        assert got["text"] == choice.message.content
        assert got["finish"] == choice.finish_reason
        assert got["stop"] == choice.stop_reason
        assert got["logprobs"] == (choice.logprobs.content if choice.logprobs else [])


COMPLETION_CASES: dict[str, dict[str, Any]] = {
    "default length": {"prompt": "a long enough prompt for sixteen"},
    "list of texts": {"prompt": ["ab", "héllo", "🙂🙂"], "max_tokens": 30},
    "token ids": {"prompt": [72, 73, 74]},
    "lists of token ids": {"prompt": [[72, 73, 74], [80, 81]], "n": 2},
    "logprobs": {"prompt": "abc wörld", "logprobs": 2},
    "logprobs 0": {"prompt": "abc", "logprobs": 0},
    "stop": {"prompt": "one two three", "stop": ["two"]},
    "many": {"prompt": [f"prompt {i}" for i in range(128)], "max_tokens": 3},
}


@pytest.mark.parametrize("case", COMPLETION_CASES, ids=str)
def test_streamed_completion_equals_unstreamed(server: ServerProcess, case: str) -> None:
    client, fields = server.client(), COMPLETION_CASES[case]
    whole = client.completions.create(model="fake", **fields)
    made: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in client.completions.create(
        model="fake", stream=True, stream_options={"include_usage": True}, **fields
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            entry = made.setdefault(choice.index, {"text": "", "lp": {}})
            entry["text"] += choice.text
            entry["finish"] = choice.finish_reason
            if choice.logprobs:
                for name, values in choice.logprobs.model_dump().items():
                    entry["lp"].setdefault(name, []).extend(values)
    assert usage == whole.usage
    for choice in whole.choices:
        got = made[choice.index]
        assert got["text"] == choice.text
        assert got["finish"] == choice.finish_reason
        assert got["lp"] == (choice.logprobs.model_dump() if choice.logprobs else {})


def test_stop_string_is_never_leaked_and_ends_the_choice(server: ServerProcess) -> None:
    choice = server.client().completions.create(
        model="fake", prompt="one two three", stop=["two", "three"], max_tokens=12
    ).choices[0]  # fmt: skip
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("one ", "stop", "two")


def test_usage_counts_tokens_up_to_the_stop(server: ServerProcess) -> None:
    usage = server.client().completions.create(
        model="fake", prompt="one two three", stop="two", max_tokens=12
    ).usage  # fmt: skip
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (13, 7)


def test_finish_reason_length_and_stop(server: ServerProcess) -> None:
    client = server.client()
    short = client.completions.create(model="fake", prompt="abcdef", max_tokens=3).choices[0]
    assert (short.finish_reason, short.text) == ("length", "abc")
    done = client.completions.create(model="fake", prompt="abcdef", max_tokens=10).choices[0]
    assert (done.finish_reason, done.text) == ("stop", "abcdef")


def test_chat_logprobs_carry_the_bytes_of_split_characters(server: ServerProcess) -> None:
    choice = server.client().chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "🙂"}], logprobs=True,
    ).choices[0]  # fmt: skip
    assert choice.logprobs is not None and choice.logprobs.content is not None
    joined = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert "🙂".encode() in joined


def test_content_as_a_list_of_text_parts(server: ServerProcess) -> None:
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    reply = server.client().chat.completions.create(
        model="fake", messages=[{"role": "developer", "content": parts}]
    )
    assert "system\na\nb" in (reply.choices[0].message.content or "")


def test_stream_ends_with_done_and_usage_has_no_choices(server: ServerProcess) -> None:
    body = {
        "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    with server.http() as http:
        text = http.post("/v1/chat/completions", json=body).text
    events = [line for line in text.split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    assert '"choices":[]' in events[-2] and '"usage":{' in events[-2]
    assert all('"usage":null' in event for event in events[:-2])
    assert sum('"role"' in event for event in events) == 1


def test_models_list_and_show(server: ServerProcess) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="a")
    assert caught.value.code == "model_not_found"


def test_tokenize_detokenize_and_render(server: ServerProcess) -> None:
    with server.http() as http:
        made = http.post("/tokenize", json={"prompt": "héllo"}).json()
        assert made["count"] == 6 and made["max_model_len"] == 2048
        back = http.post("/detokenize", json={"tokens": made["tokens"]}).json()
        assert back == {"prompt": "héllo"}
        rendered = http.post("/v1/chat/completions/render", json={"messages": MESSAGES}).json()
    assert rendered["prompt"] == (
        "<|im_start|>user\nSay héllo 🙂<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered["count"] == len(rendered["tokens"])


def test_unknown_field_is_named_in_warnings(server: ServerProcess) -> None:
    reply = server.client().completions.create(
        model="fake", prompt="a", extra_body={"colour": 3, "nothing": None}
    )
    assert reply.warnings == ["unknown field 'colour' was ignored"]  # type: ignore[attr-defined]
    chunks = server.client().completions.create(
        model="fake", prompt="a", stream=True, extra_body={"colour": 3}
    )
    assert next(iter(chunks)).warnings == ["unknown field 'colour' was ignored"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2), ("echo", True), ("suffix", "x"), ("prompt_logprobs", 1), ("store", True),
        ("speculate", "on"), ("guided_json", {}), ("truncate_prompt_tokens", 5),
    ],
)  # fmt: skip
def test_known_but_unbuilt_fields_are_refused_by_name(
    server: ServerProcess, field: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model="fake", prompt="a", extra_body={field: value})
    assert caught.value.param == field
    assert field in caught.value.message


def test_image_part_is_refused_by_name(server: ServerProcess) -> None:
    part: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(
            model="fake", messages=[{"role": "user", "content": [part]}]
        )
    assert caught.value.param == "messages[0].content[0].type"


def test_context_overflow_names_both_lengths(server: ServerProcess) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="x" * 2048, max_tokens=1)
    assert caught.value.code == "context_overflow"
    assert "2048" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="x" * 2000, max_tokens=100)
    assert "2000" in caught.value.message and "2048" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="x" * (16 * 2048 + 1), max_tokens=1)
    assert "32769" in caught.value.message


@pytest.mark.parametrize("characters", [2048, 16 * 2048 + 1])
def test_overflow_of_a_conversation_names_its_messages(
    server: ServerProcess, characters: int
) -> None:
    messages: Any = [{"role": "user", "content": "x" * characters}]
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(model="fake", messages=messages)
    assert (caught.value.code, caught.value.param) == ("context_overflow", "messages")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("route", ["chat", "completions"])
def test_usage_tells_what_became_of_guesses(
    server: ServerProcess, route: str, stream: bool
) -> None:
    def guesses(**fields: Any) -> tuple[int, int]:
        client = server.client()
        options: Any = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        options |= {"model": "fake", "max_tokens": 12, "n": 2, "extra_body": fields}
        made: Any = (
            client.chat.completions.create(messages=MESSAGES, **options)
            if route == "chat"
            else client.completions.create(prompt="a long enough prompt", **options)
        )
        usage = list(made)[-1].usage if stream else made.usage
        details = usage.completion_tokens_details
        return details.accepted_prediction_tokens, details.rejected_prediction_tokens

    assert guesses() == guesses(speculate="auto") == (8, 8)
    assert guesses(speculate="off") == (0, 0)


def test_request_id_is_echoed_or_refused(server: ServerProcess) -> None:
    with server.http() as http:
        good = http.get("/health/live", headers={"X-Request-Id": "my-id.7"})
        assert good.headers["x-request-id"] == "my-id.7"
        bad = http.get("/health/live", headers={"X-Request-Id": "no spaces"})
        assert bad.status_code == 400
        made = http.get("/health/live")
        assert made.headers["x-request-id"].startswith("req-")


def test_replies_do_not_wait_for_delayed_acknowledgements(server: ServerProcess) -> None:
    with server.http() as http:
        http.get("/health/live")
        times = []
        for _ in range(20):
            started = time.monotonic()
            http.get("/health/live")
            times.append(time.monotonic() - started)
    assert sorted(times)[5] < 0.035, times


def test_system_fingerprint_is_the_engines(server: ServerProcess) -> None:
    reply = server.client().completions.create(model="fake", prompt="a")
    assert reply.system_fingerprint == "fp_fake"


def test_row_fault_fails_only_its_request(server: ServerProcess) -> None:
    client = server.client()
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="fake", prompt="abcdef", seed=666)
    assert caught.value.code == "row_fault"
    with pytest.raises(openai.APIError) as streamed:
        list(client.completions.create(model="fake", prompt="abcdef", seed=666, stream=True))
    assert streamed.value.code == "row_fault"
    assert client.completions.create(model="fake", prompt="ab").choices[0].text == "ab"


def test_deadline_keeps_the_partial_text(server: ServerProcess) -> None:
    before = server.info()["outcomes"]["expired"]
    reply = server.client().completions.create(
        model="fake", prompt="abc", max_tokens=2000,
        extra_body={"ignore_eos": True, "deadline_s": 0.2},
    ).choices[0]  # fmt: skip
    assert (reply.finish_reason, reply.stop_reason) == ("length", "deadline")
    assert reply.text.startswith("abcabc")
    assert server.info()["outcomes"]["expired"] == before + 1
