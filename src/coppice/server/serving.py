"""What both generation routes do: take a call in, run it, answer whole or streamed."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import msgspec
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from coppice.engine.messages import ModelFacts
from coppice.engine.request import Grammar, Request, SamplingParams
from coppice.errors import CoppiceError, EngineError, RequestError
from coppice.server import admission, convert
from coppice.server.calls import Call, accounted, new_id
from coppice.server.errors import error_body, request_id_of
from coppice.server.fields import review
from coppice.server.generation import Generation
from coppice.server.journal import Accepted
from coppice.server.moments import moment
from coppice.server.protocol.common import SamplingFields
from coppice.server.replies import Frame, Gathered
from coppice.server.resumable import HEADER
from coppice.server.services import Services, caller_of, services_of
from coppice.server.stream import (
    CLOSING,
    DONE,
    ClientLeftError,
    EventStream,
    Pieces,
    event,
    joined,
    while_connected,
)
from coppice.server.text import TextService

log = logging.getLogger("coppice.server")

CLIENT_LEFT = 499


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a call asks of the engine, after the slow part of reading it."""

    prompts: Sequence[list[int]]
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a route wants done, known before anything is tokenized.

    Attributes:
        characters: of all prompts together; token counts of ready-made ids times three.
        sequences: prompts times ``n``.
        params: sampling parameters, not yet fitted to a prompt.
        prepare: makes the token ids of every prompt, and the constraint on the answer.
    """

    characters: int
    sequences: int
    params: SamplingParams
    prepare: Callable[[TextService, ModelFacts], Awaitable[Prepared]]


@dataclass(frozen=True, slots=True)
class Route:
    """The names by which a route and its replies are known.

    Attributes:
        prompt: the field of its body.
        continues_prompt: the answer is text that follows the prompt, not a turn.
    """

    path: str
    prompt: str
    prefix: str
    object: str
    chunk_object: str
    continues_prompt: bool


def open_call(
    http: HttpRequest, body: SamplingFields, route: Route
) -> tuple[Services, Call, tuple[str, ...]]:
    """Check that the call may come in and enter it in the ledger.

    Returns:
        The services, the call, and warnings about unknown fields.

    Raises:
        CoppiceError: it may not; nothing was entered.
    """
    services = services_of(http)
    key = caller_of(http)
    services.keys.spend(key)
    services.require_model(body.model)
    resumable = (
        body.stream and services.streams.on and http.headers.get(HEADER, "").lower() == "true"
    )
    if resumable:
        name = request_id_of(http.scope)
        services.streams.require_free(name, key.tenant, services.calls.live())
    warnings = review(body, strict=services.config.strict_fields)
    if body.session_id is not None:
        warnings += services.session_warnings()
    timeout_s = min(body.deadline_s or services.config.request_timeout_s,
                    services.config.request_timeout_s)  # fmt: skip
    call = Call(
        id=new_id(route.prefix),
        request_id=request_id_of(http.scope),
        route=route.path,
        key=key,
        entry=services.ledger.open(),
        deadline=time.monotonic() + timeout_s,
        resumable=bool(resumable),
    )
    services.calls.hold(call)
    return services, call, tuple(warnings)


async def admit(
    services: Services, call: Call, body: SamplingFields, plan: Plan, route: Route
) -> Generation:
    """Admit by estimate, tokenize, admit exactly, submit.

    Raises:
        CoppiceError: refused; the place is given back by `Calls.settle`.
    """
    text, facts = services.require_open()
    if plan.sequences < 1:
        raise RequestError("There is nothing to generate.", param="prompt")
    convert.check_characters(plan.characters, facts.context_length * max(1, plan.sequences))
    share, tenant = call.key.share, call.key.tenant
    estimate = admission.estimate(plan.characters, sequences=plan.sequences)
    call.permit = services.admission.admit(tenant, estimate, share=share)
    requests = await _requests(call, body, plan, text, facts)
    load = admission.exact(requests, facts.page_size)
    call.permit.resize(load, share=share)
    generation = Generation(
        services.engine,
        requests,
        lambda request: text.assembler(request, continues_prompt=route.continues_prompt),
        deadline=call.deadline,
        heard=services.streams.hearer(call.id) if call.resumable else None,
    )
    generation.submit()
    call.permit.hand_over()
    call.generation = generation
    if call.cancelled is not None:
        generation.cancel(call.cancelled)
    return generation


async def _requests(
    call: Call, body: SamplingFields, plan: Plan, text: TextService, facts: ModelFacts
) -> list[Request]:
    prepared = await plan.prepare(text, facts)
    params = plan.params
    if prepared.grammar is not None:
        await text.check(prepared.grammar, call.key.tenant)
        params = msgspec.structs.replace(params, grammar=prepared.grammar)
    session = convert.session(body, call.key.tenant)
    remaining = max(call.deadline - time.monotonic(), 1e-3)
    requests = []
    for number, prompt in enumerate(prepared.prompts):
        if not prompt:
            raise RequestError("The prompt is empty; send at least one token.", param="prompt")
        convert.check_ids(params, prompt, facts.vocab_size)
        requests.append(
            Request(
                id=f"{call.id}-{number}",
                prompt=prompt,
                sampling=convert.fit(params, prompt, facts.context_length),
                priority=body.priority or 0,
                tenant=call.key.tenant,
                cache_salt=f"{call.key.tenant}\n{body.cache_salt or ''}",
                deadline_s=remaining,
                speculate=body.speculate or "auto",
                key=call.key.name,
                session=session if facts.knows_sessions else "",
                session_tool=body.session_tool or "",
                ttft_s=body.ttft_s,
                tpot_s=body.tpot_s,
                wants_deadline=body.deadline_s is not None,
            )
        )
    pages = max(-(-len(request.prompt) // facts.page_size) for request in requests)
    if pages > facts.num_pages:
        raise RequestError(
            f"The prompt needs {pages} KV pages and there are {facts.num_pages}; shorten it or "
            "raise kv_cache_mib.", param="prompt",
        )  # fmt: skip
    return requests


Whole = Callable[[Frame, list[Gathered]], Response]
Chunks = Callable[[Frame, Generation], Pieces]


async def answer(
    http: HttpRequest,
    body: SamplingFields,
    route: Route,
    *,
    plan: Callable[[], Plan],
    whole: Whole,
    chunks: Chunks,
) -> Response:
    """Serve one generation call from ledger entry to reply.

    Args:
        http: the HTTP request.
        body: its parsed body.
        route: the route's names.
        plan: makes the plan; its refusals count as outcome ``refused``.
        whole: makes the unstreamed reply.
        chunks: makes the streamed one.
    """
    services, call, warnings = open_call(http, body, route)
    handed_over = False
    closed: Callable[[], None] | None = None
    try:
        with convert.blaming(route.prompt):
            generation = await while_connected(
                http.receive, admit(services, call, body, plan(), route)
            )
        facts = services.engine.facts
        frame = Frame(
            call,
            route.chunk_object if body.stream else route.object,
            services.model_name or "",
            facts.fingerprint if facts else "",
            warnings,
            bool(body.stream_options and body.stream_options.include_usage),
        )
        if body.stream:
            pieces = events_of(services, call, chunks(frame, generation))
            if call.resumable:
                accepted, headers = _accepted(call, route, body, frame), {HEADER: "true"}
                known, written = services.streams.accept(accepted, pieces, call)
                handed_over = True
                await written
                events = services.streams.read(known)
            else:
                handed_over, closed = True, partial(services.calls.settle, call)
                events, headers = joined(pieces), {}
            return EventStream(
                events,
                headers=headers,
                ping_s=services.config.ping_s,
                slow_reader_s=services.config.slow_reader_s,
                closed=closed,
            )
        return await while_connected(http.receive, _gathered(call, partial(whole, frame)))
    except ClientLeftError:
        call.entry.close("cancelled")
        return Response(status_code=CLIENT_LEFT)
    except BaseException as error:
        call.entry.close_by_error(error)
        raise
    finally:
        if not handed_over:
            services.calls.settle(call)


async def _gathered(call: Call, whole: Callable[[list[Gathered]], Response]) -> Response:
    """The unstreamed reply; the call has not ended well before that is made."""
    generation = call.generation
    assert generation is not None
    with accounted(call):
        choices = [Gathered(index) for index in range(generation.num_choices)]
        async with aclosing(generation.deltas()) as batches:
            async for deltas in batches:
                for delta in deltas:
                    choices[delta.index].add(delta)
        return whole(choices)


def _accepted(call: Call, route: Route, body: SamplingFields, frame: Frame) -> Accepted:
    """What the journal needs to make the same reply again."""
    assert call.generation is not None
    return Accepted(
        call=call.id, request_id=call.request_id, route=call.route, key=call.key.name,
        tenant=call.key.tenant, created=call.created,
        deadline=moment(call.deadline - time.monotonic()),
        fingerprint=frame.fingerprint, requests=list(call.generation.requests),
        body=body.model_dump_json(
            exclude={route.prompt}, exclude_unset=True, by_alias=True
        ).encode(),
        warnings=list(frame.warnings),
    )  # fmt: skip


async def events_of(services: Services, call: Call, chunks: Pieces) -> Pieces:
    """The stream's events, with an error event if it fails, and the accounts settled."""
    try:
        async for pieces in chunks:
            yield pieces
        yield [(CLOSING, DONE)]
    except CoppiceError as error:
        yield [(CLOSING, event(error_body(error, call.request_id), "error") + DONE)]
    except Exception:  # the reply is begun: all that can be done is to say so in it
        log.exception("%s: its events could not be made", call.id)
        call.entry.close("failed")
        failed = EngineError("The answer could not be made; the server's log says why.")
        yield [(CLOSING, event(error_body(failed, call.request_id), "error") + DONE)]
    finally:
        await chunks.aclose()
        call.entry.close("cancelled")
        services.calls.settle(call)
