"""Tokenizing, rendering and compiling off the event loop."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from coppice.engine.cell_jobs import (
    Check,
    Grammars,
    Planned,
    PlanTools,
    Render,
    Rendered,
    Templates,
)
from coppice.engine.detokenize import TextAssembler
from coppice.engine.faults import NOT_OURS
from coppice.engine.request import Grammar, Request
from coppice.engine.toolcalls import ToolPlan, plan_tools
from coppice.errors import EngineError, GrammarError, TemplateError
from coppice.models.tokenizer import SHORT_CHARS, Tokenizer
from coppice.server.cells import Cells, Kind
from coppice.server.convert import CHARS_PER_CONTEXT_TOKEN

log = logging.getLogger("coppice.server")
T = TypeVar("T")
TEMPLATES = Kind("templates", 1.0, TemplateError, "Rendering the conversation")
GRAMMARS = Kind("grammars", 2.0, GrammarError, "Compiling the grammar, or the tools,")


class TextService:
    """The model's tokenizer behind a small pool of threads; templates and grammars in cells.

    Args:
        tokenizer: the model's.
        threads: how many calls may tokenize at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, threads: int = 2) -> None:
        self.tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="text")
        self._templates = Cells(TEMPLATES, self._template_setup)
        self._grammars = Cells(GRAMMARS, self._grammar_setup)

    def begin(self) -> None:
        """Start the process that renders; the one for grammars starts when there is one."""
        if self.tokenizer.chat_templates:
            self._templates.begin()

    def cells(self) -> dict[str, dict[str, int | None]]:
        """The processes for templates and grammars: ids, and how often they were started."""
        named = {TEMPLATES.name: self._templates, GRAMMARS.name: self._grammars}
        return {name: {"pid": cell.pid, "starts": cell.starts} for name, cell in named.items()}

    async def encode(self, text: str, *, add_special_tokens: bool, context: int) -> list[int]:
        """Token ids.

        Raises:
            ContextOverflowError: too many characters for the context window.
        """
        work = partial(
            _guarded,
            self.tokenizer.encode,
            text,
            add_special_tokens=add_special_tokens,
            max_chars=CHARS_PER_CONTEXT_TOKEN * context,
        )
        return work() if len(text) <= SHORT_CHARS else await self.run(work)

    async def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return await self.run(partial(_guarded, self.tokenizer.decode, ids))

    async def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        options: dict[str, Any] | None,
        *,
        context: int,
        tenant: str = "",
    ) -> str:
        """The prompt a conversation becomes.

        Raises:
            TemplateError: there is no template, it refuses the messages, or takes too long.
        """
        name = self.tokenizer.chat_template_name(tools=tools is not None)
        if name is None:
            raise TemplateError("The model has no chat template; use /v1/completions instead.")
        conversation = json.dumps((messages, tools, options))
        job = Render(name, conversation, CHARS_PER_CONTEXT_TOKEN * context)
        answer = await self._templates.ask(job, tenant)
        assert isinstance(answer, Rendered)
        return answer.text

    async def plan_tools(
        self, tools: list[Any], choice: Any, *, parallel: bool, tenant: str = ""
    ) -> ToolPlan:
        """How the answer may call tools (`coppice.engine.toolcalls.plan_tools`).

        Raises:
            RequestError, GrammarError: as that does; or it takes too long.
        """
        if not tools:
            return plan_tools(tools, choice, parallel=parallel)
        answer = await self._grammars.ask(PlanTools(json.dumps((tools, choice)), parallel), tenant)
        assert isinstance(answer, Planned)
        return answer.plan

    async def check(self, grammar: Grammar, tenant: str = "") -> None:
        """Compile a grammar, to refuse it before it reaches the engine.

        Raises:
            GrammarError: invalid, unsupported, impossible, or not compiled in time.
        """
        await self._grammars.ask(Check(grammar), tenant)

    def _template_setup(self) -> Templates:
        return Templates(self.tokenizer.chat_templates, self.tokenizer.special_tokens)

    def _grammar_setup(self) -> Grammars:
        known = self.tokenizer
        return Grammars(
            tokens=[known.token_bytes(token) for token in range(known.vocab_size)],
            eos_ids=known.eos_ids,
            special_ids=tuple(sorted(known.special_ids)),
            template=known.chat_template(tools=True),
        )

    def assembler(self, request: Request, *, continues_prompt: bool) -> TextAssembler:
        """What turns one choice's tokens into text."""
        params = request.sampling
        return TextAssembler(
            self.tokenizer,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            keep_leading_space=continues_prompt,
            min_tokens=params.min_tokens,
        )

    async def close(self) -> None:
        """Let the threads and the cells go."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        await self._templates.close()
        await self._grammars.close()

    async def run(self, work: Callable[[], T]) -> T:
        """Run something slow in a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _guarded(work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What it returns.

    Raises:
        EngineError: a library panicked, which is no `Exception`.
    """
    try:
        return work(*args, **kwargs)
    except (Exception, *NOT_OURS):
        raise
    except BaseException as error:
        log.error("the tokenizer failed", exc_info=error)
        raise EngineError("The tokenizer failed; the server's log says why.") from error
