"""The two attention operations: FFI custom calls on CUDA, XLA code elsewhere.

The only file that touches jax.ffi. Its part of the wiring, from outside in: custom_vmap (a mapped
axis is folded into the batch, which the kernels loop over anyway), platform_dependent (decided
when the program is lowered), ffi_call. Operands, results and attributes are those that
src/ffi/forward.cc, forward_float8.cc, backward.cc and quantize.cc bind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from jax_fa3 import quantize, support, validate, xla
from jax_fa3.options import (
    FLOAT8,
    AttentionOptions,
    Dense,
    Descales,
    Index,
    num_blocks,
    padded_keys,
)

FORWARD = "jax_fa3_forward"
FORWARD_FLOAT8 = "jax_fa3_forward_float8"
BACKWARD = "jax_fa3_backward"
QUANTIZE = "jax_fa3_quantize"

if support.native() is not None:
    for _name, _capsule in support.native().registrations().items():
        jax.ffi.register_ffi_target(_name, _capsule, platform="CUDA")


class Operations(Protocol):
    """Whatever has the two operations with the operands and results of `forward` and `backward`
    here: this module, and what divides them among devices. Hashable."""

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]]


def forward(
    options: AttentionOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: Index,
    dense: Dense,
) -> tuple[jax.Array, jax.Array]:
    """out [batch, seqlen_q, num_heads_q, head_dim_v] and lse [batch, num_heads_q, seqlen_q]."""
    if options.quantized_forward:
        run = functools.partial(_quantized_forward, options)
        return first_order_only(run)(query, key, value, index, dense)
    if not _wants_kernel(options, query, key):
        return xla.forward(options, query, key, value, index, dense)

    def kernel(query, key, value, *index):
        batch, seqlen_q, num_heads_q, _ = query.shape
        results = (
            _result(query, (batch, seqlen_q, num_heads_q, value.shape[-1]), query.dtype),
            _result(query, (batch, num_heads_q, seqlen_q), jnp.float32),
            _result(query, (1,), jnp.int32),  # the tile counter
        )
        call = jax.ffi.ffi_call(FORWARD, results)
        return tuple(call(query, key, value, *index, options=options.to_ffi())[:2])

    def portable(query, key, value, *present):
        return xla.forward(options, query, key, value, _unpack(index, present), Dense())

    return _operation(options, kernel, portable)(query, key, value, *_pack(index))


def forward_float8(
    options: AttentionOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    descales: Descales,
    index: Index,
    dense: Dense,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """`forward` of float8 arrays, with an output of `dtype`; value may be prepared."""

    def portable(query, key, value, query_descale, key_descale, value_descale, *present):
        if options.value_is_prepared:
            value = quantize.restore_value(value, key.shape[1])
        scales = Descales(query_descale, key_descale, value_descale)
        rest = (_unpack(index, present), dense, scales, dtype)
        return xla.forward(options, query, key, value, *rest)

    kernel = functools.partial(_float8_kernel, options, options.value_is_prepared, dtype)
    operands = (query, key, value, *descales, *_pack(index))
    plain = validate.plain_value(key, value, options.value_is_prepared)
    if not _wants_float8_kernel(options, query, key, plain):
        return portable(*operands)
    return _operation(options, kernel, portable)(*operands)


def _quantized_forward(options, query, key, value, index, dense):
    """`forward` of 16-bit arrays by way of float8; the scales are those of the arrays at hand."""

    def portable(query, key, value, *present):
        present = _unpack(index, present)
        quantized, _ = quantize.quantize(query, key, value, present)
        quantized = lax.optimization_barrier(quantized)  # as in quantize.rounded
        rest = (present, dense, Descales(*quantized[3:]), query.dtype)
        return xla.forward(options, *quantized[:3], *rest)

    def kernel(query, key, value, *present):
        quantized = quantize_kernel(query, key, value, _unpack(index, present), prepare_value=True)
        return _float8_kernel(options, True, query.dtype, *quantized, *present)

    operands = (query, key, value, *_pack(index))
    if not _wants_float8_kernel(options, query, key, value):
        return portable(*operands)
    return _operation(options, kernel, portable)(*operands)


def _float8_kernel(options, is_prepared, dtype, query, key, value, *rest):
    """The custom call; `rest` has the descales and the index arrays that are present."""
    plain = validate.plain_value(key, value, is_prepared)
    plan = support.forward_plan(query, key, plain, options.window, None, is_prepared)
    batch, seqlen_q, num_heads_q, _ = query.shape
    results = (
        _result(query, (batch, seqlen_q, num_heads_q, plain.shape[-1]), dtype),
        _result(query, (batch, num_heads_q, seqlen_q), jnp.float32),
        _result(query, (1,), jnp.int32),  # the tile counter
        _result(query, (plan["workspace_bytes"],), jnp.uint8),
    )
    call = jax.ffi.ffi_call(FORWARD_FLOAT8, results)
    attributes = dict(options=options.to_ffi(), value_is_prepared=is_prepared)
    return tuple(call(query, key, value, *rest, **attributes)[:2])


def quantize_kernel(
    query, key, value, index, *, seed=quantize.SEED, prepare_value=False, back=False
):
    """What quantize.quantize gives; with `back`, quantize.rounded's arrays."""
    batch, seqlen_k, num_heads_kv, head_dim_v = value.shape
    prepared = (batch, num_heads_kv, head_dim_v, padded_keys(seqlen_k))
    shapes = (query.shape, key.shape, prepared if prepare_value else value.shape)
    results = (
        *(_result(query, shape, query.dtype if back else FLOAT8) for shape in shapes),
        _result(query, (batch, query.shape[2], num_blocks(query.shape[1])), jnp.float32),
        _result(query, (batch, num_heads_kv, num_blocks(seqlen_k)), jnp.float32),
        _result(query, (batch, num_heads_kv), jnp.float32),
    )
    lengths = _pack(index._replace(query_offset=None))
    got = jax.ffi.ffi_call(QUANTIZE, results)(
        query,
        key,
        value,
        *lengths,
        seed=np.uint32(seed),
        back=back,
        prepare_value=prepare_value,
        has_query_lengths=index.query_lengths is not None,
        has_key_lengths=index.key_lengths is not None,
    )
    return tuple(got[:3]) if back else tuple(got)


