"""The custom calls of caches: operands, results and attributes, as src/kernels binds them.

Arrays are operands in the order of their fields. The results of an append that are caches stand in
the memory of its operands, which XLA copies first where something else still needs them.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jax_fa3 import native
from jax_fa3.cached.layout import order
from jax_fa3.cached.problem import (
    Appended,
    AppendOperands,
    AppendOptions,
    Attended,
    CachedOperands,
    CachedOptions,
)
from jax_fa3.custom_call import custom_call
from jax_fa3.result_type import result_type

FORWARD_CACHED = "jax_fa3_forward_cached"
APPEND = "jax_fa3_append"
TARGETS = (FORWARD_CACHED, APPEND)


def attend(options: CachedOptions, operands: CachedOperands) -> Attended:
    n, query = operands.sizes(options.layout), operands.query
    plan = native.plan_forward_cached(query.dtype.name, n, operands.block_tables is not None)
    out_dtype = jnp.float32 if options.out_float32 else query.dtype
    results = dict(
        out=result_type(query, (n.tokens, n.num_heads_q, n.head_dim_v), out_dtype),
        lse=result_type(query, (n.tokens, n.num_heads_q), jnp.float32),
        workspace=result_type(query, (plan["workspace_bytes"],), jnp.uint8),
        counters=result_type(query, (plan["counters"],), jnp.int32),
    )
    rows = operands.replace(query=query.reshape(n.tokens, n.num_heads_q, n.head_dim))
    got = custom_call(
        FORWARD_CACHED,
        rows.present(),
        results,
        options=attributes(options, is_fused=operands.value_cache is None),
        layout=order(options.layout),
        rows_per_sequence=np.int32(n.rows),
    )
    out, lse = got["out"], got["lse"]
    return Attended(out.reshape(*query.shape[:-1], n.head_dim_v), lse.reshape(query.shape[:-1]))


def append(options: AppendOptions, operands: AppendOperands) -> Appended:
    arrays = operands.present()
    caches = [name for name in ("key_cache", "value_cache") if name in arrays]
    results = {name: result_type(arrays[name], arrays[name].shape, None) for name in caches}
    if operands.query is not None:
        results["query_out"] = result_type(operands.query, operands.query.shape, None)
    got = custom_call(
        APPEND,
        arrays,
        results,
        aliases={i: i for i in range(len(caches))},
        layout=order(options.layout),
        is_fused=operands.value_cache is None,
        is_interleaved=options.is_interleaved,
    )
    return Appended(got["key_cache"], got.get("value_cache"), got.get("query_out"))


def attributes(options: CachedOptions, is_fused: bool) -> dict[str, object]:
    """The dictionary attribute of an attention call, in the exact widths C++ decodes."""
    return dict(
        scale=np.float32(options.scale),
        window_left=np.int32(options.window_left),
        window_right=np.int32(options.window_right),
        rescale_threshold=np.float32(options.rescale_threshold),
        sm_margin=np.int32(options.sm_margin),
        is_fused=is_fused,
        out_float32=options.out_float32,
    )
