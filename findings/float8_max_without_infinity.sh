#!/usr/bin/env bash
# jax.nn.softmax and jax.ops.segment_max give NaN for every finite input in a float8 dtype that has
# no infinities.
#
# Versions: jax and jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6; CPU.
# Expected: the neutral element of a maximum is the lowest number of the dtype, so the maximum of 1,
#   2, 4 is 4 in each dtype, and a softmax of finite numbers is finite.
# Seen: softmax, log_softmax, segment_max and segment_min start from -inf (+inf). A conversion of an
#   infinity to e4m3fn or to a "fnuz" dtype gives NaN, and a maximum with NaN is NaN. jnp.max,
#   lax.cummax and logsumexp of the same arrays are right, so a model fails in one function and not
#   in its twin. e8m0fnu, the dtype of block scales, fails in jnp.max too: it has no zero and no
#   sign, and its maximum starts from a value that it cannot hold. e5m2, e4m3 (IEEE) and e3m4 have
#   infinities and are right; so is e2m1fn, which has neither and saturates.
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

functions = {
    "max": jnp.max,
    "cummax": lambda x: jax.lax.cummax(x)[-1],
    "logsumexp": jax.nn.logsumexp,
    "segment_max": lambda x: jax.ops.segment_max(x, jnp.zeros(3, jnp.int32), 1),
    "segment_min": lambda x: jax.ops.segment_min(x, jnp.zeros(3, jnp.int32), 1),
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
}
starts_at_infinity = {"segment_max", "segment_min", "softmax", "log_softmax"}
expected = {  # dtype: functions that return NaN for [1, 2, 4]
    "float8_e4m3fn": starts_at_infinity,
    "float8_e4m3fnuz": starts_at_infinity,
    "float8_e5m2fnuz": starts_at_infinity,
    "float8_e8m0fnu": starts_at_infinity | {"max", "cummax"},
    "float8_e5m2": set(),
    "float8_e4m3": set(),
    "float8_e3m4": set(),
    "float4_e2m1fn": set(),
}
changed = []
for dtype, nan_expected in expected.items():
    x = jnp.array([1, 2, 4], dtype)
    assert np.array_equal(np.asarray(x, np.float32), [1, 2, 4])
    nan = set()
    for name, function in functions.items():
        if dtype == "float8_e8m0fnu" and name == "logsumexp":
            continue  # needs subtraction, which a dtype of powers of two does not have
        if np.isnan(np.asarray(function(x), np.float32)).any():
            nan.add(name)
    print(f"{dtype:20} NaN from: {', '.join(sorted(nan)) or 'none'}")
    if nan != nan_expected:
        changed.append(dtype)
assert not changed, f"behavior changed: {changed}"
PYTHON
