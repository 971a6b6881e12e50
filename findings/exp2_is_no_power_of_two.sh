#!/usr/bin/env bash
# jnp.exp2 of an integer is rarely a power of two, and floor(jnp.log2(x)) is too small by one for
# some powers of two: a common recipe for block scales then makes a block's largest element NaN.
#
# Versions: jax and jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6 (0.11.2 and 0.12.0.1 give the same
#   float32 figures); CPU.
# Expected: exp2(k) == 2**k for each integer k in range, and floor(log2(2**k)) == k, as in numpy and
#   as with jnp.power(2, k) and jnp.frexp.
# Seen: JAX lowers exp2 to exp(x * log(2)) and log2 to log(x) / log(2), on every platform, with
#   log(2) rounded to the dtype of x. In float32, exp2 misses 221 of 254 powers of two, and
#   floor(log2(2**k)) is k - 1 for 23 of them, first for 2**13. In bfloat16, exp2 gives 3.98 for 4,
#   127 for 128 and 252 for 256, and the ALiBi slope 2**-8 is 1.6 % too large. A shared exponent of
#   a block, scale = exp2(floor(log2(max)) - 8), scales 2**13 to 512 instead of 256, which
#   float8_e4m3fn rounds to NaN; the same happens for each of these powers.
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

k = np.arange(-126, 128)
powers = (2.0**k).astype(np.float32)

assert (np.exp2(k.astype(np.float32)) == powers).all()
assert (np.floor(np.log2(powers)) == k).all()
assert (jnp.power(2.0, jnp.asarray(k, jnp.float32)) == powers).all()
assert (jnp.frexp(powers)[1] - 1 == k).all()

for transform in (lambda f: f, jax.jit):
    off = transform(jnp.exp2)(jnp.asarray(k, jnp.float32)) != powers
    low = k - np.asarray(jnp.floor(transform(jnp.log2)(powers)), int)
    print(f"float32: exp2 off for {off.sum()} of {k.size}, floor(log2) one too small for "
          f"{low.sum()}, the first 2**{k[(low > 0) & (k > 0)][0]}")
    assert off.sum() == 221 and low.sum() == 23 and set(low) == {0, 1}
    assert k[(low > 0) & (k > 0)][0] == 13

for dtype, expected in (
    ("bfloat16", [1, 2, 3.984375, 8, 15.875, 31.625, 63.75, 127, 252]),
    ("float16", [1, 2, 4, 8.0078125, 16.015625, 32.03125, 64.0625, 127.9375, 256.5]),
):
    got = [float(x) for x in jnp.exp2(jnp.arange(9).astype(dtype))]
    print(f"{dtype}: exp2 of 0 to 8: {got}")
    assert got == expected
slope = float(jnp.exp2(jnp.bfloat16(-8)))
print(f"bfloat16: exp2(-8) is {slope * 256:.4f} of 2**-8")
assert 1.015 < slope * 256 < 1.017

scale = jnp.exp2(jnp.floor(jnp.log2(powers)) - 8)
normal = powers >= 2.0**-100  # above the numbers that XLA flushes to zero
scaled = jnp.asarray(powers)[normal] / scale[normal]
rounded = np.asarray(scaled.astype(jnp.float8_e4m3fn), np.float32)
print(f"2**k over its scale: {scaled.min():.2f} to {scaled.max():.2f}; "
      f"{np.isnan(rounded).sum()} of them NaN in float8_e4m3fn")
assert np.isnan(rounded).sum() == (low[normal] > 0).sum() > 20

for function, operation in ((jnp.exp2, "stablehlo.exponential"), (jnp.log2, "stablehlo.log")):
    traced = jax.jit(function).trace(jnp.ones(1, jnp.bfloat16))
    assert operation in traced.lower(lowering_platforms=("cuda",)).as_text()
PYTHON
