"""Score and mask functions of `jax_fa3.flex_attention`."""

from jax_fa3.flex.library import (
    and_masks,
    causal_mask,
    generate_alibi_bias,
    generate_doc_mask_mod,
    generate_prefix_lm_mask,
    generate_relative_position_bias,
    generate_sliding_window,
    generate_t5_bias,
    generate_tanh_softcap,
    noop_mask,
    or_masks,
    t5_bucket,
)

__all__ = [
    "and_masks",
    "causal_mask",
    "generate_alibi_bias",
    "generate_doc_mask_mod",
    "generate_prefix_lm_mask",
    "generate_relative_position_bias",
    "generate_sliding_window",
    "generate_t5_bias",
    "generate_tanh_softcap",
    "noop_mask",
    "or_masks",
    "t5_bucket",
]
