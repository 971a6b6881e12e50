#!/usr/bin/env bash
# The gradient of block-scaled quantization is NaN as soon as its scale passes through e8m0fnu.
#
# Versions: jax and jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6; CPU.
# Expected: the largest magnitude of a block, converted to e8m0fnu, is its scale: a power of two.
#   Scaling down and up again has the gradient 1, because the cotangents of the two uses of the
#   scale cancel, as they do without the conversion.
# Seen: the cotangent of an e8m0fnu value is e8m0fnu, a dtype with neither sign nor zero; 0 and
#   negative numbers become NaN in it. So the gradient is NaN, while the forward pass is exact: in
#   eager mode at every element; under jit at the largest of each block only, because XLA turns the
#   product of the cotangent and the mask of the maximum into a select. stop_gradient on the scale
#   repairs it, and so does ceil, which cuts the path before a cotangent gets there: whether a
#   recipe fails depends on who rounds to the power of two. The missing zero has two values
#   elsewhere: jnp.zeros and jnp.pad give NaN, np.zeros gives 2**-127, from bytes of zero.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.4.6 scipy==1.17.1 opt_einsum==3.4.0
JAX_PLATFORMS=cpu venv/bin/python - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

e8m0 = jnp.float8_e8m0fnu


def scaled(x, recipe):
    """x in blocks of four, scaled down and up."""
    blocks = x.reshape(-1, 4)
    scale = abs(blocks).max(1, keepdims=True)
    if "ceil" in recipe:
        scale = jnp.exp2(jnp.ceil(jnp.log2(scale)))
    if "e8m0fnu" in recipe:
        scale = scale.astype(e8m0).astype(jnp.float32)
    if "stop_gradient" in recipe:
        scale = jax.lax.stop_gradient(scale)
    return (blocks / scale * scale).reshape(x.shape)


x = jnp.array([1.5, -4, 2, 0.5, -0.25, 0.75, 8, 1])
largest = np.array([0, 1, 0, 0, 0, 0, 1, 0], bool)
assert (scaled(x, "e8m0fnu") == x).all()
for recipe in ("float32", "e8m0fnu", "e8m0fnu, stop_gradient", "ceil, e8m0fnu"):
    derivative = jax.grad(lambda x: scaled(x, recipe).sum())  # noqa: B023
    eager, jitted = np.asarray(derivative(x)), np.asarray(jax.jit(derivative)(x))
    print(f"scale: {recipe}: gradient {eager} eager, {jitted} jit")
    fails = recipe == "e8m0fnu"
    for gradient, nan in ((eager, np.full(8, fails)), (jitted, largest & fails)):
        assert (np.isnan(gradient) == nan).all() and (gradient[~nan] == 1).all()

zeros = {
    "jnp.zeros": jnp.zeros(1, e8m0),
    "np.zeros": np.zeros(1, e8m0),
    "jnp.pad of 1": jnp.pad(jnp.ones(1, e8m0), (1, 0))[:1],
}
for name, value in zeros.items():
    print(f"{name}: {float(value[0])}")
assert np.isnan(float(zeros["jnp.zeros"][0])) and np.isnan(float(zeros["jnp.pad of 1"][0]))
assert float(zeros["np.zeros"][0]) == 2.0**-127
PYTHON
