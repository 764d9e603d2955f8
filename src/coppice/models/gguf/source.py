"""GGUF tensors as the model loader wants them.

Matrices in Q8_0 and Q4_0 are integers in blocks of 32 under one scale, which the kernels know:
they stay integers. All other quantised types are expanded to float32 or bfloat16 as they are
read: of those only the file is small, not the resident model.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from coppice.errors import CheckpointError
from coppice.kernels.formats import Format, Quantized
from coppice.models.gguf.names import Piece
from coppice.models.gguf.quants import BY_NAME, Bytes, dequantize, split_blocks
from coppice.models.gguf.reader import GGUFReader
from coppice.models.source import Codes
from coppice.weights.names import integer_format

_CHUNK_ELEMENTS = 4 << 20
_SAMPLE_BYTES = 4096
_KEPT: dict[str, Format] = {
    "Q8_0": integer_format(8, 32, activations="int8"),
    "Q4_0": integer_format(4, 32, activations="int8"),
}
"""Types that stay integers; rows become int8 in blocks of 32, as in their home engine."""


class GGUFSource:
    """The tensors of one GGUF file; see `coppice.models.source.TensorSource`.

    Args:
        reader: the opened file, closed with this object.
        pieces: where each Hugging Face tensor is found.
    """

    def __init__(self, reader: GGUFReader, pieces: dict[str, Piece]) -> None:
        self._reader = reader
        self._pieces = pieces
        sizes: Counter[str] = Counter()
        for info in reader.tensors.values():
            sizes[info.kind] += info.num_bytes
        self.format = f"gguf/{sizes.most_common(1)[0][0]}" if sizes else "gguf/empty"

    def names(self) -> Iterable[str]:
        """All tensor names, in Hugging Face's words."""
        return self._pieces.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The Hugging Face shape of ``name``."""
        return self._pieces[name].shape

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in ``dtype``, dequantised, in memory of its own.

        Cost: the result plus about 50 MiB, whatever the tensor's size.
        """
        piece = self._pieces[name]
        flat = self._expand(piece, dtype)
        if piece.offset:
            flat = (flat.float() - piece.offset).to(dtype)
        if piece.rotary_heads:
            # [heads, dim / 2, 2, in] -> [heads, 2, dim / 2, in]: pairs back to halves
            paired = flat.view(piece.rotary_heads, -1, 2, math.prod(piece.shape[1:]))
            flat = paired.transpose(1, 2).contiguous()
        return flat.view(piece.shape)

    def stored_format(self, name: str) -> Format | None:
        """Blocks of 32 integers under one scale are kept; all other types are expanded."""
        piece = self._pieces[name]
        known = _KEPT.get(piece.info.kind)
        return known if len(piece.shape) > 1 else None

    def read_codes(self, name: str) -> Codes:
        """A Q8_0 or Q4_0 matrix as codes and scales, without loss."""
        piece = self._pieces[name]
        rows, blocks = piece.shape[0], math.prod(piece.shape) // 32
        scales, codes = split_blocks(self._raw(piece), piece.info.kind)
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{piece.info.name} holds scales that are not finite.")
        parts = []
        for values in (codes.reshape(rows, -1), scales.reshape(rows, blocks // rows)):
            tensor = torch.from_numpy(values)
            if piece.rotary_heads:
                paired = tensor.view(piece.rotary_heads, -1, 2, tensor.shape[1])
                tensor = paired.transpose(1, 2).reshape(tensor.shape)
            parts.append(tensor.contiguous())
        return Codes(Quantized(parts[0], parts[1].float()))

    def release(self, name: str) -> None:
        """Let the file's pages go; a stacked tensor's go with its last expert."""
        piece = self._pieces[name]
        if piece.expert is None or piece.expert == piece.info.shape[0] - 1:
            self._reader.release(piece.info)

    def native_dtype(self) -> torch.dtype:
        """bfloat16 when all matrices are; everything else fits only float32 without loss."""
        kinds = {info.kind for info in self._reader.tensors.values() if len(info.shape) > 1}
        return torch.bfloat16 if kinds == {"BF16"} else torch.float32

    def fingerprint(self) -> str:
        """A digest of the table and of both ends of every tensor."""
        digest = hashlib.sha256()
        for info in sorted(self._reader.tensors.values(), key=lambda info: info.name):
            digest.update(f"{info.name}\0{info.shape}\0{info.kind}\0".encode())
            raw = self._reader.tensor_bytes(info)
            digest.update(raw[:_SAMPLE_BYTES].tobytes())
            digest.update(raw[-_SAMPLE_BYTES:].tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Unmap the file."""
        self._reader.close()

    def _raw(self, piece: Piece) -> Bytes:
        """The stored bytes of a tensor, or of one expert's slice of it."""
        quant = BY_NAME[piece.info.kind]
        size = math.prod(piece.shape) // quant.block * quant.block_bytes
        return self._reader.tensor_bytes(piece.info)[(piece.expert or 0) * size :][:size]

    def _expand(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """Stored blocks to a new flat tensor, some million elements at a time.

        Norm weights with an offset are expanded to float32 first, so that the subtraction
        happens before any rounding.
        """
        quant = BY_NAME[piece.info.kind]
        count = math.prod(piece.shape)
        raw = self._raw(piece)
        out = torch.empty(count, dtype=torch.float32 if piece.offset else dtype)
        step = _CHUNK_ELEMENTS // quant.block
        for block in range(0, count // quant.block, step):
            part = raw[block * quant.block_bytes : (block + step) * quant.block_bytes]
            decoded = dequantize(part, quant.name)  # F32: a read-only view of the file
            values = torch.from_numpy(decoded if decoded.flags.writeable else decoded.copy())
            out[block * quant.block : block * quant.block + values.numel()] = values
        return out
