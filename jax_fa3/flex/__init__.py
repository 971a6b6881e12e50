"""Score and mask functions of `jax_fa3.flex_attention`."""
