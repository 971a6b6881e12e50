"""`flash_attention_varlen`: documents one after another without a batch, as flash-attn has them."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypedDict, Unpack, overload

import jax
from jax.typing import ArrayLike, DTypeLike

from jax_fa3 import api, route, validate
from jax_fa3.arguments import Arguments, as_indices
from jax_fa3.operands import DTYPES
from jax_fa3.options import FLOAT8, UNBOUNDED
from jax_fa3.visibility import checks, public
from jax_fa3.visibility.table import Visibility


class _Options(TypedDict, total=False):
    """The keywords of `flash_attention_varlen` that leave the type of its result alone."""

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
    """Attention within each of several documents that stand one after another.

    Letters: Q query rows and S keys of all documents, D documents, N query heads, K key/value heads
    (a divisor of N), H head_dim.

    Args:
      query: (Q, N, H); bfloat16, float16, float32 or float8_e4m3fn.
      key: (S, K, H), of query's dtype.
      value: (S, K, H), of query's dtype; its last dimension may differ from H and is then the
        output's.
      cu_seqlens_q: int32 (D + 1,): document d has the rows from cu_seqlens_q[d] to
        cu_seqlens_q[d + 1]. Documents may be empty; for a fixed number of them, repeat the last
        value. Rows behind the last document are padding. Entries are at least 0, do not fall, and
        are at most Q: values that are known raise, others give NaN in all results.
      cu_seqlens_k: the same of keys. None, or the same object as cu_seqlens_q: the documents of
        query.
      max_seqlen_q, max_seqlen_k: ints, as flash-attn's callers have them, and without effect.
      softmax_scale: a finite Python number that multiplies the scores; default 1 / sqrt(H).
      causal: row i of q in a document sees the keys up to i + k - q of the document's k: the last
        row sees all of them.
      window_size: (left, right) columns around that position, both ends included; -1 is off.
      visibility: what `make_visibility(cu_seqlens_q=..., cu_seqlens_k=..., ...)` gives, made once
        for many calls: it says where documents are, and cu_seqlens are only checked, as far as
        their values are known. With
        cu_seqlens_k it has causal and the window too, those of this call.
      softcap: as `logits_soft_cap` of `dot_product_attention`; None or 0 switches it off.
      alibi_slopes: as in `dot_product_attention`, with positions counted inside each document.
        Only where cu_seqlens_k is None or cu_seqlens_q itself.
      Others: deterministic, return_residual, implementation, sm_margin, forward_dtype, sinks and
        return_max_logits, as in `dot_product_attention`.

    Returns:
      out, (Q, N, H), of query's dtype; with return_residual or return_max_logits a tuple of it,
      lse, float32 (Q, N) in natural log units, and max_logits, float32 (N,), of all documents.
      Gradients flow through out and lse. A row that sees no key, and every row behind the last
      document, has out 0, lse -inf and gradients 0; with sinks the lse of a row that sees no key is
      its sink, if a later row sees one.

    Raises:
      ValueError, TypeError, NotImplementedError: as `dot_product_attention`.

    Example:
      >>> q = k = v = jnp.ones((6, 4, 64), jnp.bfloat16)
      >>> jax_fa3.flash_attention_varlen(q, k, v, jnp.array([0, 4, 6]), causal=True).shape
      (6, 4, 64)
    """
    given = dict(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    for name, n in given.items():
        if n is not None:
            validate.as_int(name, n, "an int or None")
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
    validate.check_scale(softmax_scale, "softmax_scale")
    window = checks.window_of("window_size", window_size, causal)
    is_self = cu_seqlens_k is None or cu_seqlens_k is cu_seqlens_q
    documents = dict(cu_seqlens_q=_as_ends("cu_seqlens_q", cu_seqlens_q))
    in_tables = [window]  # windows that a given table may have
    seqlens = arguments.query.shape[0], arguments.key.shape[0]
    if alibi_slopes is not None and not is_self:
        raise ValueError(
            "alibi_slopes is given, and cu_seqlens_k; expected one of them: rows and keys of a "
            "document are then at distances of its own, which are no slopes' but a bias' matter"
        )
    if cu_seqlens_k is not None and not is_self:
        documents["cu_seqlens_k"] = _as_ends("cu_seqlens_k", cu_seqlens_k)
    else:
        if seqlens[0] != seqlens[1]:
            raise ValueError(
                f"cu_seqlens_k is None, and query has {seqlens[0]} rows, key {seqlens[1]}; "
                "expected cu_seqlens_k, or as many keys as query rows"
            )
        # Positions in a document and in the whole differ by the same, of rows and of keys.
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
    """flash-attn's 0 is off."""
    cap = None if type(softcap) in (int, float) and softcap == 0 else softcap
    validate.check_soft_cap(cap, "softcap")
    return cap


def _as_ends(name: str, x: ArrayLike) -> jax.Array:
    """cu_seqlens as a one-dimensional array."""
    ends: jax.Array = as_indices(name, x)
    if ends.ndim != 1 or not ends.size:
        shape = tuple(ends.shape)
        raise ValueError(f"{name} has shape {shape}; expected (documents + 1,), int32")
    return ends
