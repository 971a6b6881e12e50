#!/usr/bin/env bash
# The gradient of a weight that is quantized once and used 64 times is 16.
#
# Versions: jax and jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6; CPU.
# Expected: loss = sum over n uses of float32(float8(w)); its gradient in w is n. The loss itself is
#   computed in float32 and w is float32, so nothing seems to be added in float8.
# Seen: the cotangent of a float8 value is float8, and the cotangents of its uses are added in
#   float8. In e4m3fn 16 + 1 is a tie between 16 and 18 and goes to 16: the gradient stops at 16 for
#   64 uses and for 1000, without NaN. Python loop and lax.scan, eager and jit do the same. In e5m2
#   it stops at 8. Uses through one broadcast stop elsewhere: there XLA keeps several partial sums
#   in float8, so the value depends on its reduction and not only on the program. Converting back to
#   float32 once, before the uses, gives 64; then the one conversion of the sum gives NaN from 465
#   on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.4.6 scipy==1.17.1 opt_einsum==3.4.0
JAX_PLATFORMS=cpu venv/bin/python - <<'PYTHON'
import math

import jax
import jax.numpy as jnp


def in_loop(w, n, dtype):
    q = w.astype(dtype)
    return sum(q.astype(jnp.float32) for _ in range(n))


def in_scan(w, n, dtype):
    q = w.astype(dtype)
    return jax.lax.scan(lambda s, _: (s + q.astype(jnp.float32), None), 0.0, length=n)[0]


def in_broadcast(w, n, dtype):
    return jnp.broadcast_to(w.astype(dtype), (n,)).astype(jnp.float32).sum()


def converted_once(w, n, dtype):
    q = w.astype(dtype).astype(jnp.float32)
    return sum(q for _ in range(n))


def gradient(function, n, dtype):
    derivative = jax.grad(lambda w: function(w, n, dtype))
    eager, jitted = float(derivative(1.0)), float(jax.jit(derivative)(1.0))
    name = f"{jnp.dtype(dtype).name:14} {function.__name__:15}"
    print(f"{name} {n:5} uses: {eager} eager, {jitted} jit")
    assert eager == jitted or (math.isnan(eager) and math.isnan(jitted)), "eager and jit differ"
    return eager


for function in (in_loop, in_scan):
    assert [gradient(function, n, jnp.float8_e4m3fn) for n in (16, 64, 1000)] == [16, 16, 16]
    assert [gradient(function, n, jnp.float8_e5m2) for n in (8, 64)] == [8, 8]
assert gradient(in_broadcast, 64, jnp.float8_e4m3fn) not in (16, 64)
assert gradient(converted_once, 64, jnp.float8_e4m3fn) == 64
assert gradient(converted_once, 464, jnp.float8_e4m3fn) == 448
assert math.isnan(gradient(converted_once, 465, jnp.float8_e4m3fn))
PYTHON
