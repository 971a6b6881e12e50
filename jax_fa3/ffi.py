"""The custom calls: targets, operands, results and attributes, as src/ffi binds them.

A call's operands are the arrays that the kernels take, in the order of their rows; the backward
call has outputs and cotangents after query, key and value. Of a dense mask the kernels take a
table, which a call of its own makes for each direction: XLA merges equal ones.

A call with functions brings its kernels along, linked when the program is lowered for CUDA: a
primitive of ours, because JAX's takes attributes that are known when it is traced.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_fa3 import native
from jax_fa3.custom_call import custom_call
from jax_fa3.flex import link
from jax_fa3.flex.block_mask import kernel_table
from jax_fa3.flex.operands import CAPTURED, FlexOperands
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
    if options.functions is None:
        arrays = _as_kernels_take(operands).by_argument()
        got = custom_call(target, arrays, results, options=attributes(options))
    else:
        arrays, text = _with_functions(options, operands)
        plan = native.plan("forward", query.dtype.name, n, options, arrays=operands.present())
        got = _linked(FLEX_FORWARD, arrays, results, options, plan, text)
    made = Outputs(**{name: got[name] for name in outputs})
    return made if made.max_logits is None else made.replace(max_logits=made.max_logits.max(-1))


def backward(
    options: AttentionOptions, operands: Operands, outputs: Outputs, cotangents: Outputs
) -> Operands:
    query, n = operands.query, operands.extents
    plan = native.plan("backward", query.dtype.name, n, options, arrays=operands.present())
    if options.functions is None:
        operands = _as_kernels_take(operands)
    differentiable = operands.differentiable(options).present()
    results = {
        f"d{name}": _by_row(query, n) if name == "sinks" else _result(query, x.shape, x.dtype)
        for name, x in differentiable.items()
    }
    results["workspace"] = _result(query, (plan["workspace_bytes"],), jnp.uint8)
    arrays, text = operands.by_argument(), None
    if options.functions is not None:
        arrays, text = _with_functions(options, operands)
    given = {name: arrays.pop(name) for name in ("query", "key", "value")} | outputs.by_argument()
    given |= {f"d{name}": x for name, x in cotangents.by_argument().items()} | arrays
    if text is None:
        got = custom_call(BACKWARD, given, results, options=attributes(options))
    else:
        got = _linked(FLEX_BACKWARD, given, results, options, plan, text)
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


class _LinkedCall(NamedTuple):
    """A custom call that brings kernels along. Values that JAX can hash stand for dictionaries."""

    target: str
    operands: tuple[str, ...]
    results: tuple[tuple[str, jax.core.ShapedArray], ...]
    options: AttentionOptions
    kernels: tuple[tuple[str, str], ...]  # attributes and the names of the kernels
    text: str  # of the functions

    def attributes(self) -> dict[str, object]:
        """All of them, which links the kernels."""
        kernels = {name: link.linked(kernel, self.text) for name, kernel in self.kernels}
        kernels = dict(kernel=link.NO_KERNEL, dquery_kernel=link.NO_KERNEL) | kernels
        return dict(
            operands=" ".join(self.operands),
            results=" ".join(name for name, _ in self.results),
            options=attributes(self.options),
            **{name: kernel._asdict() for name, kernel in kernels.items()},
        )


_linked_call = Primitive("jax_fa3_linked_call")
_linked_call.multiple_results = True
_linked_call.def_abstract_eval(lambda *_, call: [x for _, x in call.results])


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _bind(call: _LinkedCall, *arrays: jax.Array) -> list[jax.Array]:
    return _linked_call.bind(*arrays, call=call)


def _lower(context, *arrays, call):
    return jax.ffi.ffi_lowering(call.target)(context, *arrays, **call.attributes())


mlir.register_lowering(_linked_call, _lower, platform="cuda")


def _linked(
    target: str,
    operands: dict[str, jax.Array],
    results: dict[str, jax.core.ShapedArray],
    options: AttentionOptions,
    plan: dict[str, object],
    text: str,
) -> dict[str, jax.Array]:
    """custom_call(...) of a plan, linked with a text."""
    kernels = tuple(link.names(plan).items())
    call = _LinkedCall(target, tuple(operands), tuple(results.items()), options, kernels, text)
    return dict(zip(results, _bind(call, *operands.values()), strict=True))


def _with_functions(
    options: AttentionOptions, operands: FlexOperands
) -> tuple[dict[str, jax.Array], str]:
    """The arrays that the kernels take by their names, and the text of the functions: a table for a
    block mask, and of the captured arrays those that the functions read."""
    n, captured = operands.extents, operands.captured
    found = link.translation(options.functions, captured.values(), n)
    arrays = operands.only(operands.present().keys() - captured.keys()).by_argument()
    if operands.block_states is not None:
        block = options.functions.block
        table = kernel_table(operands.block_states, block, n.seqlen_q, n.seqlen_k)
        arrays["block_states"] = table
    read = [x for i, x in enumerate(captured.values()) if i in found.captured]
    return arrays | {f"{CAPTURED}{i}": x for i, x in enumerate(read)}, found.text


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
