"""Tokenizing and rendering off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from coppice.engine.detokenize import TextAssembler
from coppice.engine.grammar import GrammarCompiler
from coppice.engine.request import Grammar, Request
from coppice.errors import GrammarError, TemplateError
from coppice.models.template import prepare_messages, render_chat
from coppice.models.tokenizer import Tokenizer
from coppice.server.convert import CHARS_PER_CONTEXT_TOKEN

T = TypeVar("T")
COMPILE_TIMEOUT_S = 2.0
SHORT_CHARS = 2048
"""Text this short is tokenized on the spot: cheaper than a change of thread."""


class TextService:
    """The model's tokenizer and chat template behind a small pool of threads.

    Args:
        tokenizer: the model's.
        threads: how many calls may tokenize or render at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, threads: int = 2) -> None:
        self.tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="text")
        self._grammars: GrammarCompiler | None = None

    async def encode(self, text: str, *, add_special_tokens: bool, context: int) -> list[int]:
        """Token ids.

        Raises:
            ContextOverflowError: too many characters for the context window.
        """
        work = partial(
            self.tokenizer.encode,
            text,
            add_special_tokens=add_special_tokens,
            max_chars=CHARS_PER_CONTEXT_TOKEN * context,
        )
        return work() if len(text) <= SHORT_CHARS else await self.run(work)

    async def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return await self.run(partial(self.tokenizer.decode, ids))

    async def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        options: dict[str, Any] | None,
        *,
        context: int,
    ) -> str:
        """The prompt a conversation becomes.

        Raises:
            TemplateError: there is no template, it refuses the messages, or takes too long.
        """
        template = self.tokenizer.chat_template(tools=tools is not None)
        if template is None:
            raise TemplateError("The model has no chat template; use /v1/completions instead.")

        def work() -> str:
            return render_chat(
                template,
                prepare_messages(template, messages),
                tools=tools,
                special_tokens=self.tokenizer.special_tokens,
                options=options,
                max_chars=CHARS_PER_CONTEXT_TOKEN * context,
            )

        return await self.run(work)

    @property
    def template(self) -> str | None:
        """The chat template used with tools, which shows how calls are written."""
        return self.tokenizer.chat_template(tools=True)

    async def check(self, grammar: Grammar) -> None:
        """Compile a grammar, to refuse it before it reaches the engine.

        Raises:
            GrammarError: invalid, unsupported, impossible, or not compiled in time.
        """
        try:
            async with asyncio.timeout(COMPILE_TIMEOUT_S):
                await self.run(partial(self._compiler().check, grammar))
        except TimeoutError:
            raise GrammarError(
                f"The grammar was not compiled within {COMPILE_TIMEOUT_S:g} s; make it simpler."
            ) from None

    def _compiler(self) -> GrammarCompiler:
        if self._grammars is None:
            self._grammars = GrammarCompiler(self.tokenizer)
        return self._grammars

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

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[], T]) -> T:
        """Run something slow in a thread of the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
