"""``POST /v1/chat/completions`` and its ``/render`` twin."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from coppice.engine.messages import ModelFacts
from coppice.server import convert
from coppice.server.calls import run
from coppice.server.fields import review
from coppice.server.generation import Delta, Generation
from coppice.server.json_body import BoundedRoute
from coppice.server.protocol.chat import ChatReply, ChatRequest, RenderReply
from coppice.server.replies import Frame, Gathered, chat_logprobs
from coppice.server.routes.documented import ERRORS, STREAMED
from coppice.server.services import caller_of, services_of
from coppice.server.serving import Plan, Prepared, Route, answer
from coppice.server.stream import Piece, Pieces, event, while_connected
from coppice.server.text import TextService
from coppice.server.tools import ToolText, Turn, plan_turn

router = APIRouter(route_class=BoundedRoute)
ROUTE = Route(
    "/v1/chat/completions", "messages", "chatcmpl", "chat.completion", "chat.completion.chunk",
    continues_prompt=False,
)  # fmt: skip


@router.post(ROUTE.path, response_model=ChatReply, responses=ERRORS | STREAMED)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    turn = _Turn()

    def whole(frame: Frame, choices: list[Gathered]) -> Response:
        frame = frame.warn(turn.is_.warnings)
        assert frame.call.generation is not None
        readers = [ToolText(turn.is_, f"{frame.call.id}-{choice.index}") for choice in choices]
        made = [
            _choice(body, reader, choice) for reader, choice in zip(readers, choices, strict=True)
        ]
        for reader in readers:
            _tell(frame.call.generation, reader)
        return JSONResponse(frame.whole(made, frame.call.generation))

    def chunks(frame: Frame, generation: Generation) -> Pieces:
        frame = frame.warn(turn.is_.warnings)
        return _chunks(frame, generation, turn.is_, scored=bool(body.logprobs))

    def plan() -> Plan:
        return _plan(body, turn, caller_of(request).tenant)

    return await answer(request, body, ROUTE, plan=plan, whole=whole, chunks=chunks)


async def reframe(
    body: dict[str, Any], frame: Frame, generation: Generation, text: TextService
) -> Pieces:
    """The chunks of a call whose body was written down without its messages."""
    asked = ChatRequest.model_validate(body | {"messages": [{"role": "user", "content": ""}]})
    turn = await plan_turn(asked, text, frame.call.key.tenant)
    chunks = _chunks(frame.warn(turn.warnings), generation, turn, scored=bool(asked.logprobs))
    async with aclosing(chunks):
        async for pieces in chunks:
            yield pieces


@router.post(ROUTE.path + "/render", response_model=RenderReply, responses=ERRORS)
async def render(body: ChatRequest, request: Request) -> Response:
    """Show the prompt a conversation becomes, and its tokens."""
    services = services_of(request)
    text, facts = services.require_open()
    services.require_model(body.model)
    warnings = review(body, strict=services.config.strict_fields)
    turn = _Turn()
    with convert.blaming(ROUTE.prompt):
        asking = _prompt(body, turn, caller_of(request).tenant, text, facts)
        prompt, tokens = await while_connected(request.receive, asking)
    warnings += turn.is_.warnings
    reply: dict[str, Any] = {"prompt": prompt, "tokens": tokens, "count": len(tokens)}
    return JSONResponse(reply | ({"warnings": warnings} if warnings else {}))


class _Turn:
    """The turn, once `_prompt` has planned it."""

    is_ = Turn()


def _plan(body: ChatRequest, turn: _Turn, tenant: str) -> Plan:
    params = convert.sampling(
        body,
        max_tokens=convert.chat_max_tokens(body),
        logprobs=convert.chat_logprobs(body),
    )

    async def prepare(text: TextService, facts: ModelFacts) -> Prepared:
        _, prompt = await _prompt(body, turn, tenant, text, facts)
        return Prepared([prompt], turn.is_.grammar)

    return Plan(
        characters=convert.message_characters(body.messages),
        sequences=params.n,
        params=params,
        prepare=prepare,
    )


async def _prompt(
    body: ChatRequest, turn: _Turn, tenant: str, text: TextService, facts: ModelFacts
) -> tuple[str, list[int]]:
    convert.check_characters(convert.message_characters(body.messages), facts.context_length)
    turn.is_ = await plan_turn(body, text, tenant)
    prompt = await text.render(
        convert.openai_messages(body.messages),
        turn.is_.tools,
        body.chat_template_kwargs,
        context=facts.context_length,
        tenant=tenant,
    )
    # The template has written BOS and the like itself.
    context = facts.context_length
    return prompt, await text.encode(prompt, add_special_tokens=False, context=context)


def _choice(body: ChatRequest, reader: ToolText, choice: Gathered) -> dict[str, Any]:
    pieces = [*reader.push(choice.text), *reader.finish()]
    content = "".join(piece.get("content", "") for piece in pieces)
    calls = reader.calls()
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls
                               else None}  # fmt: skip
    if calls:
        message["tool_calls"] = calls
    return {
        "index": choice.index,
        "message": message,
        "logprobs": chat_logprobs(choice.scores) if body.logprobs else None,
        "finish_reason": reader.finish_reason(choice.finish_reason),
        "stop_reason": choice.stop_reason,
    }


async def _chunks(frame: Frame, generation: Generation, turn: Turn, *, scored: bool) -> Pieces:
    choices = range(generation.num_choices)
    readers = [ToolText(turn, f"{frame.call.id}-{index}") for index in choices]

    def piece(choice: dict[str, Any], *, first: bool = False) -> Piece:
        return choice["index"], event(frame.chunk([choice], first=first))

    yield [
        piece(_piece(index, {"role": "assistant", "content": ""}), first=index == 0)
        for index in choices
    ]
    async with aclosing(run(frame.call)) as batches:
        async for deltas in batches:
            made = [
                piece(choice)
                for delta in deltas
                for choice in _pieces(delta, readers[delta.index], scored=scored)
            ]
            if made:
                yield made
    for reader in readers:
        _tell(generation, reader)
    if frame.include_usage:
        yield [(len(choices), event(frame.usage_chunk(generation)))]


def _tell(generation: Generation, reader: ToolText) -> None:
    """What a session waits for now, if this answer says so."""
    for call in reader.calls()[:1]:
        generation.called(call["function"]["name"])


def _pieces(delta: Delta, reader: ToolText, *, scored: bool) -> list[dict[str, Any]]:
    """The choices (one per event) that say what is new in one answer."""
    pieces = reader.push(delta.text)
    if delta.finish_reason is not None:
        pieces += reader.finish()
    if delta.scores and not pieces:
        pieces = [{}]
    made = [_piece(delta.index, piece) for piece in pieces]
    if made and scored:
        made[0]["logprobs"] = chat_logprobs(delta.scores)
    if delta.finish_reason is not None:
        last = _piece(delta.index, {})
        last["finish_reason"] = reader.finish_reason(delta.finish_reason)
        last["stop_reason"] = delta.stop_reason
        made.append(last)
    return made


def _piece(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
