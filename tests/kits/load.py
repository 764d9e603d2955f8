"""A mixed load with known answers: every way of choosing tokens, streamed and whole.

`BODIES` are requests; `ask` sends one and gives its answer in a form that is the same
streamed or not, so that answers under a fault can be compared with undisturbed ones.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

STORY = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness, it was the epoch of belief, it was the epoch of incredulity. "
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "greet", "parameters": SCHEMA, "strict": True}}
SAY = [{"role": "user", "content": "Tell me about the sea and the people who live by it."}]
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
Body = tuple[str, dict[str, Any]]
GUESS = {"speculate": "suffix"}
"""Whether it pays or not; the others of a load leave that to the engine."""

BODIES: list[Body] = [
    (COMPLETE, {"prompt": STORY, "max_tokens": 120, "temperature": 0, "ignore_eos": True} | GUESS),
    (COMPLETE, {"prompt": STORY, "max_tokens": 100, "seed": 1, "ignore_eos": True} | GUESS),
    (COMPLETE, {"prompt": STORY * 9, "max_tokens": 60, "seed": 2, "top_p": 0.9}),
    (COMPLETE, {"prompt": STORY * 9 + "Then", "max_tokens": 60, "temperature": 0}),
    (COMPLETE, {"prompt": "The sea", "n": 3, "max_tokens": 60, "seed": 3, "top_k": 30}),
    (COMPLETE, {"prompt": "The sea", "max_tokens": 150, "seed": 4, "stop": ["the w", " and th"]}),
    (COMPLETE, {"prompt": "A ship", "max_tokens": 50, "seed": 5, "logprobs": 3}),
    (COMPLETE, {"prompt": "A ship", "max_tokens": 60, "temperature": 0, "logprobs": 0}),
    (
        COMPLETE,
        {
            "prompt": "One two", "max_tokens": 80, "seed": 6, "temperature": 0.8,
            "repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.4,
        },
    ),
    (COMPLETE, {"prompt": "x", "max_tokens": 90, "seed": 7, "regex": "(yes|no|perhaps, ){4,30}"}),
    (COMPLETE, {"prompt": ["Red", "Green", STORY], "max_tokens": 40, "seed": 8, "n": 2}),
    (COMPLETE, {"prompt": "The end", "max_tokens": 70, "min_tokens": 60, "seed": 9, "min_p": 0.02}),
    (CHAT, {"messages": SAY, "max_tokens": 100, "temperature": 0, "speculate": "off"}),
    (CHAT, {"messages": SAY, "max_tokens": 80, "seed": 10, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": SAY, "max_tokens": 80, "seed": 11, "n": 2, "logit_bias": {"20": 2.0}}),
    (
        CHAT,
        {
            "messages": SAY, "max_tokens": 200, "seed": 12,
            "response_format": {
                "type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA},
            },
        },
    ),
    (
        CHAT,
        {
            "messages": SAY, "max_tokens": 250, "seed": 13, "tools": [TOOL],
            "tool_choice": "required", "parallel_tool_calls": False,
        },
    ),
]  # fmt: skip


@dataclass
class Choice:
    """What one choice said."""

    text: str = ""
    calls: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None

    def add(self, part: dict[str, Any]) -> None:
        """Take a whole choice or a chunk of one."""
        said = part.get("delta") or part.get("message") or part
        self.text += said.get("text") or said.get("content") or ""
        for call in said.get("tool_calls") or ():
            self.calls += (call["function"].get("name") or "") + call["function"]["arguments"]
        scores = part.get("logprobs") or {}
        self.logprobs += scores.get("content") or list(
            zip(scores.get("tokens", ()), scores.get("token_logprobs", ()), strict=True)
        )
        self.finish = part.get("finish_reason") or self.finish


Answer = dict[int, Choice]


class ErrorEventError(AssertionError):
    """A stream brought an error event; ``code`` says which."""

    def __init__(self, body: Body, error: dict[str, Any]) -> None:
        super().__init__(f"{body}: {error}")
        self.code: str = error["code"]


class Savings:
    """What the engine did not have to compute, by the usage of the replies.

    Attributes:
        cached: prompt tokens from the prefix cache.
        guessed: tokens guessed ahead, and rightly.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.cached = self.guessed = 0

    def add(self, usage: dict[str, Any]) -> None:
        """Count one reply's."""
        with self._lock:
            self.cached += usage["prompt_tokens_details"]["cached_tokens"]
            self.guessed += usage["completion_tokens_details"]["accepted_prediction_tokens"]

    def require_both(self) -> None:
        """A load that neither saved was no test of either."""
        assert self.cached > 0, "nothing was read from the prefix cache"
        assert self.guessed > 0, "no token was guessed ahead"

    def __str__(self) -> str:
        return f"{self.cached} tokens from the prefix cache, {self.guessed} guessed ahead"


