"""`flash_attention_varlen`: packed documents without a batch dimension, as in flash-attn."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypedDict, Unpack, overload

import jax
from jax.typing import ArrayLike, DTypeLike

from jax_fa3 import api, route, validate, values
from jax_fa3.arguments import Arguments, as_indices
from jax_fa3.operands import DTYPES
from jax_fa3.options import FLOAT8, UNBOUNDED
from jax_fa3.visibility import checks, public
from jax_fa3.visibility.table import Visibility


class _Options(TypedDict, total=False):
    """The keywords of `flash_attention_varlen` that do not change the type of its result."""

    max_seqlen_q: int | None
    max_seqlen_k: int | None
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    deterministic: bool | None
    implementation: Literal["fa3", "xla"] | None
    visibility: Visibility | None
    sm_margin: int
    forward_dtype: DTypeLike | None
    softcap: float | None
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None


@overload
def flash_attention_varlen(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    return_residual: Literal[False] = ...,
    return_max_logits: Literal[False] = ...,
    **options: Unpack[_Options],
) -> jax.Array: ...


@overload
def flash_attention_varlen(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    return_residual: Literal[True],
    return_max_logits: Literal[False] = ...,
    **options: Unpack[_Options],
) -> tuple[jax.Array, jax.Array]: ...


@overload
def flash_attention_varlen(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    return_residual: bool = ...,
    return_max_logits: bool = ...,
    **options: Unpack[_Options],
) -> jax.Array | tuple[jax.Array, ...]: ...


def flash_attention_varlen(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool | None = None,
    return_residual: bool = False,
    implementation: Literal["fa3", "xla"] | None = None,
    visibility: Visibility | None = None,
    sm_margin: int = 0,
    forward_dtype: DTypeLike | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    return_max_logits: bool = False,
) -> jax.Array | tuple[jax.Array, ...]:
    """Attention within each document of a packed sequence.

    Letters: Q query rows and S keys of all documents, D documents, N query heads, K key/value heads
    (a divisor of N), H head_dim.

    Args:
      query: (Q, N, H); bfloat16, float16, float32 or float8_e4m3fn.
      key: (S, K, H), of query's dtype.
      value: (S, K, H), of query's dtype; its last dimension may differ from H, and the output then
        has the same last dimension.
      cu_seqlens_q: int32 (D + 1,): document d has the rows from cu_seqlens_q[d] up to but not
        including cu_seqlens_q[d + 1]. Documents may be empty; to keep D fixed, repeat the last
        value. Rows after the last document are padding. Entries must not be negative, must not
        decrease, and must not exceed Q: otherwise known values raise, and traced values give NaN in
        all results.
      cu_seqlens_k: the same for keys. None, or the same object as cu_seqlens_q, means that keys
        have the documents of query.
      max_seqlen_q, max_seqlen_k: ints; accepted for callers of flash-attn, and without effect.
      softmax_scale: a finite Python number that multiplies the scores; default 1 / sqrt(H).
      causal: in a document with q rows and k keys, row i sees the keys up to i + k - q. The last
        row sees all keys.
      window_size: (left, right): the number of keys seen on each side of position i + k - q; -1
        means unlimited.
      visibility: the result of `make_visibility(cu_seqlens_q=..., cu_seqlens_k=..., ...)`, made
        once for many calls. It replaces cu_seqlens, whose values are then only checked, if they are
        known. With cu_seqlens_k it must be made with the causal and window of this call.
      softcap: as `logits_soft_cap` of `dot_product_attention`; None or 0 means no cap.
      alibi_slopes: as in `dot_product_attention`, with positions counted inside each document; only
        if cu_seqlens_k is None or the same object as cu_seqlens_q.
      Others: deterministic, return_residual, implementation, sm_margin, forward_dtype, sinks and
        return_max_logits, as in `dot_product_attention`.

    Returns:
      out, (Q, N, H), of query's dtype; with return_residual or return_max_logits a tuple of out,
      lse, float32 (Q, N) in natural log units, and max_logits, float32 (N,), the maxima over all
      documents. Gradients flow through out and lse. A row that sees no key, and every row after the
      last document, has out 0, lse -inf and gradients 0. With sinks, a row that sees no key has its
      sink as lse if a later row sees a key.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `dot_product_attention`.

    Example:
      >>> q = k = v = jnp.ones((6, 4, 64), jnp.bfloat16)
      >>> jax_fa3.flash_attention_varlen(q, k, v, jnp.array([0, 4, 6]), causal=True).shape
      (6, 4, 64)
    """
    given = dict(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    for name, n in given.items():
        if n is not None:
            values.as_int(name, n, "an int or None")
    arguments = Arguments(
        query,
        key,
        value,
        scale=softmax_scale,
        deterministic=deterministic,
        return_residual=return_residual,
        implementation=implementation,
        sm_margin=sm_margin,
        forward_dtype=forward_dtype,
        logits_soft_cap=_cap_of(softcap),
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        return_max_logits=return_max_logits,
    ).with_arrays()
    tensors = {name: getattr(arguments, name) for name in ("query", "key", "value")}
    for name, x in tensors.items():
        if x is not None and x.ndim != 3:
            shape = tuple(x.shape)
            raise ValueError(f"{name} has shape {shape}; expected (rows, heads, head_dim)")
    dtypes = *DTYPES, FLOAT8
    validate.check_heads(arguments.query, arguments.key, arguments.value, dtypes)
    values.check_scale("softmax_scale", softmax_scale)
    window = checks.window_of("window_size", window_size, causal)
    is_self = cu_seqlens_k is None or cu_seqlens_k is cu_seqlens_q
    documents = dict(cu_seqlens_q=_as_ends("cu_seqlens_q", cu_seqlens_q))
    in_tables = [window]  # windows that a given table may have
    seqlens = arguments.query.shape[0], arguments.key.shape[0]
    if alibi_slopes is not None and not is_self:
        raise ValueError(
            "alibi_slopes and cu_seqlens_k are given; expected one of them: with cu_seqlens_k the "
            "offset between rows and keys differs from document to document; use a bias"
        )
    if cu_seqlens_k is not None and not is_self:
        documents["cu_seqlens_k"] = _as_ends("cu_seqlens_k", cu_seqlens_k)
    else:
        if seqlens[0] != seqlens[1]:
            raise ValueError(
                f"cu_seqlens_k is None, query has {seqlens[0]} rows and key has {seqlens[1]}; "
                "expected cu_seqlens_k, or equal numbers of rows and keys"
            )
        # A document's rows and keys have the same offset in the packed sequence.
        arguments = dataclasses.replace(arguments, local_window_size=window)
        window = UNBOUNDED, UNBOUNDED
        in_tables.append(window)
    if visibility is None:
        how = route.of_visibility(implementation)
        made = public.of_sources(documents, window=window, seqlens=seqlens, how=how)
        visibility = dataclasses.replace(made, table=public.named(made.table))
    else:
        checks.check_sources(documents, *seqlens)
    if isinstance(visibility, Visibility) and visibility.options.window not in in_tables:
        got, *expected = map(checks.window_text, (visibility.options.window, *in_tables))
        raise ValueError(f"visibility was made with {got}; expected {' or '.join(expected)}")
    return api.attention(dataclasses.replace(arguments, visibility=visibility))


def _cap_of(softcap: float | None) -> float | None:
    """The cap, or None for flash-attn's 0."""
    cap = None if type(softcap) in (int, float) and softcap == 0 else softcap
    values.check_soft_cap("softcap", cap)
    return cap


def _as_ends(name: str, x: ArrayLike) -> jax.Array:
    """cu_seqlens as a one-dimensional array."""
    ends: jax.Array = as_indices(name, x)
    if ends.ndim != 1 or not ends.size:
        shape = tuple(ends.shape)
        raise ValueError(f"{name} has shape {shape}; expected (documents + 1,), int32")
    return ends
