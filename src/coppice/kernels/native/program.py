"""`Ops.compile` by the C++ extension: a forward pass in one call.

What Python does in a step is here in full: addresses of the row arrays, one tensor for the
logits, one call. Weights, norms and tables are described once; they are kept alive here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coppice.errors import EngineError
from coppice.kernels import _native
from coppice.kernels.native.tensors import ACTIVATIONS, QK_NORMS, cache_of, ready
from coppice.kernels.program import DecoderProgram, LayerProgram
from coppice.kernels.rows import Rows


class NativeProgram:
    """See `coppice.kernels.program.Program`.

    Args:
        decoder: what to compute.
        row_arrays: addresses of a step's rows, from the operators that made the weights.

    Raises:
        EngineError: the parts of the description do not fit each other.
    """

    def __init__(
        self, decoder: DecoderProgram, row_arrays: Callable[[Rows], _native.RowArrays]
    ) -> None:
        _check(decoder)
        self._decoder = decoder  # keeps alive what the addresses point to
        self._row_arrays = row_arrays
        self._rotations = list({id(x.rotation): x.rotation for x in decoder.layers}.values())
        self._vocab_size = decoder.head.out_features
        self._first_page: weakref.ref[Tensor] | None
        self._rows: Rows | None = None
        for rotation in self._rotations:
            rotation.reach(1)
        self._describe()

    def __call__(self, rows: Rows, k_pages: Sequence[Tensor], v_pages: Sequence[Tensor]) -> Tensor:
        """See `coppice.kernels.program.Program`."""
        self._prepare(rows, k_pages, v_pages)
        logits = torch.empty(self._num_wanted, self._vocab_size)
        self._native.run(
            self._token, self._arrays, self._wanted, self._num_wanted, logits.data_ptr()
        )
        return logits

    def greedy(
        self, rows: Rows, k_pages: Sequence[Tensor], v_pages: Sequence[Tensor], vocab_size: int
    ) -> list[int]:
        """See `coppice.kernels.program.Program`."""
        self._prepare(rows, k_pages, v_pages)
        return self._native.run_greedy(
            self._token, self._arrays, self._wanted, self._num_wanted, vocab_size
        )

    def _prepare(self, rows: Rows, k_pages: Sequence[Tensor], v_pages: Sequence[Tensor]) -> None:
        """Know the addresses, and the cosines of the rows' positions."""
        if rows is not self._rows:
            self._use_rows(rows)
        positions = self._arrays.positions
        for rotation in self._rotations:
            rotation.reach(positions)
        if any(r.cos_sin is not t for r, t in zip(self._rotations, self._tables, strict=True)):
            self._describe()
        if self._first_page is None or self._first_page() is not k_pages[0]:
            self._use_pages(k_pages, v_pages)

    def _describe(self) -> None:
        """Tell the extension where everything lies: at first, and when a table has grown."""
        decoder = self._decoder
        self._tables = [rotation.cos_sin for rotation in self._rotations]
        self._first_page = None
        self._native = _native.Program(
            embedding=decoder.embedding.native,
            head=decoder.head.native,
            norm=decoder.norm.data_ptr(),
            heads=decoder.num_heads,
            kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            max_position=min(len(table) for table in self._tables),
            qk_norm=QK_NORMS[decoder.qk_norm],
            activation=ACTIVATIONS[decoder.activation],
            eps=decoder.eps,
            attention_scale=decoder.attention_scale,
            attention_softcap=decoder.attention_softcap,
            embedding_scale=decoder.embedding_scale,
            layers=[_layer(layer) for layer in decoder.layers],
        )

    def _use_pages(self, k_pages: Sequence[Tensor], v_pages: Sequence[Tensor]) -> None:
        self._first_page = None
        head_dim = self._decoder.head_dim
        pages = zip(k_pages, v_pages, strict=True)
        self._native.use_pages([cache_of(k, v, head_dim) for k, v in pages])
        self._first_page = weakref.ref(k_pages[0])  # the pool may go when its engine does

    def _use_rows(self, rows: Rows) -> None:
        """Keep the addresses of ``rows``; a steady decode brings the same object each step."""
        self._rows = None
        for tensor in (rows.token, rows.logit_rows):
            if tensor.dtype != torch.int32 or not tensor.is_contiguous():
                raise EngineError("Row arrays must be contiguous int32 tensors.")
        if rows.token.shape != rows.slot.shape:
            raise EngineError("Row arrays differ in length.")
        self._arrays = self._row_arrays(rows)
        self._token, self._wanted = rows.token.data_ptr(), rows.logit_rows.data_ptr()
        self._num_wanted = rows.logit_rows.shape[0]
        self._rows = rows


def _layer(layer: LayerProgram) -> _native.Layer:
    return _native.Layer(
        qkv=layer.qkv.native,
        output=layer.output.native,
        gate_up=layer.gate_up.native,
        down=layer.down.native,
        before_attention=_address(layer.before_attention),
        after_attention=_address(layer.after_attention),
        before_mlp=_address(layer.before_mlp),
        after_mlp=_address(layer.after_mlp),
        q_norm=_address(layer.q_norm),
        k_norm=_address(layer.k_norm),
        cos_sin=layer.rotation.cos_sin.data_ptr(),
        half=layer.rotation.cos_sin.shape[2],
        window=layer.window,
    )


def _address(norm: Tensor | None) -> int:
    return 0 if norm is None else norm.data_ptr()


def _check(decoder: DecoderProgram) -> None:
    """Shapes and types of everything whose address goes to the extension."""
    hidden = decoder.embedding.in_features
    heads, kv_heads, dim = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
    full = decoder.qk_norm == "full"
    norms = [(decoder.norm, hidden)]
    linears = [(decoder.head, (decoder.head.out_features, hidden))]
    for layer in decoder.layers:
        intermediate = layer.down.in_features
        linears += [
            (layer.qkv, ((heads + 2 * kv_heads) * dim, hidden)),
            (layer.output, (hidden, heads * dim)),
            (layer.gate_up, (2 * intermediate, hidden)),
            (layer.down, (hidden, intermediate)),
        ]
        around = (layer.before_attention, layer.after_attention, layer.before_mlp, layer.after_mlp)
        norms += [(norm, hidden) for norm in around if norm is not None]
        if decoder.qk_norm != "none":
            if layer.q_norm is None or layer.k_norm is None:
                raise EngineError("A layer lacks the norms of its queries and keys.")
            norms += [
                (layer.q_norm, dim * (heads if full else 1)),
                (layer.k_norm, dim * (kv_heads if full else 1)),
            ]
        table = layer.rotation.cos_sin
        if ready(table) is not table or 2 * table.shape[2] > dim:
            raise EngineError(f"A rotary table does not fit heads of {dim}.")
    if any((x.out_features, x.in_features) != shape for x, shape in linears):
        raise EngineError("A layer's weights do not fit the program's shapes.")
    if heads % kv_heads or any(ready(norm, size) is not norm for norm, size in norms):
        raise EngineError("Heads or norms do not fit the program's shapes.")
