"""Attention for Keras on its JAX backend.

    with jax_fa3.keras.attention():
        model.fit(x, y)

Keras passes "cudnn" or "xla" to `jax.nn.dot_product_attention` and has no argument for another
implementation. Both attention layers of Keras look up the backend's function by name in a module;
the context replaces this function. Keras itself is imported only when `attention` is called.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_fa3.api import dot_product_attention

BACKEND = "keras.src.backend.jax.nn"


@contextlib.contextmanager
def attention(implementation: Literal["fa3", "xla"] | None = None) -> Iterator[None]:
    """A context in which `keras.ops.dot_product_attention` runs this package.

    `keras.layers.MultiHeadAttention` and `GroupQueryAttention` call this function if they have no
    dropout and return no scores. Keras traces a model at its first call, or at its first step of
    `fit`: the context must surround this call or step. A traced program does not change when the
    context begins or ends.

    Args:
      implementation: as in `dot_product_attention`, for calls whose `flash_attention` is None.
        Keras's `flash_attention=True` means "fa3" and False means "xla".

    Raises:
      RuntimeError: Keras runs on another backend, or does not have the replaced function.
      NotImplementedError: a call has `attn_logits_soft_cap`, because Keras's formula differs from
        `logits_soft_cap`; or its `flash_attention` is True and the kernels cannot run the call.

    Numerics:
      A row that sees no key has output 0; with Keras's own attention, its output is the mean of the
      values.

    Example:
      >>> layer = keras.layers.MultiHeadAttention(num_heads=8, key_dim=64)
      >>> with jax_fa3.keras.attention():
      ...     y = layer(x, x, use_causal_mask=True)
    """
    backend = _backend()
    replaced = backend.dot_product_attention

    def dot_product(
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,
        mask: Any = None,
        scale: float | None = None,
        is_causal: bool = False,
        flash_attention: bool | None = None,
        attn_logits_soft_cap: float | None = None,
    ) -> jax.Array:
        if attn_logits_soft_cap is not None:
            raise NotImplementedError(
                f"attn_logits_soft_cap is {attn_logits_soft_cap}; expected None: no kernel "
                "computes Keras's cap, x / (1 + |x| / cap)"
            )
        query, key, value = (backend.convert_to_tensor(x) for x in (query, key, value))
        dtype = jnp.result_type(query, key, value)
        forced: dict[bool | None, Literal["fa3", "xla"] | None]
        forced = {None: implementation, True: "fa3", False: "xla"}
        return dot_product_attention(
            query.astype(dtype),
            key.astype(dtype),
            value.astype(dtype),
            None if bias is None else backend.convert_to_tensor(bias, dtype=dtype),
            None if mask is None else backend.convert_to_tensor(mask, dtype="bool"),
            scale=scale,
            is_causal=is_causal,
            implementation=forced[flash_attention],
        )

    backend.dot_product_attention = dot_product
    try:
        yield
    finally:
        backend.dot_product_attention = replaced


def _backend() -> Any:
    """Keras's module of neural-network functions for JAX."""
    keras = importlib.import_module("keras")
    if keras.backend.backend() != "jax":
        raise RuntimeError(
            f"Keras's backend is {keras.backend.backend()!r}; expected 'jax': set "
            "KERAS_BACKEND=jax before Keras is imported"
        )
    backend = importlib.import_module(BACKEND)
    if not hasattr(backend, "dot_product_attention"):
        raise RuntimeError(f"{BACKEND} has no dot_product_attention; tested with Keras 3.15.1")
    return backend