def quantized(
    options: AttentionOptions,
    seed: int,
    prepare_value: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: Index,
) -> tuple[jax.Array, ...]:
    """The arrays of a QuantizedQKV, with measured scales by blocks; `options` have
    `quantized_forward`."""

    def kernel(query, key, value, *present):
        present = _unpack(index, present)
        return quantize_kernel(query, key, value, present, seed=seed, prepare_value=prepare_value)

    def portable(query, key, value, *present):
        x, _ = quantize.quantize(query, key, value, _unpack(index, present), seed=seed)
        return tuple(x._replace(value=quantize.prepare_value(x.value)) if prepare_value else x)

    operands = (query, key, value, *_pack(index))
    if not _wants_float8_kernel(options, query, key, value):
        return portable(*operands)
    return _operation(options, kernel, portable)(*operands)


def _rounded(options, query, key, value, index):
    """quantize.rounded, by whichever of kernel and XLA rounds in the forward pass."""

    def kernel(query, key, value, *present):
        return quantize_kernel(query, key, value, _unpack(index, present), back=True)

    def portable(query, key, value, *present):
        return quantize.rounded(query, key, value, _unpack(index, present))

    operands = (query, key, value, *_pack(index))
    if not _wants_float8_kernel(options, query, key, value):
        return portable(*operands)
    return _operation(options, kernel, portable)(*operands)


