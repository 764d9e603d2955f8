"""Flags about one answer, shared by ``chat`` and ``run``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from coppice.cli.options import Given
from coppice.errors import ConfigError

if TYPE_CHECKING:
    from coppice import SamplingParams

PANEL = "Answer"

MaxTokens = Annotated[
    int,
    typer.Option(help="Most tokens in one answer.", metavar="N", rich_help_panel=PANEL),
]
Temperature = Annotated[
    float,
    typer.Option(
        help="0 takes the likeliest token; higher is wilder.", metavar="T", rich_help_panel=PANEL
    ),
]
TopP = Annotated[
    float,
    typer.Option(help="Keep the likeliest tokens up to this mass.", rich_help_panel=PANEL),
]
TopK = Annotated[
    int, typer.Option(help="Keep the K likeliest tokens; 0 keeps all.", rich_help_panel=PANEL)
]
Seed = Annotated[
    int | None,
    typer.Option(help="Repeat an answer exactly; drawn when omitted.", rich_help_panel=PANEL),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="Text that ends the answer; may be repeated.", rich_help_panel=PANEL),
]


def sampling_fields(
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    stop: list[str] | None,
) -> dict[str, Any]:
    """The flags under the names of `SamplingParams`, checked.

    Raises:
        RequestError: a value is out of range.
    """
    from coppice import SamplingParams

    fields: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    SamplingParams(**fields)
    return fields


def params_of(fields: dict[str, Any]) -> SamplingParams:
    """Sampling parameters for the engine in this process."""
    from coppice import SamplingParams

    return SamplingParams(**fields)


def model_of(given: Given, model: str | None) -> dict[str, object]:
    """The model named by the argument, as a setting.

    Raises:
        ConfigError: the argument and ``--model`` name two models.
    """
    if model is None:
        return {}
    flag = given.flags.get("model")
    if flag is not None and flag != model:
        raise ConfigError(
            f"Two models were named, {model!r} and --model {flag!r}; name one.", param="model"
        )
    return {"model": model}
