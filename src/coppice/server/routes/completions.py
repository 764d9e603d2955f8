"""``POST /v1/completions``."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from coppice.engine.messages import ModelFacts
from coppice.server import convert
from coppice.server.calls import run
from coppice.server.generation import Generation
from coppice.server.json_body import BoundedRoute
from coppice.server.protocol.common import ErrorReply
from coppice.server.protocol.completions import CompletionReply, CompletionRequest
from coppice.server.replies import Frame, Gathered, completion_logprobs
from coppice.server.routes.documented import ERRORS, STREAMED
from coppice.server.serving import Plan, Prepared, Route, answer
from coppice.server.stream import Piece, Pieces, event
from coppice.server.text import TextService

router = APIRouter(route_class=BoundedRoute)
ROUTE = Route(
    "/v1/completions", "prompt", "cmpl", "text_completion", "text_completion",
    continues_prompt=True,
)  # fmt: skip


@router.post(ROUTE.path, response_model=CompletionReply, responses=ERRORS | STREAMED)
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Continue one or more prompts."""
    scored = body.logprobs is not None

    def whole(frame: Frame, choices: list[Gathered]) -> Response:
        made = [
            {
                "index": choice.index,
                "text": choice.text,
                "logprobs": completion_logprobs(choice.scores) if scored else None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for choice in choices
        ]
        assert frame.call.generation is not None
        return JSONResponse(frame.whole(made, frame.call.generation))

    def chunks(frame: Frame, generation: Generation) -> Pieces:
        return _chunks(frame, generation, scored=scored)

    return await answer(request, body, ROUTE, plan=lambda: _plan(body), whole=whole, chunks=chunks)


def reframe(
    body: dict[str, Any], frame: Frame, generation: Generation, text: TextService
) -> Pieces:
    """The chunks of a call whose body was written down without its prompt."""
    asked = CompletionRequest.model_validate(body | {"prompt": ""})
    return _chunks(frame, generation, scored=asked.logprobs is not None)


async def _chunks(frame: Frame, generation: Generation, *, scored: bool) -> Pieces:
    first = True
    async with aclosing(run(frame.call)) as batches:
        async for deltas in batches:
            parts: list[Piece] = []
            for delta in deltas:
                logprobs = completion_logprobs(delta.scores) if scored else None
                if not (delta.text or delta.scores or delta.finish_reason):
                    continue
                choice = {
                    "index": delta.index,
                    "text": delta.text,
                    "logprobs": logprobs,
                    "finish_reason": delta.finish_reason,
                    "stop_reason": delta.stop_reason,
                }
                parts.append((delta.index, event(frame.chunk([choice], first=first))))
                first = False
            if parts:
                yield parts
    if frame.include_usage:
        yield [(generation.num_choices, event(frame.usage_chunk(generation)))]


def _plan(body: CompletionRequest) -> Plan:
    texts, ids = _prompts(body)
    params = convert.sampling(
        body,
        max_tokens=convert.completion_max_tokens(body),
        logprobs=body.logprobs,
    )

    grammar = convert.text_grammar(body)

    async def prepare(text: TextService, facts: ModelFacts) -> Prepared:
        encoded = [
            await text.encode(item, add_special_tokens=True, context=facts.context_length)
            for item in texts
        ]
        return Prepared(ids or encoded, grammar)

    return Plan(
        characters=sum(map(len, texts)) + 3 * sum(map(len, ids)),
        sequences=len(texts or ids) * params.n,
        params=params,
        prepare=prepare,
    )


def _prompts(body: CompletionRequest) -> tuple[list[str], list[list[int]]]:
    """Texts or token ids; one of the two is empty."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt], []
    if isinstance(prompt[0], int):
        return [], [prompt]
    if isinstance(prompt[0], str):
        return prompt, []
    return [], prompt


__all__ = ["ErrorReply", "router"]