def backward(
    options: AttentionOptions,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    index: Index,
    dense: Dense,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of query, key, value and, where there is one, of the bias.

    With a forward pass in float8, gradients at the arrays as it rounded them: only those give the
    weights whose rows add up to 1 with its lse, and whose output is `out`.
    """
    if options.quantized_forward:
        query, key, value = _rounded(options, query, key, value, index)
    if not _wants_kernel(options, query, key):
        return xla.backward(options, query, key, value, out, lse, dout, dlse, index, dense)
    cotangents = (dout,) if dlse is None else (dout, dlse)

    def kernel(query, key, value, *rest):
        plan = support.backward_plan(query, key, value, options.deterministic)
        results = (
            *(_result(query, x.shape, x.dtype) for x in (query, key, value)),
            _result(query, (plan["workspace_bytes"],), jnp.uint8),
        )
        call = jax.ffi.ffi_call(BACKWARD, results)
        attributes = options.to_ffi(has_dlse=dlse is not None)
        return tuple(call(query, key, value, *rest, options=attributes)[:3])

    def portable(query, key, value, out, lse, *rest):
        dout, dlse = (*rest[: len(cotangents)], None)[:2]
        present = _unpack(index, rest[len(cotangents) :])
        return xla.backward(options, query, key, value, out, lse, dout, dlse, present, Dense())[:3]

    operation = _operation(options, kernel, portable)
    return *operation(query, key, value, out, lse, *cotangents, *_pack(index)), None


def _wants_kernel(options: AttentionOptions, query: jax.Array, key: jax.Array) -> bool:
    """Whether CUDA gets the custom call; problems without scores are left to XLA's constants."""
    return options.route != "xla" and 0 not in (*query.shape[:2], key.shape[1])


def _wants_float8_kernel(
    options: AttentionOptions, query: jax.Array, key: jax.Array, plain_value: jax.Array
) -> bool:
    """The same of a forward pass in float8, from float8 arrays or from 16-bit ones; in the latter
    it also settles who rounds, for forward and backward alike."""
    forward_dtype = FLOAT8 if options.quantized_forward else None
    return _wants_kernel(options, query, key) and not support.float8_reason(
        query, key, plain_value, options.window, forward_dtype, options.value_is_prepared
    )


def _operation(options: AttentionOptions, kernel: Callable, portable: Callable) -> Callable:
    """`kernel` on CUDA, `portable` elsewhere, with a rule for mapped axes."""
    kernel = first_order_only(kernel)

    @custom_vmap
    def operation(*operands):
        if options.route == "fa3":
            return kernel(*operands)
        return lax.platform_dependent(*operands, cuda=kernel, default=portable)

    @operation.def_vmap
    def fold_into_batch(size, mapped, *operands):
        """[size, batch, ...] -> [size * batch, ...], and back for the results."""
        batch = operands[0].shape[1 if mapped[0] else 0]

        def fold(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x[None], (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        results = operation(*map(fold, operands, mapped))
        split = tuple(x.reshape(size, batch, *x.shape[1:]) for x in results)
        return split, (True,) * len(split)

    return operation


FIRST_ORDER_ONLY = (
    "the kernels and the float8 forward pass have first derivatives in reverse mode only; pass "
    "implementation='xla' and no forward_dtype for derivatives of the gradient"
)


def first_order_only(operation: Callable) -> Callable:
    """`operation` with an error of our own where it is differentiated beyond its gradient."""
    return undifferentiable(operation, FIRST_ORDER_ONLY)


def undifferentiable(operation: Callable, reason: str) -> Callable:
    """`operation`, which raises `reason` where JAX would differentiate it."""
    operation = jax.custom_jvp(operation)

    @operation.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(f"dot_product_attention: {reason}")

    return operation


def _result(like: jax.Array, shape: tuple[int, ...], dtype) -> jax.core.ShapedArray:
    """A result's type, varying over the same manual mesh axes as `like`."""
    like = jax.typeof(like)
    sharding = like.sharding.update(spec=(None,) * len(shape))
    return like.update(shape=shape, dtype=jnp.dtype(dtype), sharding=sharding)


def _pack(index: Index) -> tuple[jax.Array, ...]:
    """The index arrays that are present, in the order of the custom calls' operands."""
    return tuple(x for x in index if x is not None)


def _unpack(like: Index, present: tuple[jax.Array, ...]) -> Index:
    """`present` at the places where `like` has an array."""
    arrays = iter(present)
    return Index(*(None if x is None else next(arrays) for x in like))
