"""The custom calls: targets, operands, results and attributes, as src/ffi binds them.

The only file that touches jax.ffi. A call's operands are the arrays that the kernels take, in the
order of their rows; the backward call has outputs and cotangents after query, key and value. Of
what may be absent, attributes say whether it is there. Of a dense mask the kernels take a table,
which a call of its own makes for each direction: XLA merges equal ones.

A call with functions brings its kernels along, linked when the program is lowered for CUDA: a
primitive of ours, because JAX's takes attributes that are known when it is traced.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_fa3 import native
from jax_fa3.flex import link
from jax_fa3.flex.block_mask import kernel_table
from jax_fa3.flex.operands import FlexOperands
from jax_fa3.flex.translate import Translation
from jax_fa3.float8.rounding import ARRAYS, SEED, TAKEN
from jax_fa3.operands import Extents, Operands, Outputs, Sources
from jax_fa3.options import (
    FLOAT8,
    AttentionOptions,
    VisibilityOptions,
    dense_mask_words,
    num_blocks,
    padded_bias_keys,
    padded_keys,
)
from jax_fa3.result_type import result_type as _result
from jax_fa3.visibility.layout import Layout, workspace_bytes

FORWARD = "jax_fa3_forward"
FORWARD_FLOAT8 = "jax_fa3_forward_float8"
BACKWARD = "jax_fa3_backward"
QUANTIZE = "jax_fa3_quantize"
VISIBILITY = "jax_fa3_visibility"
DENSE_MASK = "jax_fa3_dense_mask"
FLEX_FORWARD = "jax_fa3_flex_forward"
FLEX_BACKWARD = "jax_fa3_flex_backward"
TARGETS = (
    *(FORWARD, FORWARD_FLOAT8, BACKWARD, QUANTIZE, VISIBILITY, DENSE_MASK),
    *(FLEX_FORWARD, FLEX_BACKWARD),
)

WIDTHS = {bool: bool, int: np.int32, float: np.float32, str: str}  # as C++ decodes them

for _name, _capsule in native.registrations().items():
    jax.ffi.register_ffi_target(_name, _capsule, platform="CUDA")


def forward(options: AttentionOptions, operands: Operands) -> Outputs:
    query, n = operands.query, operands.extents
    results = [
        _result(query, (n.batch, n.seqlen_q, n.num_heads_q, n.head_dim_v), options.out_dtype),
        _by_row(query, n),
    ]
    wanted = dict(has_max_logits=options.return_max_logits)
    if options.return_max_logits:
        results.append(_by_row(query, n))
    num_outputs = len(results)
    results.append(_result(query, (1,), jnp.int32))  # the tile counter
    target, more = FORWARD, {}
    if operands.is_float8:
        more = dict(value_is_prepared=operands.prepared_value is not None)
        plan = native.plan("forward_float8", query.dtype.name, n, options, **more)
        results.append(_result(query, (plan["workspace_bytes"],), jnp.uint8))
        target = FORWARD_FLOAT8
    taken = _as_kernels_take(options, operands)
    arrays, known = taken.present().values(), attributes(options, taken, **wanted)
    if options.functions is None:
        got = jax.ffi.ffi_call(target, results)(*arrays, options=known, **more)
    else:
        plan = native.plan("forward", query.dtype.name, n, options, arrays=taken.present())
        text = _translation(options, operands).text
        got = _linked(FLEX_FORWARD, plan, text, taken, known, results)(*arrays)
    outputs = Outputs(*got[:num_outputs])
    if outputs.max_logits is None:
        return outputs
    return outputs.replace(max_logits=outputs.max_logits.max(-1))


def backward(
    options: AttentionOptions, operands: Operands, outputs: Outputs, cotangents: Outputs
) -> Operands:
    query, n = operands.query, operands.extents
    plan = native.plan("backward", query.dtype.name, n, options, arrays=operands.present())
    text = None if options.functions is None else _translation(options, operands).text
    operands = _as_kernels_take(options, operands)
    differentiable = operands.differentiable(options).present()
    results = [
        _by_row(query, n) if name == "sinks" else _result(query, x.shape, x.dtype)
        for name, x in differentiable.items()
    ]
    results.append(_result(query, (plan["workspace_bytes"],), jnp.uint8))
    arrays, others = operands.only(ARRAYS), operands.only(operands.rows().keys() - ARRAYS)
    wanted = dict(
        has_dlse=cotangents.lse is not None,
        has_dbias="bias" in differentiable,
        has_dsinks="sinks" in differentiable,
    )
    bundles = arrays, outputs, cotangents, others
    given = [x for bundle in bundles for x in bundle.present().values()]
    known = attributes(options, operands, **wanted)
    if text is None:
        *gradients, _ = jax.ffi.ffi_call(BACKWARD, results)(*given, options=known)
    else:
        call = _linked(FLEX_BACKWARD, plan, text, operands, known, results)
        *gradients, _ = call(*given)
    gradients = dict(zip(differentiable, gradients, strict=True))
    if "bias" in gradients:
        gradients["bias"] = gradients["bias"][..., : n.seqlen_k]
    if "sinks" in gradients:
        sequences, heads = operands.sinks.shape
        shares = gradients["sinks"].reshape(sequences, -1, heads, n.seqlen_q)
        gradients["sinks"] = shares.sum((1, 3))
    return type(operands)(**gradients)


def quantize(
    operands: Operands, *, seed: int = SEED, prepare_value: bool = False, back: bool = False
) -> Operands:
    """What float8.rounding.quantize gives; with `back`, what its `rounded` gives."""
    query, n = operands.query, operands.extents
    value_shape = operands.value.shape
    if prepare_value:
        value_shape = (n.batch, n.num_heads_kv, n.head_dim_v, padded_keys(n.seqlen_k))
    dtype = query.dtype if back else FLOAT8
    results = dict(
        query=_result(query, query.shape, dtype),
        key=_result(query, operands.key.shape, dtype),
        value=_result(query, value_shape, dtype),
        query_descale=_result(query, (n.batch, n.num_heads_q, num_blocks(n.seqlen_q)), jnp.float32),
        key_descale=_result(query, (n.batch, n.num_heads_kv, num_blocks(n.seqlen_k)), jnp.float32),
        value_descale=_result(query, (n.batch, n.num_heads_kv), jnp.float32),
    )
    got = jax.ffi.ffi_call(QUANTIZE, tuple(results.values()))(
        *operands.only(TAKEN).present().values(),
        seed=np.uint32(seed),
        back=back,
        prepare_value=prepare_value,
        has_query_lengths=operands.query_lengths is not None,
        has_key_lengths=operands.key_lengths is not None,
    )
    got = dict(zip(results, got, strict=True))
    if back:
        return Operands(**{name: got[name] for name in ARRAYS})
    if prepare_value:
        got["prepared_value"] = got.pop("value")
    return Operands(**got)


def visibility(options: VisibilityOptions, sources: Sources) -> Operands:
    """What visibility.table.make gives."""
    planes, seqlens = sources.batch_and_heads, (options.seqlen_q, options.seqlen_k)
    arrays = sources.present()
    like = next(iter(arrays.values()))
    results = [
        _result(like, (*planes, Layout.of(*seqlens).words), jnp.int32),
        _result(like, (workspace_bytes(*planes, *seqlens),), jnp.uint8),
    ]
    choices = {name: np.int32(x) for name, x in dataclasses.asdict(options).items()}
    flags = dict(
        has_query_segment_ids=sources.query_segment_ids is not None,
        has_key_value_segment_ids=sources.key_value_segment_ids is not None,
        has_kv_start=sources.kv_start is not None,
        has_kv_end=sources.kv_end is not None,
        has_cu_seqlens=sources.cu_seqlens_q is not None,
        has_query_offset=sources.query_offset is not None,
    )
    table, _ = jax.ffi.ffi_call(VISIBILITY, results)(*arrays.values(), **choices, **flags)
    return Operands(visibility=table)


def dense_mask(mask: jax.Array) -> jax.Array:
    """The table of a mask [batch, heads, rows, seqlen_k] of any extents, of all its planes."""
    *planes, rows, seqlen_k = mask.shape
    result = _result(mask, (*planes, dense_mask_words(rows, seqlen_k)), jnp.int32)
    return jax.ffi.ffi_call(DENSE_MASK, result)(mask)


def attributes(
    options: AttentionOptions,
    operands: Operands,
    *,
    has_dlse: bool = False,
    has_dbias: bool = False,
    has_max_logits: bool = False,
    has_dsinks: bool = False,
) -> dict[str, object]:
    """The dictionary attribute of forward and backward calls, in the exact widths C++ decodes."""
    values = {name: getattr(options, name) for name in options.of_kernels()}
    flags = {name: getattr(operands, name) for name, row in operands.rows().items() if row.flag}
    return (
        {name: WIDTHS[type(x)](x) for name, x in values.items()}
        | {f"has_{name}": x is not None for name, x in flags.items()}
        | dict(has_dlse=has_dlse, has_dbias=has_dbias)
        | dict(has_max_logits=has_max_logits, has_dsinks=has_dsinks)
    )


class _LinkedCall(NamedTuple):
    """A custom call that brings kernels along."""

    target: str
    results: tuple[jax.core.ShapedArray, ...]
    options: tuple[tuple[str, object], ...]  # the dictionary attribute
    has_block_states: bool
    num_captured: int
    kernels: tuple[tuple[str, str], ...]  # attributes and the names of the kernels
    text: str  # of the functions

    def attributes(self) -> dict[str, object]:
        """All of them, which links the kernels."""
        kernels = {name: link.linked(kernel, self.text) for name, kernel in self.kernels}
        kernels = dict(kernel=link.NO_KERNEL, dquery_kernel=link.NO_KERNEL) | kernels
        return dict(
            options=dict(self.options),
            has_block_states=self.has_block_states,
            num_captured=np.int32(self.num_captured),
            **{name: kernel._asdict() for name, kernel in kernels.items()},
        )


def _linked(
    target: str,
    plan: dict[str, object],
    text: str,
    operands: FlexOperands,
    known: dict[str, object],
    results: Sequence[jax.core.ShapedArray],
) -> Callable[..., list[jax.Array]]:
    """The custom call of a plan, linked with a text."""
    call = _LinkedCall(
        target,
        tuple(results),
        tuple(known.items()),
        operands.block_states is not None,
        len(operands.captured),
        tuple(link.names(plan).items()),
        text,
    )
    return functools.partial(_bind, call)


def _translation(options: AttentionOptions, operands: FlexOperands) -> Translation:
    captured = operands.captured.values()
    return link.translation(options.functions, captured, operands.extents)


_linked_call = Primitive("jax_fa3_linked_call")
_linked_call.multiple_results = True
_linked_call.def_abstract_eval(lambda *_, call: call.results)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _bind(call: _LinkedCall, *arrays: jax.Array) -> list[jax.Array]:
    return _linked_call.bind(*arrays, call=call)


def _lower(context, *arrays, call):
    return jax.ffi.ffi_lowering(call.target)(context, *arrays, **call.attributes())


mlir.register_lowering(_linked_call, _lower, platform="cuda")


def _as_kernels_take(options: AttentionOptions, operands: Operands) -> Operands:
    """The operands with a bias of padded_bias_keys, and the table of a mask or of a block mask in
    its place. Of captured arrays those that the functions read."""
    if options.functions is not None:
        read = _translation(options, operands).captured
        unread = {name for i, name in enumerate(operands.captured) if i not in read}
        operands = operands.only(operands.present().keys() - unread)
        if operands.block_states is not None:
            lengths = operands.extents.seqlen_q, operands.extents.seqlen_k
            table = kernel_table(operands.block_states, options.functions.block, *lengths)
            operands = operands.replace(block_states=table)
        return operands
    bias, mask = operands.bias, operands.mask
    if bias is not None:
        missing = padded_bias_keys(bias.shape[3]) - bias.shape[3]
        if missing:
            bias = lax.pad(bias, bias.dtype.type(0), [(0, 0, 0)] * 3 + [(0, missing, 0)])
    if mask is None:
        return operands.replace(bias=bias)
    seqlen_k = operands.extents.seqlen_k
    table = dense_mask(jnp.broadcast_to(mask, (*mask.shape[:3], seqlen_k)))
    return operands.replace(bias=bias, mask=None, dense_mask=table)


def _by_row(like: jax.Array, n: Extents) -> jax.core.ShapedArray:
    """The type of numbers for each query row."""
    return _result(like, (n.batch, n.num_heads_q, n.seqlen_q), jnp.float32)
