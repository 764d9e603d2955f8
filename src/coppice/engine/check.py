"""What an engine cannot do for a request, said before anything is kept of it."""

from __future__ import annotations

from collections.abc import Sequence

from coppice.engine.request import Request
from coppice.errors import ContextOverflowError, RequestError


def check_request(
    request: Request, *, context_length: int, vocab_size: int, proposers: Sequence[str]
) -> None:
    """Refuse what does not fit the model or the engine.

    Args:
        request: as submitted.
        context_length: tokens of prompt and answer together, at most.
        vocab_size: token ids there are.
        proposers: names of those that guess ahead here.

    Raises:
        ContextOverflowError: the prompt leaves no room for the answer.
        RequestError: it has no prompt, unknown token ids, or wants guesses nobody makes.
    """
    if not request.prompt:
        raise RequestError("The prompt is empty; send at least one token.", param="prompt")
    if len(request.prompt) >= context_length:
        raise ContextOverflowError(
            f"The prompt has {len(request.prompt)} tokens but the context holds "
            f"{context_length}, one of them for the answer; shorten the prompt.",
            param="prompt",
        )
    wanted = request.sampling.max_tokens
    if wanted is not None and len(request.prompt) + wanted > context_length:
        raise ContextOverflowError(
            f"The prompt has {len(request.prompt)} tokens and {wanted} are asked for, but "
            f"the context holds {context_length}; lower max_tokens or shorten the prompt.",
            param="max_tokens",
        )
    if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
        raise RequestError(f"Token ids must lie between 0 and {vocab_size - 1}.", param="prompt")
    if request.speculate not in ("off", "auto", *proposers):
        raise RequestError(
            f"This engine does not guess ahead by {request.speculate!r}; send 'auto' or 'off'"
            f"{''.join(f', or {name!r}' for name in proposers)}, or start it with --speculate.",
            param="speculate",
        )
