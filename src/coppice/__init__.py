"""Coppice: serve, tune and place generative models on the machines people have.

The public names below are loaded when first used (PEP 562), so that ``import coppice``
stays quick and does not load PyTorch:

- `LLM`, `SamplingParams`, `Grammar`, `Request`, `RequestOutput`: the engine in this process.
- `serve`: the HTTP server.
- `errors`: every exception raised on purpose.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coppice import errors
    from coppice.engine.llm import LLM
    from coppice.engine.outputs import RequestOutput
    from coppice.engine.request import Grammar, Request, SamplingParams
    from coppice.server import run as serve

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Grammar",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "errors",
    "serve",
]

_WHERE = {
    "LLM": ("coppice.engine.llm", "LLM"),
    "Grammar": ("coppice.engine.request", "Grammar"),
    "Request": ("coppice.engine.request", "Request"),
    "RequestOutput": ("coppice.engine.outputs", "RequestOutput"),
    "SamplingParams": ("coppice.engine.request", "SamplingParams"),
    "serve": ("coppice.server", "run"),
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name == "errors":
        return import_module("coppice.errors")
    if name not in _WHERE:
        raise AttributeError(f"module 'coppice' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
