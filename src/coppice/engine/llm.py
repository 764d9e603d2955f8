"""`LLM`: the engine in this process, with the names vLLM users know."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import msgspec

from coppice.engine.config import EngineConfig
from coppice.engine.detokenize import TextAssembler
from coppice.engine.engine import Engine
from coppice.engine.faults import describe
from coppice.engine.loading import load_engine_model
from coppice.engine.messages import Output
from coppice.engine.outputs import CompletionOutput, RequestOutput
from coppice.engine.request import Request, SamplingParams
from coppice.errors import RequestError
from coppice.models.template import prepare_messages, render_chat
from coppice.models.tokenizer import Tokenizer

Prompt = str | Seq[int]
Message = Mapping[str, Any]


@dataclass(slots=True)
class _Choice:
    """One answer being put together."""

    output: CompletionOutput
    text: TextAssembler


@dataclass(slots=True)
class _Live:
    """One request being run."""

    result: RequestOutput
    choices: list[_Choice] = field(default_factory=list)


class LLM:
    """A model and its engine, run by whoever calls `generate`.

    Args:
        model: a folder, a GGUF file, a hub id, or ``"bundled"``.
        dtype: ``"auto"``, ``"float32"`` or ``"bfloat16"``.
        quantization: ``"int8"``, ``"int4"``, ``"int4-weight-only"``, … (see
            `EngineConfig.quantization`); ``None`` keeps what the checkpoint has.
        settings: further `EngineConfig` fields (``context_length``, ``kv_cache_mib``, …).

    Raises:
        ConfigError: an unknown setting; `CheckpointError` when the model cannot be loaded.
    """

    def __init__(
        self,
        model: str = "bundled",
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        **settings: Any,
    ) -> None:
        settings["quantization"] = "none" if quantization is None else quantization
        config = EngineConfig.from_values(model=model, dtype=dtype, **settings)
        self._engine = Engine(load_engine_model(config), config)
        weakref.finalize(self, self._engine.close)  # at the latest when the interpreter ends
        self._lock = threading.Lock()
        self._random = random.Random(config.seed)
        self._count = 0

    @property
    def engine(self) -> Engine:
        """The engine itself, for measurements and tests."""
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.model.tokenizer

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, batched together, in their order.

        Args:
            prompts: a text or a list of token ids, or several of them.
            params: one for all, or one each; the defaults of `SamplingParams` when omitted.

        Returns:
            One result a prompt. An answer whose rows failed has ``finish_reason`` ``failed``
            and the reason in ``stop_reason``; its neighbours are unharmed.

        Raises:
            RequestError: a prompt is empty or too long; nothing of the call is run then.
        """
        many = _as_list(prompts)
        each = _params_each(params, len(many))
        requests = [self._request(p, s) for p, s in zip(many, each, strict=True)]
        texts = [p if isinstance(p, str) else None for p in many]
        with self._lock:
            live = self._submit(requests, texts)
            for _ in self._run(live):
                pass
        return [entry.result for entry in live.values()]

    def chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        tools: Seq[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, rendered by the model's chat template."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = list(messages) if several else [messages]
        prompts = [self._render(conversation, tools) for conversation in conversations]
        return self.generate(prompts, params)

    def stream(
        self, prompt: Prompt | Seq[Message], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Pieces of one answer's text as they come; closing the iterator cancels the rest."""
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            prompt = self._render(prompt, None)
        request = self._request(prompt, params or SamplingParams())
        with self._lock:
            live = self._submit([request], [None])
            for index, piece in self._run(live):
                if index == 0 and piece:
                    yield piece

    def _render(self, messages: Any, tools: Any) -> list[int]:
        tokenizer = self.tokenizer
        template = tokenizer.chat_template(tools=tools is not None)
        if template is None:
            raise RequestError(
                "This model has no chat template; use generate() with a prompt instead."
            )
        text = render_chat(
            template,
            prepare_messages(template, messages),
            tools=tools,
            special_tokens=tokenizer.special_tokens,
        )
        return tokenizer.encode(text, add_special_tokens=False)

    def _request(self, prompt: Any, params: SamplingParams) -> Request:
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=self._random.getrandbits(63))
        self._count += 1
        return Request(id=f"llm-{self._count}", prompt=tokens, sampling=params)

    def _submit(self, requests: list[Request], texts: list[str | None]) -> dict[str, _Live]:
        live: dict[str, _Live] = {}
        try:
            for request, text in zip(requests, texts, strict=True):
                self._engine.submit(request)
                entry = live[request.id] = _Live(
                    RequestOutput(request.id, text, request.prompt, [])
                )
                for index in range(request.sampling.n):
                    output = CompletionOutput(index)
                    entry.result.outputs.append(output)
                    entry.choices.append(
                        _Choice(output, assembler_for(self.tokenizer, request.sampling))
                    )
        except BaseException:
            self._cancel(live)
            raise
        return live

    def _run(self, live: dict[str, _Live]) -> Iterator[tuple[int, str]]:
        """Step until all have ended; ``(choice index, new text)`` as it comes."""
        try:
            while self._engine.has_work:
                for output in self._engine.step():
                    entry = live.get(output.request_id)
                    if entry is not None:
                        yield output.index, self._take(entry, output)
        finally:
            self._cancel(live)

    def _take(self, entry: _Live, output: Output) -> str:
        choice = entry.choices[output.index]
        done = choice.output
        if done.finish_reason is not None:
            return ""  # tokens of the step that was under way when a stop string ended it
        ended = output.finish_reason is not None
        try:
            piece = choice.text.push(output.tokens, stop_token=output.stop_token is not None)
            if ended:
                piece += choice.text.flush()
        except BaseException as error:
            _, done.stop_reason = describe(error, "Making text of the answer")
            done.finish_reason = "failed"
            self._engine.cancel(output.request_id, "cancelled", output.index)
            return ""
        done.text += piece
        done.token_ids.extend(output.tokens)
        if output.logprobs is not None:
            done.logprobs = (done.logprobs or []) + output.logprobs
        if output.cached_tokens:
            entry.result.num_cached_tokens = output.cached_tokens
        if choice.text.stop_reason is not None:
            done.finish_reason, done.stop_reason = "stop", choice.text.stop_reason
            kept = choice.text.num_tokens
            del done.token_ids[kept:]
            if done.logprobs is not None:
                del done.logprobs[kept:]
            self._engine.cancel(output.request_id, "stop", output.index)
        elif ended:
            done.finish_reason, done.stop_reason = output.finish_reason, output.stop_token
            if output.error is not None:
                done.stop_reason = output.error[1]
        return piece

    def _cancel(self, live: dict[str, _Live]) -> None:
        for request_id in live:
            self._engine.cancel(request_id)


def assembler_for(tokenizer: Tokenizer, params: SamplingParams) -> TextAssembler:
    """The text side of sampling parameters."""
    return TextAssembler(
        tokenizer,
        stop=params.stop,
        include_stop=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        min_tokens=params.min_tokens,
    )


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if not items:
        raise RequestError("No prompt was given; pass a text or a list of token ids.")
    return [items] if isinstance(items[0], int) else items


def _params_each(params: Any, count: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    each = list(params)
    if len(each) != count:
        raise RequestError(f"{len(each)} sampling parameters were given for {count} prompts.")
    return each
