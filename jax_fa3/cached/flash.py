"""`flash_attention_with_kvcache`: `cached_attention` with flash-attn's names and defaults."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_fa3.arguments import as_indices
from jax_fa3.cached.public import append_to_cache, cached_attention
from jax_fa3.cached.rotary import Rotary, rotate
from jax_fa3.options import UNBOUNDED
from jax_fa3.values import as_int, check_flag, check_scale, check_sm_margin, is_array, shape_of
from jax_fa3.visibility.checks import window_of


def flash_attention_with_kvcache(
    q: ArrayLike,
    k_cache: ArrayLike,
    v_cache: ArrayLike,
    k: ArrayLike | None = None,
    v: ArrayLike | None = None,
    *,
    rotary_cos: ArrayLike | None = None,
    rotary_sin: ArrayLike | None = None,
    cache_seqlens: ArrayLike | None = None,
    cache_batch_idx: ArrayLike | None = None,
    cache_leftpad: ArrayLike | None = None,
    page_table: ArrayLike | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    rotary_interleaved: bool = True,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> jax.Array | tuple[jax.Array, ...]:
    """`cached_attention` with the names and defaults of flash-attn's flash_attn_with_kvcache.

    JAX arrays are immutable, so with k the result includes the caches: (out, [lse,] k_cache,
    v_cache). There is no argument for the number of splits.

    Letters: B batch, T query rows, S slots, N query heads, K key/value heads, H head_dim.

    Args:
      q: (B, T, N, H).
      k_cache, v_cache: (B or more, S, K, H); with page_table (pages, S, K, H).
      k, v: (B, T, K, H), new rows, appended first; both or none.
      rotary_cos, rotary_sin: (positions, width / 2), both or none. Rows of k and q are rotated by
        their positions. With neither causal nor a window, all rows of q are rotated by the position
        of the first row.
      cache_seqlens: int, or int32 (B,): the number of tokens before the append; None: all S slots
        are tokens.
      cache_batch_idx: int32 (B,), the cache's sequence for each batch entry; not with page_table.
      cache_leftpad: int32 (B,), the first visible slot. Positions count from slot 0, unlike in
        flash-attn.
      page_table: int32 (B, pages of a sequence).
      softmax_scale: a finite Python number; default 1 / sqrt(H).
      causal: row i sees the keys up to i + keys - T, where keys includes the appended keys.
      window_size: (left, right): the number of keys seen on each side of position i + keys - T; -1
        means unlimited.
      rotary_interleaved: True: rotary pairs are adjacent elements; False: elements of the two
        halves.
      sm_margin: as in `cached_attention`.
      return_softmax_lse: also return the log-sum-exp, float32 (B, T, N).

    Returns:
      out (B, T, N, H), or a tuple as described above.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `cached_attention`; a message may name the
      argument of `cached_attention`.

    Example:
      >>> cache = jnp.zeros((2, 64, 2, 128), jnp.bfloat16)
      >>> q = jnp.ones((2, 1, 8, 128), jnp.bfloat16)
      >>> jax_fa3.flash_attention_with_kvcache(q, cache, cache, cache_seqlens=17).shape
      (2, 1, 8, 128)
    """
    check_scale("softmax_scale", softmax_scale)
    check_flag("causal", causal)
    check_flag("rotary_interleaved", rotary_interleaved)
    check_flag("return_softmax_lse", return_softmax_lse)
    check_sm_margin("sm_margin", sm_margin)
    for name, x in {"q": q, "k_cache": k_cache, "v_cache": v_cache}.items():
        if getattr(x, "ndim", None) != 4:
            got = shape_of(x) if hasattr(x, "shape") else type(x).__name__
            raise ValueError(f"{name} is {got}; expected an array of 4 dimensions")
    if page_table is not None and jnp.ndim(page_table) != 2:
        raise ValueError(
            f"page_table has shape {jnp.shape(page_table)}; expected (batch, pages of a sequence)"
        )
    left, right = window_of("window_size", window_size, causal)
    batch, rows = jnp.shape(q)[:2]
    tables = page_table
    if cache_batch_idx is not None:
        if page_table is not None:
            raise ValueError("cache_batch_idx and page_table are given; expected one of them")
        index = as_indices("cache_batch_idx", cache_batch_idx)
        if tuple(index.shape) != (batch,):
            raise ValueError(
                f"cache_batch_idx has shape {shape_of(index)}; expected ({batch},), one per "
                "sequence"
            )
        tables = jnp.asarray(index)[:, None]
    capacity = jnp.shape(k_cache)[1] * (1 if page_table is None else jnp.shape(page_table)[1])
    lengths: Any = capacity if cache_seqlens is None else cache_seqlens
    if not is_array(lengths) and not isinstance(lengths, (list, tuple)):
        lengths = as_int("cache_seqlens", lengths, "an int or an int32 array")
        lengths = jnp.full(batch, min(max(lengths, 0), capacity), jnp.int32)
    rotary = None
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("one of rotary_cos and rotary_sin is None; expected both or none")
    if rotary_cos is not None and rotary_sin is not None:
        if k is None:
            raise ValueError("rotary_cos is given and k is None; expected both or no rotary_cos")
        rotary = Rotary(rotary_cos, rotary_sin, bool(rotary_interleaved))
    options: dict[str, Any] = dict(
        block_tables=tables,
        key_starts=cache_leftpad,
        scale=softmax_scale,
        is_causal=False,
        local_window_size=(left, right),
        return_residual=return_softmax_lse,
        sm_margin=sm_margin,
    )
    if rotary is None or rows == 1 or min(left, right) < UNBOUNDED:
        options |= dict(cache_lengths=lengths, rotary=rotary)
        results: Any = cached_attention(q, k_cache, v_cache, k, v, **options)
        return results
    new: Any = k, v  # given, as rotary_cos is
    where: dict[str, Any] = dict(cache_lengths=lengths, block_tables=tables, rotary=rotary)
    caches: Any = append_to_cache(k_cache, v_cache, *new, **where)
    lengths = jnp.clip(as_indices("cache_seqlens", lengths), 0, capacity)
    first = jnp.broadcast_to(lengths[:, None], (batch, rows))
    cos, sin = (jnp.asarray(x, jnp.float32) for x in (rotary.cos, rotary.sin))
    turned = rotate(jnp.asarray(q), cos, sin, first, rotary.interleaved)
    options |= dict(cache_lengths=lengths + jnp.shape(new[0])[1])
    results = cached_attention(turned, *caches, **options)
    return (*results, *caches) if return_softmax_lse else (results, *caches)