def with_usage(fields: dict[str, Any]) -> dict[str, Any]:
    """The same as a stream that says its usage."""
    return fields | {"stream": True, "stream_options": {"include_usage": True}}


def ask(http: httpx.Client, body: Body, *, stream: bool, saved: Savings | None = None) -> Answer:
    """Send a request and gather its answer; ``saved`` is told its usage.

    Raises:
        httpx.HTTPStatusError: it was refused.
        ErrorEventError: a stream brought an error event.
        AssertionError: a stream broke off.
    """
    path, fields = body
    answer: Answer = {}

    def take(event: dict[str, Any]) -> None:
        for part in event["choices"]:
            answer.setdefault(part["index"], Choice()).add(part)
        if saved is not None and event.get("usage"):
            saved.add(event["usage"])

    if not stream:
        take(http.post(path, json=fields).raise_for_status().json())
        return answer
    with http.stream("POST", path, json=with_usage(fields)) as reply:
        if reply.status_code != 200:
            reply.read()
        reply.raise_for_status()
        last = ""
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise ErrorEventError(body, event["error"])
                take(event)
            last = line or last
        assert last == "data: [DONE]", f"{path} {fields} broke off: {last}"
    return answer


class Crew:
    """Threads that work, each by its number and a seed, until told to stop."""

    def __init__(self, size: int, seed: int) -> None:
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(i, random.Random(seed + i)))
            for i in range(size)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, worker: int, rng: random.Random) -> None:
        """What one thread does; ends soon after ``_stop`` is set."""
        raise NotImplementedError


class Crowd(Crew):
    """Closed-loop clients that ask and compare until told to stop.

    Args:
        connect: makes each client's HTTP client.
        expected: by index in ``BODIES``, the undisturbed answer.
        size: clients.
        seed: which of them asks what.
    """

    def __init__(
        self,
        connect: Callable[[], httpx.Client],
        expected: list[Answer],
        *,
        size: int,
        seed: int,
    ) -> None:
        super().__init__(size, seed)
        self._connect = connect
        self._expected = expected
        self.done = self.refused = 0
        self.saved = Savings()
        self.wrong: list[str] = []

    def _work(self, worker: int, rng: random.Random) -> None:
        del worker
        with self._connect() as http:
            while not self._stop.is_set():
                index, stream = rng.randrange(len(BODIES)), rng.random() < 0.6
                try:
                    answer = ask(http, BODIES[index], stream=stream, saved=self.saved)
                except httpx.HTTPStatusError as error:
                    if error.response.status_code != 503:
                        self.wrong.append(f"{BODIES[index]}: {error.response.text}")
                    self.refused += 1  # new work, while the engine was away
                    time.sleep(0.1)
                    continue
                except Exception as error:
                    self.wrong.append(f"{BODIES[index]}: {error!r}")
                    continue
                self.done += 1
                if answer != self._expected[index]:
                    self.wrong.append(f"{BODIES[index]}: {answer} != {self._expected[index]}")
