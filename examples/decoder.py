"""A small decoder-only Transformer in flax.nnx, to train on text.

Pre-norm blocks of grouped-query attention with rotary positions and a gated MLP. The attention
function is a constructor argument with the signature of `jax.nn.dot_product_attention`, so that one
model can be built on several implementations; what else it should know of a batch, such as where
documents end, is given to the model and passed on. Parameters are float32; `Config.dtype` is what
the matrix products and attention run in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

Attention = Callable[..., jax.Array]


@dataclass(frozen=True)
class Config:
    """The model's sizes; `num_heads_q` is a multiple of `num_heads_kv`.

    `remat` is one of `jax.checkpoint_policies`, or None where nothing is computed twice.
    """

    vocabulary: int
    num_layers: int
    width: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    dtype: jnp.dtype
    remat: Callable[..., bool] | None = None  # what a block keeps for its gradient; None: all


def rotate(x: jax.Array, positions: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary position embedding of x: [batch, seqlen, heads, head_dim], in float32.

    positions: [seqlen], or [batch, seqlen] where they differ between the sequences.
    """
    head_dim = x.shape[3]
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    even, odd = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin], -1).astype(x.dtype)


class SelfAttention(nnx.Module):
    """Causal self-attention; a group of query heads shares one key/value head."""

    def __init__(self, config: Config, attention: Attention, *, rngs: nnx.Rngs):
        def heads(count: int) -> nnx.LinearGeneral:
            shape = (count, config.head_dim)
            return nnx.LinearGeneral(
                config.width, shape, use_bias=False, dtype=config.dtype, rngs=rngs
            )

        self.attention = attention
        self.query = heads(config.num_heads_q)
        self.key = heads(config.num_heads_kv)
        self.value = heads(config.num_heads_kv)
        self.out = nnx.LinearGeneral(
            (config.num_heads_q, config.head_dim), config.width, axis=(-2, -1),
            use_bias=False, dtype=config.dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: jax.Array, positions: jax.Array, masking: dict) -> jax.Array:
        query, key = (rotate(heads(x), positions) for heads in (self.query, self.key))
        return self.out(self.attention(query, key, self.value(x), is_causal=True, **masking))


class Block(nnx.Module):
    """Attention, then a gated MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: Config, attention: Attention, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=config.dtype, rngs=rngs)

        hidden = 3 * config.width
        self.attention_norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.attention = SelfAttention(config, attention, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.gate = linear(config.width, hidden)
        self.up = linear(config.width, hidden)
        self.down = linear(hidden, config.width)

    def __call__(self, x: jax.Array, positions: jax.Array, masking: dict) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), positions, masking)
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Decoder(nnx.Module):
    """Tokens [batch, seqlen] to next-token logits [batch, seqlen, vocabulary] in float32.

    positions: as `rotate` has them, by default 0 to seqlen - 1; masking goes to every attention.
    """

    def __init__(self, config: Config, attention: Attention, *, rngs: nnx.Rngs):
        self.remat = config.remat
        self.embed = nnx.Embed(config.vocabulary, config.width, dtype=config.dtype, rngs=rngs)
        self.blocks = nnx.List(
            [Block(config, attention, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.head = nnx.Linear(config.width, config.vocabulary, dtype=config.dtype, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None, **masking
    ) -> jax.Array:
        if positions is None:
            positions = jnp.arange(tokens.shape[1])
        apply = Block.__call__
        if self.remat is not None:
            apply = nnx.remat(apply, policy=self.remat)
        x = self.embed(tokens)
        for block in self.blocks:
            x = apply(block, x, positions, masking)
        return self.head(self.norm(x)).astype(jnp.float32)
