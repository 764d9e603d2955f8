"""``coppice quantize``: a float checkpoint to a quantized one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coppice.cli.console import counting, print_note
from coppice.cli.options import Given, with_settings
from coppice.errors import ConfigError

METHODS = ("rtn", "gptq", "awq")
LARGEST_TEXT = 64 << 20


@with_settings()
def quantize(
    given: Given,
    *,
    model: Annotated[
        str, typer.Argument(help="A folder of float safetensors, a hub id, or 'bundled'.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make; must not exist.")],
    format_: Annotated[
        str,
        typer.Option("--format", help="int8, int4, int4-g32, int4-g128, or …-weight-only."),
    ] = "int8",
    method: Annotated[
        str | None,
        typer.Option(
            help="rtn rounds to nearest; gptq and awq calibrate on text. By default gptq for "
            "4 bits where there is a text, else rtn.",
            metavar="|".join(METHODS),
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text like what the model will read, some hundred kilobytes."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Stretches of that text to use.")] = 64,
    length: Annotated[int, typer.Option(min=16, help="Tokens in each stretch.")] = 512,
) -> None:
    """Write a quantized copy of a model, in a layout other engines read too.

    The copy is served like any folder: coppice serve --model OUT.
    """
    del given
    if method is not None and method not in METHODS:
        raise ConfigError(f"Method {method!r} is unknown; choose from {', '.join(METHODS)}.")
    with counting("Quantizing layers") as progress:
        from coppice.models.quantized.convert import Sampling, quantize_folder
        from coppice.weights.names import scheme

        wanted = scheme(format_)
        calibrated = calibration is not None and wanted.layers.bits == 4  # noqa: PLR2004
        quantize_folder(
            model,
            out,
            wanted,
            method=method or ("gptq" if calibrated else "rtn"),  # type: ignore[arg-type]
            text=None if calibration is None else _read(calibration),
            sampling=Sampling(sequences=sequences, length=length),
            progress=progress,
        )
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print_note(f"{out}: {wanted.name}, {size / 1e6:.1f} MB")


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise ConfigError(
                f"{path} is larger than {LARGEST_TEXT >> 20} MiB; a few hundred kilobytes of it "
                "calibrate as well.",
                param="calibration",
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.", param="calibration") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text.", param="calibration") from None
