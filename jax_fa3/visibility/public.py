"""The visibility table: the public function, and the table that a call makes for itself."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jax_fa3 import route, sharding
from jax_fa3.arguments import UNDIVIDED, Arguments, Division, as_indices, ids_of_keys
from jax_fa3.operands import Sources
from jax_fa3.options import UNBOUNDED, Route, VisibilityOptions
from jax_fa3.values import is_array
from jax_fa3.varying import vary_together
from jax_fa3.visibility import checks, table
from jax_fa3.visibility.table import Visibility
from jax_fa3.vjp import CHECKPOINT_NAME


def make_visibility(
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    kv_start: ArrayLike | None = None,
    kv_end: ArrayLike | None = None,
    *,
    attention_chunk: int | None = None,
    query_offset: ArrayLike | None = None,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
) -> Visibility:
    """Makes the table of visible keys that the kernels read, once for all layers.

    `dot_product_attention(..., visibility=...)` has the same meaning as the call with the arguments
    of the table. The table does not include is_causal, windows and lengths, which are arguments of
    each call. Chunks use the query_offset given here, not the query_offset of a call.

    Args:
      query_segment_ids, key_value_segment_ids, kv_start, kv_end, attention_chunk: as in
        `dot_product_attention`. The batch may be 1 or be omitted; the table then serves any batch.
        The heads may be the query or key/value heads of the call, or be omitted.
      query_offset: as in `dot_product_attention`; only with attention_chunk.
      cu_seqlens_q: int32 (C,) or (B, C): document d has the query rows from cu_seqlens_q[d] up to
        but not including cu_seqlens_q[d + 1]; its rows see keys of the same document. To pad,
        repeat the last value. Entries must not be negative, must not decrease, and must not exceed
        seqlen_q, which must be given.
      cu_seqlens_k: the same for keys; default cu_seqlens_q. Needs seqlen_k.
      causal, window: only with cu_seqlens_q. In a document with q rows and k keys, causal hides
        the keys after position i + k - q from row i; window is (left, right), the number of keys
        seen on each side of this position, where -1 means unlimited.
      seqlen_q, seqlen_k: the numbers of query rows and keys; needed if no array has this dimension.
        With query_segment_ids alone, the numbers are equal.

    Returns:
      A `Visibility`, a pytree: it may be an argument or result of jax.jit, a constant of a scan,
      and a mapped argument of jax.vmap.

    Raises:
      ValueError: shapes or values do not fit. Known ids and cu_seqlens that break the rules raise;
        traced ones give NaN in the results of the calls that use the table.
      TypeError: a wrong dtype, or an array in place of a Python value.

    Example:
      >>> ids = jnp.array([[1, 1, 1, 2, 2, 0]])
      >>> visibility = jax_fa3.make_visibility(ids)
      >>> q = k = v = jnp.ones((1, 6, 4, 64), jnp.bfloat16)
      >>> jax_fa3.dot_product_attention(q, k, v, is_causal=True, visibility=visibility).shape
      (1, 6, 4, 64)
    """
    given = dict(
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=ids_of_keys(query_segment_ids, key_value_segment_ids),
        kv_start=kv_start,
        kv_end=kv_end,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    return of_sources(
        {name: x for name, x in given.items() if x is not None},
        attention_chunk=attention_chunk,
        query_offset=query_offset,
        window=checks.window_of("window", window, causal),
        seqlens=(seqlen_q, seqlen_k),
        how=route.of_visibility(),
    )


def of_sources(
    given: dict[str, Any],
    *,
    attention_chunk: int | None = None,
    query_offset: Any = None,
    window: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    seqlens: tuple[int | None, int | None],
    how: Route,
) -> Visibility:
    """`make_visibility` of the given sources, with a window in the form of the kernels."""
    checks.check_chunk(attention_chunk)
    checks.check_chunk_offset(query_offset, attention_chunk)
    if is_array(query_offset):
        given, query_offset = given | dict(query_offset=query_offset), 0
    sources = {name: as_indices(name, x) for name, x in given.items()}
    checks.check_given(sources, attention_chunk, window)
    seqlen_q, seqlen_k = checks.check_sources(sources, *seqlens)
    if "cu_seqlens_q" in sources:
        sources.setdefault("cu_seqlens_k", sources["cu_seqlens_q"])
    options = VisibilityOptions(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        query_offset=int(query_offset or 0),
        attention_chunk=_chunk(attention_chunk),
        window_left=window[0],
        window_right=window[1],
    )
    return Visibility(_made(how, options, Sources(**sources)), options)


def of_call(arguments: Arguments, division: Division = UNDIVIDED) -> jax.Array:
    """The table of a checked call that has one: of the whole sequences, for one head or for all
    query heads."""
    if arguments.visibility is not None:
        made = arguments.visibility.table
        made = made if made.ndim == 3 else made[None]  # without a batch under jax.vmap
    else:
        offset, seqlens = arguments.query_offset, arguments.extents[1:3]
        chunk = _chunk(arguments.attention_chunk)
        options = VisibilityOptions(
            seqlen_q=seqlens[0] * division.parts,
            seqlen_k=seqlens[1] * division.parts,
            query_offset=0 if is_array(offset) or not chunk else int(offset or 0),
            attention_chunk=chunk,
        )
        sources = {
            name: x if name == "query_offset" else division.gather(x)
            for name, x in arguments.sources.items()
        }
        for name in checks.BY_HEAD:
            if arguments.query.ndim == 3 and name in sources and sources[name].ndim == 2:
                sources[name] = sources[name][None]
        how = route.of_visibility(arguments.implementation)
        made = named(_made(how, options, Sources(**sources)))
    heads = arguments.extents.num_heads_q
    return made if made.shape[1] == 1 else table.with_heads(made, heads)


def named(made: jax.Array) -> jax.Array:
    """A table that a call makes for itself; a remat policy keeps it with the call's results."""
    return checkpoint_name(made, CHECKPOINT_NAME)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _made(how: Route, options: VisibilityOptions, sources: Sources) -> jax.Array:
    """The table of checked sources in public shapes."""
    if not sources.present():  # an array is needed to find the mesh
        offset = jnp.full((1,), options.query_offset, jnp.int32)
        sources = Sources(query_offset=offset)
    sources = vary_together(table.in_row_dims(sources))
    made = sharding.visibility(how, options, sources).visibility
    assert made is not None
    return made


def _chunk(attention_chunk: int | None) -> int:
    return min(int(attention_chunk or 0), UNBOUNDED)
