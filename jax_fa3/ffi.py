"""The custom calls: targets, operands, results and attributes, as src/ffi binds them.

A call's operands are the arrays that the kernels take, in the order of their rows; the backward
call has outputs and cotangents after query, key and value. Of a dense mask the kernels take a
table, which a call of its own makes for each direction: XLA merges equal ones.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fa3 import native
from jax_fa3.custom_call import custom_call
from jax_fa3.float8.rounding import ARRAYS, DESCALES, SEED, TAKEN
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
TARGETS = (FORWARD, FORWARD_FLOAT8, BACKWARD, QUANTIZE, VISIBILITY, DENSE_MASK)

WIDTHS = {bool: bool, int: np.int32, float: np.float32, str: str}  # as C++ decodes them

for _name, _capsule in native.registrations().items():
    jax.ffi.register_ffi_target(_name, _capsule, platform="CUDA")


def forward(options: AttentionOptions, operands: Operands) -> Outputs:
    query, n = operands.query, operands.extents
    outputs = dict(
        out=_result(query, (n.batch, n.seqlen_q, n.num_heads_q, n.head_dim_v), options.out_dtype),
        lse=_by_row(query, n),
    )
    if options.return_max_logits:
        outputs["max_logits"] = _by_row(query, n)
    results = outputs | dict(tile_counter=_result(query, (1,), jnp.int32))
    target = FORWARD
    if operands.is_float8:
        is_prepared = operands.prepared_value is not None
        plan = native.plan("forward_float8", query.dtype.name, n, options, is_prepared)
        results["workspace"] = _result(query, (plan["workspace_bytes"],), jnp.uint8)
        target = FORWARD_FLOAT8
    arrays = _as_kernels_take(operands).by_argument()
    got = custom_call(target, arrays, results, options=attributes(options))
    made = Outputs(**{name: got[name] for name in outputs})
    return made if made.max_logits is None else made.replace(max_logits=made.max_logits.max(-1))


def backward(
    options: AttentionOptions, operands: Operands, outputs: Outputs, cotangents: Outputs
) -> Operands:
    query, n = operands.query, operands.extents
    plan = native.plan("backward", query.dtype.name, n, options, arrays=operands.present())
    operands = _as_kernels_take(operands)
    differentiable = operands.differentiable(options).present()
    results = {
        f"d{name}": _by_row(query, n) if name == "sinks" else _result(query, x.shape, x.dtype)
        for name, x in differentiable.items()
    }
    results["workspace"] = _result(query, (plan["workspace_bytes"],), jnp.uint8)
    got = custom_call(
        BACKWARD,
        operands.only(ARRAYS).by_argument()
        | outputs.by_argument()
        | {f"d{name}": x for name, x in cotangents.by_argument().items()}
        | operands.only(operands.rows().keys() - ARRAYS).by_argument(),
        results,
        options=attributes(options),
    )
    gradients = {name: got[f"d{name}"] for name in differentiable}
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
        query_out=_result(query, query.shape, dtype),
        key_out=_result(query, operands.key.shape, dtype),
        value_out=_result(query, value_shape, dtype),
        query_descale=_result(query, (n.batch, n.num_heads_q, num_blocks(n.seqlen_q)), jnp.float32),
        key_descale=_result(query, (n.batch, n.num_heads_kv, num_blocks(n.seqlen_k)), jnp.float32),
        value_descale=_result(query, (n.batch, n.num_heads_kv), jnp.float32),
    )
    got = custom_call(
        QUANTIZE,
        operands.only(TAKEN).by_argument(),
        results,
        seed=np.uint32(seed),
        back=back,
        prepare_value=prepare_value,
    )
    rounded = {name: got[f"{name}_out"] for name in ARRAYS}
    if back:
        return Operands(**rounded)
    if prepare_value:
        rounded["prepared_value"] = rounded.pop("value")
    return Operands(**rounded, **{name: got[name] for name in DESCALES})


def visibility(options: VisibilityOptions, sources: Sources) -> Operands:
    """What visibility.table.make gives."""
    planes, seqlens = sources.batch_and_heads, (options.seqlen_q, options.seqlen_k)
    arrays = sources.present()
    like = next(iter(arrays.values()))
    results = dict(
        visibility=_result(like, (*planes, Layout.of(*seqlens).words), jnp.int32),
        workspace=_result(like, (workspace_bytes(*planes, *seqlens),), jnp.uint8),
    )
    choices = {name: np.int32(x) for name, x in dataclasses.asdict(options).items()}
    return Operands(visibility=custom_call(VISIBILITY, arrays, results, **choices)["visibility"])


def dense_mask(mask: jax.Array) -> jax.Array:
    """The table of a mask [batch, heads, rows, seqlen_k] of any extents, of all its planes."""
    *planes, rows, seqlen_k = mask.shape
    result = _result(mask, (*planes, dense_mask_words(rows, seqlen_k)), jnp.int32)
    return custom_call(DENSE_MASK, dict(mask=mask), dict(mask_table=result))["mask_table"]


def attributes(options: AttentionOptions) -> dict[str, object]:
    """The dictionary attribute of forward and backward calls, in the exact widths C++ decodes."""
    values = {name: getattr(options, name) for name in options.of_kernels()}
    return {name: WIDTHS[type(x)](x) for name, x in values.items()}


def _as_kernels_take(operands: Operands) -> Operands:
    """The operands with a bias of padded_bias_keys, and the table of a mask in its place."""
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
