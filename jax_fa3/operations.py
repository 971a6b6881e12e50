"""The two attention operations on one device's arrays: custom calls on CUDA, XLA code elsewhere.

From outside in: custom_vmap (a mapped axis is folded into the batch, which the kernels loop over
anyway), platform_dependent (decided when the program is lowered), and then ffi.py or xla.py, which
have the same two operations. A forward pass in float8 of 16-bit arrays rounds them first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import NoReturn, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jax_fa3 import ffi, mask, xla
from jax_fa3.cached import few_rows
from jax_fa3.float8 import rounding
from jax_fa3.operands import Bundle, Operands, Outputs, Row, Sources
from jax_fa3.options import AttentionOptions, Route, VisibilityOptions
from jax_fa3.visibility import table


class Operations(Protocol):
    """Whatever has the two operations: ffi.py, xla.py, this module, and what divides them among
    devices. Hashable.

    forward     out [batch, seqlen_q, num_heads_q, head_dim_v] of options.out_dtype, lse [batch,
                num_heads_q, seqlen_q] float32, and with options.return_max_logits max_logits
                [batch, num_heads_q] float32
    backward    the gradients of the operands that have one; the cotangent of lse may be absent
    """

    def forward(self, options: AttentionOptions, operands: Operands, /) -> Outputs: ...

    def backward(
        self,
        options: AttentionOptions,
        operands: Operands,
        outputs: Outputs,
        cotangents: Outputs,
        /,
    ) -> Operands: ...


class LocalOperations(Operations, Protocol):
    """Those of this module, or of what partitions them, with the third one that pieces of a divided
    sequence need.

    visibility  the table of visibility, int32 [batch | 1, heads | 1, words], of its sources
    """

    def visibility(
        self, route: Route, options: VisibilityOptions, sources: Sources, /
    ) -> Operands: ...


def forward(options: AttentionOptions, operands: Operands) -> Outputs:
    if options.forward_dtype is not None:
        return first_order_only(functools.partial(_rounding_forward, options))(operands)
    kernel = functools.partial(_kernel_forward, options)
    return _run(options.routes.forward, kernel, functools.partial(xla.forward, options), operands)


def _kernel_forward(options: AttentionOptions, operands: Operands) -> Outputs:
    return few_rows.forward(options, operands) or ffi.forward(options, operands)


def backward(
    options: AttentionOptions, operands: Operands, outputs: Outputs, cotangents: Outputs
) -> Operands:
    """With a forward pass in float8, gradients at the arrays as it rounded them: only those give
    the weights whose rows add up to 1 with its lse, and whose output is `out`.
    """
    if options.forward_dtype is not None:
        taken = mask.within_sight(operands).only(rounding.TAKEN)
        back = functools.partial(ffi.quantize, back=True)
        rounded = _run(options.routes.forward, back, rounding.rounded, taken)
        operands = operands.replace(**rounded.present())
    kernel, portable = (functools.partial(x.backward, options) for x in (ffi, xla))
    bundles = operands, outputs, cotangents
    differentiated = tuple(operands.differentiable(options).present())  # arrays would leak
    return _run(options.routes.backward, kernel, portable, *bundles, differentiated=differentiated)


def quantized(
    options: AttentionOptions, operands: Operands, *, seed: int, prepare_value: bool
) -> Operands:
    """float8 arrays with measured scales by blocks."""

    def portable(operands):
        quantized, _ = rounding.quantize(operands, seed=seed)
        return rounding.prepared(quantized) if prepare_value else quantized

    kernel = functools.partial(ffi.quantize, seed=seed, prepare_value=prepare_value)
    return _run(options.routes.forward, kernel, portable, operands.only(rounding.TAKEN))


def visibility(route: Route, options: VisibilityOptions, sources: Sources) -> Operands:
    """A table of visibility."""
    kernel, portable = (functools.partial(x, options) for x in (ffi.visibility, table.make))
    has_pairs = options.seqlen_q and options.seqlen_k
    tables = _run(route if has_pairs else "xla", kernel, portable, sources)
    return table.with_legal_documents(options, sources, tables)


def _rounding_forward(options: AttentionOptions, operands: Operands) -> Outputs:
    """`forward` of 16-bit arrays by way of float8; the scales are those of the arrays at hand."""
    options = dataclasses.replace(options, out_dtype=operands.query.dtype.name)

    def kernel(operands):
        quantized = ffi.quantize(mask.within_sight(operands), prepare_value=True)
        return ffi.forward(options, _with(operands, quantized))

    def portable(operands):
        quantized, _ = rounding.quantize(mask.within_sight(operands))
        return xla.forward(options, _with(operands, rounding.settled(quantized)))

    return _run(options.routes.forward, kernel, portable, operands)


def _with(operands: Operands, quantized: Operands) -> Operands:
    """The operands with the float8 arrays and scales in place of their 16-bit arrays."""
    replaced = dict.fromkeys(rounding.GIVEN) | quantized.present()
    return operands.replace(**replaced)


def _run(
    route: Route,
    kernel: Callable,
    portable: Callable,
    *bundles: Bundle,
    differentiated: Collection[str] = (),
) -> Bundle:
    """`kernel` on CUDA and `portable` elsewhere, with a rule for mapped axes; or `portable` alone.
    `differentiated`: the names of arrays whose gradients, of their shapes, are the results.

    Problems without scores, some of whose arrays are empty, are left to XLA's constants.
    """
    if route == "xla" or any(0 in x.shape for x in jax.tree.leaves(bundles)):
        return portable(*bundles)
    kernel = first_order_only(kernel)

    @custom_vmap
    def operation(*bundles):
        if route == "fa3":
            return kernel(*bundles)
        return lax.platform_dependent(*bundles, cuda=kernel, default=portable)

    @operation.def_vmap
    def fold_into_batch(size, mapped, *bundles):
        if route == "auto" and any(map(_has_no_batch, bundles, mapped)):
            axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, mapped)
            results = jax.vmap(portable, axes)(*bundles)
            return results, jax.tree.map(lambda _: True, results)
        name, first = next(iter(bundles[0].present().items()))
        batch = first.shape[1 if getattr(mapped[0], name) else 0]
        fold = functools.partial(_fold, size, batch)
        results = operation(
            *(
                x.map(fold, of_x, x.only(differentiated))
                for x, of_x in zip(bundles, mapped, strict=True)
            )
        )
        own = bundles[0].only(differentiated)  # a gradient has as many planes as its array
        own = own.map(lambda _, x, is_mapped: x.shape[1 if is_mapped else 0], mapped[0]).present()
        unfolded = {
            name: x.reshape(size, own.get(name, batch), *x.shape[1:])
            for name, x in results.present().items()
        }
        results = type(results)(**unfolded)
        return results, jax.tree.map(lambda _: True, results)

    return operation(*bundles)


def _has_no_batch(bundle: Bundle, mapped: Bundle) -> bool:
    """Whether an array is mapped whose dimensions have no batch to fold the mapped axis into."""
    rows, are_mapped = bundle.rows(), mapped.present()
    return any(are_mapped[name] and rows[name].axis("b") != 0 for name in bundle.present())


def _fold(
    size: int,
    batch: int,
    row: Row,
    x: jax.Array,
    is_mapped: bool,
    differentiated: jax.Array | None,
) -> jax.Array:
    """[size, batch, ...] -> [size * batch, ...]. What broadcasts over the batch, and is not mapped,
    stays as it is; only where it is differentiated each mapped call has a copy, and a gradient of
    it. Planes that may serve several sequences serve those of one mapped call."""
    if row.axis("b") != 0:
        if is_mapped:
            raise NotImplementedError(f"an array of dimensions {row.dims} cannot be mapped")
        return x
    own = x.shape[1 if is_mapped else 0]
    if not is_mapped:
        if own == 1 and row.broadcasts and differentiated is None:
            return x
        x = jnp.broadcast_to(x[None], (size, *x.shape))
    if own != batch and not row.shared:
        x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
    return x.reshape(size * x.shape[1], *x.shape[2:])


FIRST_ORDER_ONLY = (
    "the kernels and the float8 forward pass have first derivatives in reverse mode only; for "
    "forward mode (jvp, jacfwd, linearize) and derivatives of the gradient, pass "
    "implementation='xla', without forward_dtype and sequence_parallel"
)


def first_order_only(operation: Callable) -> Callable:
    """`operation` with an error of our own where it is differentiated beyond its gradient."""
    return undifferentiable(operation, FIRST_ORDER_ONLY)


def undifferentiable(
    operation: Callable, reason: str, function: str = "dot_product_attention"
) -> Callable:
    """`operation`, which raises `reason` where JAX would differentiate it."""
    operation = jax.custom_jvp(operation)

    @operation.defjvp
    def rule(primals, tangents):
        refuse(reason, function)

    return operation


def refuse(reason: str, function: str = "dot_product_attention") -> NoReturn:
    raise NotImplementedError(f"{function}: {reason}")
