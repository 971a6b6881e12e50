"""The forward pass of a call with few query rows, such as a decode step of a model that keeps its
own cache. Keys and values are a contiguous cache to the kernels of caches, which divide the keys of
one sequence among many thread blocks.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jax_fa3 import native
from jax_fa3.cached import ffi
from jax_fa3.cached.problem import CachedOperands, CachedOptions
from jax_fa3.operands import Operands, Outputs
from jax_fa3.options import NUM_SMS, AttentionOptions

# Rows of a sequence, those of all query heads of a key/value head. More than a block of them read
# keys once more each, which pays where the forward kernel would leave multiprocessors without work.
MOST_ROWS = 128
ROWS_OF_BLOCK = 64
LEAST_KEYS = 512  # with fewer there is nothing to divide
KNOWN_ARRAYS = {"query", "key", "value", "query_lengths", "key_lengths", "query_offset"}
OF_CACHES = {"scale", "window_left", "window_right", "rescale_threshold", "sm_margin"}
# Choices that are in an array, or have no say in a forward pass of 16-bit arrays.
WITHOUT_SAY = {
    "query_offset",
    "deterministic",
    "routes",
    "sequence_parallel",
    "return_residual",
    "dear_gradients",
}


def forward(options: AttentionOptions, operands: Operands) -> Outputs | None:
    """None where the kernels of caches do not take the call, for which nothing but known arrays and
    choices may have a say."""
    n, query = operands.extents, operands.query
    rows = n.seqlen_q * (n.num_heads_q // n.num_heads_kv)
    is_few = rows <= MOST_ROWS and n.seqlen_k >= LEAST_KEYS
    pays = rows <= ROWS_OF_BLOCK or n.batch * n.num_heads_q < NUM_SMS
    is_known = operands.present().keys() <= KNOWN_ARRAYS and not _other_choices(options)
    if not (is_few and pays and is_known) or query.dtype.name not in native.KERNEL_DTYPES:
        return None
    lengths, offset = operands.key_lengths, operands.query_offset
    call = CachedOperands(
        query,
        operands.key,
        operands.value,
        key_lengths=jnp.full(n.batch, n.seqlen_k, jnp.int32) if lengths is None else lengths,
        query_offset=jnp.full(n.batch, options.query_offset, jnp.int32)
        if offset is None
        else offset,
        query_lengths=operands.query_lengths,
    )
    choices = CachedOptions(**{name: getattr(options, name) for name in OF_CACHES})
    try:
        native.plan_forward_cached(query.dtype.name, call.sizes(choices.layout), False)
    except ValueError:
        return None
    got = ffi.attend(choices, call)
    return Outputs(got.out, jnp.moveaxis(got.lse, 2, 1))


def _other_choices(options: AttentionOptions) -> bool:
    """Whether choices are made that are unknown here."""
    return any(
        getattr(options, field.name) != field.default
        for field in dataclasses.fields(options)
        if field.name not in OF_CACHES | WITHOUT_SAY
    )
