"""Attention functions for `attention_fn=` of Flax's multi-head layers.

    flax.linen.MultiHeadDotProductAttention(num_heads=8, attention_fn=jax_fa3.flax.attention_fn)
    flax.nnx.MultiHeadAttention(8, 512, attention_fn=jax_fa3.flax.attention_fn, rngs=rngs)

`attention_fn` accepts every keyword that Flax passes, and follows it or raises. `make_attention_fn`
makes an attention function with options that Flax does not have, so that causal and padding masks
need no arrays. Flax itself is not imported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_fa3.api import dot_product_attention
from jax_fa3.visibility.table import Visibility

# Keywords of Flax that must be None, and why.
REFUSED = {
    "module": "attention weights are never in memory and cannot be sown",
    "precision": "products are in the dtype of the inputs and sums in float32",
    "einsum_dot_general": "the kernels compute the products",
    "qk_attn_weights_einsum": "the kernels compute the products",
    "attn_weights_value_einsum": "the kernels compute the products",
    "promote_dtype": "pass dtype, or cast the inputs before the call",
    "input_positions": "rotate query and key before the call",
}
OF_ROWS = ("query_segment_ids", "key_value_segment_ids", "kv_start", "kv_end")


def make_attention_fn(
    *,
    padding_mask: bool = False,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["fa3", "xla"] | None = None,
    query_offset: ArrayLike | None = None,
    deterministic: bool | None = None,
    sm_margin: int = 0,
    forward_dtype: DTypeLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    kv_start: ArrayLike | None = None,
    kv_end: ArrayLike | None = None,
    attention_chunk: int | None = None,
    visibility: Visibility | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
) -> Callable[..., jax.Array]:
    """Makes an attention function for Flax's multi-head layers, with options set in advance.

    The function takes query (batch..., T, N, H), key and value (batch..., S, K, H) with any number
    of batch dimensions, and bias and mask broadcastable to (batch..., N, T, S); the mask may have
    any dtype. It returns (batch..., T, N, H) in the `dtype` that Flax passes, or otherwise in the
    common dtype of the inputs.

    A step of Flax's decode cache has one query row, S > 1 keys and a mask that ends at the row's
    own key. Causal attention and windows then count from the last key that the mask shows, unless
    query_offset is given.

    Args:
      padding_mask: True promises that masks hide only padding at the ends of key sequences. A mask
        must then have shape (batch..., 1, 1, S) and be True up to the length of each sequence. The
        function converts it to `key_value_seq_lengths`, which the kernels take. The mask of the
        decode cache has this form, and
        `flax.linen.make_attention_mask(jnp.ones((batch, 1)), tokens > 0)` makes one.
      is_causal: as in `dot_product_attention`; True applies even if nnx passes False.
      query_seq_lengths, key_value_seq_lengths: int32 (batch...).
      query_offset: int, or int32 of shape () or (batch...).
      deterministic: if True, gradients are bitwise reproducible, as in `dot_product_attention`.
        Flax passes a different keyword of the same name at the call, which turns dropout off.
      query_segment_ids, key_value_segment_ids: int32 (batch..., T) and (batch..., S).
      kv_start, kv_end: int32 (batch..., T), (batch..., N, T) or (batch..., K, T).
      visibility: the result of `make_visibility`, for all batch dimensions merged into one, or of
        batch 1.
      sinks: as in `dot_product_attention`. Trained sinks are a parameter of the layer: make the
        function where the parameter is available.
      Others: scale, local_window_size, implementation, sm_margin, forward_dtype, attention_chunk,
        logits_soft_cap and alibi_slopes, as in `dot_product_attention`.

    Returns:
      The function. It raises NotImplementedError, with the name of the keyword, for dropout, sown
      weights, and a custom precision, einsum or position; other errors are as in
      `dot_product_attention`.

    Raises:
      ValueError: padding_mask together with key_value_seq_lengths.

    Numerics:
      The softmax is in float32 for every `force_fp32_for_softmax`. A row that sees no key has
      output 0; with Flax's own attention, its output is the mean of the values.

    Example:
      >>> causal = jax_fa3.flax.make_attention_fn(is_causal=True)
      >>> layer = flax.nnx.MultiHeadAttention(
      ...     8, 512, attention_fn=causal, decode=False, rngs=flax.nnx.Rngs(0))
      >>> layer(jnp.ones((2, 128, 512))).shape
      (2, 128, 512)
    """
    if padding_mask and key_value_seq_lengths is not None:
        raise ValueError(
            "key_value_seq_lengths is given and padding_mask is True; expected one of them: "
            "padding_mask takes the lengths from the mask"
        )
    window = local_window_size
    return _AttentionFn(
        padding_mask=padding_mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=tuple(window) if isinstance(window, list) else window,
        implementation=implementation,
        query_offset=query_offset,
        deterministic=deterministic,
        sm_margin=sm_margin,
        forward_dtype=forward_dtype,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        kv_start=kv_start,
        kv_end=kv_end,
        attention_chunk=attention_chunk,
        visibility=visibility,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _AttentionFn:
    """The function that `make_attention_fn` returns. Equal options make equal functions, so that
    equal models share jax.jit's cache."""

    padding_mask: bool
    scale: float | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    local_window_size: int | tuple[int, int] | None
    implementation: Literal["fa3", "xla"] | None
    query_offset: ArrayLike | None
    deterministic: bool | None
    sm_margin: int
    forward_dtype: DTypeLike | None
    query_segment_ids: ArrayLike | None
    key_value_segment_ids: ArrayLike | None
    kv_start: ArrayLike | None
    kv_end: ArrayLike | None
    attention_chunk: int | None
    visibility: Visibility | None
    logits_soft_cap: float | None
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _AttentionFn) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        """The options, in a form that can be compared."""
        return tuple(_comparable(getattr(self, x.name)) for x in dataclasses.fields(self))

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., Any] | None = None,
        qk_attn_weights_einsum: Callable[..., Any] | None = None,
        attn_weights_value_einsum: Callable[..., Any] | None = None,
        promote_dtype: Callable[..., Any] | None = None,
        is_causal: bool = False,
        input_positions: jax.Array | None = None,
    ) -> jax.Array:
        """Attention with Flax's signature; `make_attention_fn` documents it."""
        _refuse_dropout(dropout_rate, deterministic)
        _refuse(
            module=module,
            precision=None if precision in ("default", lax.Precision.DEFAULT) else precision,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            promote_dtype=promote_dtype,
            input_positions=input_positions,
        )
        _check_batch(query, key=key, value=value)
        batch, seqlen_q, seqlen_k = query.shape[:-3], query.shape[-3], key.shape[-3]
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        bias, mask = _fold_dense("bias", bias, batch), _fold_dense("mask", mask, batch)
        key_lengths = _fold_lengths(self.key_value_seq_lengths)
        rows: dict[str, Any]
        rows = {name: _fold_rows(name, getattr(self, name), batch) for name in OF_ROWS}
        offset = self.query_offset
        offset = offset if offset is None or np.ndim(offset) == 0 else _fold_lengths(offset)
        if mask is not None:
            mask = mask.astype(bool)
            if seqlen_q == 1 < seqlen_k and offset is None:
                offset = _lengths(mask, batch) - 1
            if self.padding_mask:
                _check_padding_mask(mask, seqlen_k)
                key_lengths, mask = _lengths(mask, batch), None
        out = dot_product_attention(
            _fold(query.astype(dtype)),
            _fold(key.astype(dtype)),
            _fold(value.astype(dtype)),
            bias,
            mask,
            is_causal=self.is_causal or is_causal,
            query_seq_lengths=_fold_lengths(self.query_seq_lengths),
            key_value_seq_lengths=key_lengths,
            query_offset=offset,
            scale=self.scale,
            local_window_size=self.local_window_size,
            implementation=self.implementation,
            deterministic=self.deterministic,
            sm_margin=self.sm_margin,
            forward_dtype=self.forward_dtype,
            **rows,
            attention_chunk=self.attention_chunk,
            visibility=self.visibility,
            logits_soft_cap=self.logits_soft_cap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
        )
        return out.reshape(*batch, *out.shape[1:])


