"""The front door of a GGUF file. Importing it needs no torch; reading tensors does."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.errors import CheckpointError
from coppice.models.gguf.architectures import hf_config
from coppice.models.gguf.names import map_tensors
from coppice.models.gguf.reader import GGUFReader
from coppice.models.gguf.tokenizer import read_tokenizer
from coppice.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from coppice.models.gguf.source import GGUFSource


class GGUFFile:
    """An opened GGUF file.

    Quantised weights are dequantised to float32 or bfloat16 when read, so a resident model
    is as large as an unquantised one for now.

    Attributes:
        config: the configuration in Hugging Face's words.
    """

    def __init__(self, reader: GGUFReader) -> None:
        self._reader = reader
        self.path = reader.path
        self.config: dict[str, Any] = hf_config(reader)
        self._pieces = map_tensors(reader, self.config)

    @cached_property
    def source(self) -> GGUFSource:
        """The tensors. Closing it closes the file."""
        from coppice.models.gguf.source import GGUFSource

        return GGUFSource(self._reader, self._pieces)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with its chat template; works also after the file was closed."""
        return open_tokenizer(self.path)

    def close(self) -> None:
        """Unmap the file."""
        self._reader.close()


def open_gguf(path: str | Path) -> GGUFFile:
    """Open and check a GGUF file.

    Raises:
        CheckpointError: damaged, truncated, contradictory or beyond the caps.
        UnsupportedModelError: well formed, but of a kind that is not built here.
    """
    reader = GGUFReader(path)
    try:
        return GGUFFile(reader)
    except CheckpointError:
        reader.close()
        raise


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Only the tokenizer of a GGUF file; the file is closed again.

    Raises:
        CheckpointError, UnsupportedModelError: as `open_gguf`.
    """
    reader = GGUFReader(path)
    try:
        return read_tokenizer(reader)
    finally:
        reader.close()
