#!/usr/bin/env bash
# jax.random draws in the dtype it is asked for: in narrow dtypes the samples are biased, and one
# distribution is NaN.
#
# Versions: jax and jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6; CPU.
# Expected: jax.random.normal(key, shape, dtype) is the normal distribution rounded to dtype, as is
#   jax.random.normal(key, shape).astype(dtype).
# Seen: the uniform variate below it has only the mantissa bits of the dtype, 2**mantissa values. So
#   normal has 8 distinct values in e4m3fn and 128 in bfloat16 (float32 rounded to bfloat16: nearly
#   three thousand), no bfloat16 sample is beyond 2.9, and the mean is below zero: -0.14 in e4m3fn
#   and -0.011 in bfloat16, five standard errors of 200000 samples. truncated_normal in e4m3fn is
#   NaN everywhere, although [-2, 2] fits. categorical takes its Gumbel noise in the dtype of the
#   logits: of 64 equal e4m3fn logits the first index gets an eighth of all draws, eight times its
#   share, because equal maxima go to the lower index.
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

key = jax.random.key(0)
count = 200_000
distinct, extreme, mean = {}, {}, {}
for dtype in ("float8_e5m2", "float8_e4m3fn", "bfloat16", "float16"):
    drawn = np.asarray(jax.random.normal(key, (count,), dtype)).astype(np.float64)
    rounded = np.asarray(jax.random.normal(key, (count,)).astype(dtype)).astype(np.float64)
    distinct[dtype] = len(np.unique(drawn))
    extreme[dtype], mean[dtype] = abs(drawn).max(), drawn.mean()
    for name, x in (("drawn in it", drawn), ("float32 rounded", rounded)):
        print(f"{dtype:14} {name:16} {len(np.unique(x)):5} values, mean {x.mean():+.4f}, "
              f"largest {abs(x).max():.2f}")
    assert abs(rounded.mean()) < 4 / count**0.5  # the generator itself is sound
assert distinct == {"float8_e5m2": 4, "float8_e4m3fn": 8, "bfloat16": 128, "float16": 1024}
assert extreme["bfloat16"] < 2.9 and mean["bfloat16"] < -4 / count**0.5
assert mean["float8_e4m3fn"] < -0.1

truncated = jax.random.truncated_normal(key, -2.0, 2.0, (1000,), jnp.float8_e4m3fn)
nan = int(np.isnan(np.asarray(truncated, np.float32)).sum())
print(f"truncated_normal in float8_e4m3fn: {nan} of 1000 are NaN")
assert nan == 1000

share = {}
for dtype in ("float8_e4m3fn", "float32"):
    draws = jax.random.categorical(key, jnp.zeros(64, dtype), shape=(20_000,))
    share[dtype] = float((draws == 0).mean()) * 64
    print(f"categorical, 64 equal logits in {dtype}: index 0 gets {share[dtype]:.2f} of its share")
assert share["float8_e4m3fn"] > 6 and 0.8 < share["float32"] < 1.2
PYTHON