def _comparable(x: Any) -> Any:
    """An option as a comparable value; traced arrays are equal only to themselves."""
    if isinstance(x, jax.core.Tracer):
        return id(x)
    if isinstance(x, Visibility):
        return _comparable(x.table), x.options
    if isinstance(x, (jax.Array, np.ndarray, list)):
        x = np.asarray(x)
        return x.shape, x.dtype.name, x.tobytes()
    return x


attention_fn = make_attention_fn()


def _fold(x: jax.Array) -> jax.Array:
    """(batch..., length, heads, head_dim) with all batch dimensions merged."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _fold_dense(name: str, x: jax.Array | None, batch: tuple[int, ...]) -> jax.Array | None:
    """A bias or mask broadcastable to (batch..., N, T, S), as (1 | batch, 1 | N, 1 | T, 1 | S)."""
    if x is None:
        return None
    full = (1,) * (len(batch) + 3 - x.ndim) + x.shape
    leading = full[:-3]
    if leading == (1,) * len(batch):
        return x.reshape(1, *full[-3:])
    if len(leading) != len(batch) or any(
        n not in (1, m) for n, m in zip(leading, batch, strict=True)
    ):
        raise ValueError(
            f"{name} has shape {x.shape}; expected a shape that broadcasts to (batch..., heads, "
            f"seqlen_q, seqlen_k) with the batch dimensions of query, {batch}"
        )
    return _fold(jnp.broadcast_to(x.reshape(full), batch + full[-3:]))


def _fold_lengths(x: ArrayLike | None) -> jax.Array | np.ndarray | None:
    """(batch...) with all batch dimensions merged."""
    if x is None or isinstance(x, jax.Array):
        return None if x is None else x.reshape(-1)
    return np.reshape(x, -1)  # JAX would truncate int64 to 32 bits silently


def _fold_rows(
    name: str, x: ArrayLike | None, batch: tuple[int, ...]
) -> jax.Array | np.ndarray | None:
    """(batch..., rows) or (batch..., heads, rows) with all batch dimensions merged."""
    if x is None:
        return None
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if x.shape[: len(batch)] != batch:
        raise ValueError(
            f"{name} has shape {x.shape}; expected a shape that begins with the batch dimensions "
            f"of query, {batch}"
        )
    return x.reshape(math.prod(batch), *x.shape[len(batch) :])


def _lengths(mask: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """int32 [batch]: the number of keys up to the last key that any row of a folded mask sees."""
    count = jnp.arange(1, mask.shape[-1] + 1, dtype=jnp.int32)[None]
    ends = jnp.where(mask.any((1, 2)), count, 0)
    return jnp.broadcast_to(ends.max(1, initial=0), (math.prod(batch),))


def _check_batch(query: jax.Array, **others: jax.Array) -> None:
    for name, x in dict(query=query, **others).items():
        if x.ndim < 3 or x.shape[:-3] != query.shape[:-3]:
            expected = "(batch..., length, heads, head_dim)"
            if name != "query":
                expected += f" with the batch dimensions of query, {query.shape[:-3]}"
            raise ValueError(f"{name} has shape {x.shape}; expected {expected}")


def _check_padding_mask(mask: jax.Array, seqlen_k: int) -> None:
    if mask.shape[1:] != (1, 1, seqlen_k):
        raise ValueError(
            f"mask has {mask.shape[1:]} heads, rows and keys; expected (1, 1, {seqlen_k}), "
            "because padding_mask is True"
        )


def _refuse_dropout(rate: float, deterministic: bool) -> None:
    if rate and not deterministic:
        raise NotImplementedError(
            f"dropout_rate is {rate} and deterministic is {deterministic}; expected a rate of 0 or "
            "deterministic=True: attention has no dropout here"
        )


def _refuse(**keywords: Any) -> None:
    for name, x in keywords.items():
        if x is not None:
            raise NotImplementedError(
                f"{name} is a {type(x).__name__}; expected None: {REFUSED[name]}"
            )
