#!/usr/bin/env bash
# On CPUs jnp.max and jnp.min of 4096 or more float32 values ignore NaN; under jit, so do relu and
# maximum in front of a sum.
#
# Versions: jax and jaxlib 0.10.2 and 0.12.0.1 (0.11.2 behaves the same); x86-64 CPU.
# Expected: NaN propagates, as it does in numpy and in smaller arrays, and jit does not change
#   whether a result is NaN.
# Seen: a float32 maximum or minimum over fewer than 4096 elements is NaN if one element is NaN.
#   From 4096 elements on XLA hands the reduction to another library (`ynn_fusion` in the compiled
#   program), where NaN loses against any number at every position; a row of nothing but NaN has the
#   maximum -inf. jnp.linalg.norm(x, inf), jnp.ptp and a test for a finite largest gradient follow;
#   cummax, argmax, logsumexp and sort see the NaN. In bfloat16 and float16 the sign of the NaN
#   decides: a positive NaN is the maximum and never the minimum; a negative NaN, the result of 0 /
#   0 on x86, is the minimum and never the maximum. Elementwise operations enter such a fusion too:
#   jit(jnp.maximum(x, 0).sum()) is finite if the same two calls without jit give NaN, while
#   jnp.clip and jnp.where keep the NaN.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >program.py <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np


def with_nan(count, place, dtype="float32", sign=1):
    x = np.ones(count, jnp.dtype(dtype))
    x[place] = np.copysign(np.float32(np.nan), sign)
    return jnp.asarray(x)


def is_nan(x):
    return bool(np.isnan(np.float32(x)))


print("jax", jax.__version__)
for dtype in ("float32", "bfloat16", "float16"):
    for count in (4095, 4096, 65536):
        for sign in (1, -1):
            arrays = [with_nan(count, place, dtype, sign) for place in (0, count // 3, count - 1)]
            largest, smallest = ({is_nan(f(x)) for x in arrays} for f in (jnp.max, jnp.min))
            print(f"{count} {dtype}, NaN of sign {sign:+}: max NaN {largest}, min NaN {smallest}")
            half = dtype != "float32"
            assert largest == {count < 4096 or half and sign > 0}
            assert smallest == {count < 4096 or half and sign < 0}

quotient = jnp.zeros(4096, jnp.bfloat16) / 0
print(f"max of 4096 bfloat16 0 / 0: {quotient.max()}; of one: {quotient[:1].max()}")
assert quotient.max() == -jnp.inf and is_nan(quotient[:1].max())

rows = jnp.ones((8, 1024)).at[3].set(jnp.nan).max(1)
print(f"largest of a row of NaN, among 8 x 1024: {rows[3]}; numpy: {np.full(9, np.nan).max()}")
assert rows[3] == -jnp.inf and (rows[:3] == 1).all()

gradient = with_nan(4096, 100)
seen = {
    "isfinite(abs(x).max())": jnp.isfinite(jnp.abs(gradient).max()),
    "isfinite(norm(x, inf))": jnp.isfinite(jnp.linalg.norm(gradient, jnp.inf)),
    "ptp(x) == 0": jnp.ptp(gradient) == 0,
    "isfinite(x).all()": jnp.isfinite(gradient).all(),
}
for name, value in seen.items():
    print(f"{name}: {bool(value)}")
assert [bool(x) for x in seen.values()] == [True, True, True, False]

others = {
    "cummax": lambda x: jax.lax.cummax(x)[-1],
    "logsumexp": jax.nn.logsumexp,
    "sort": lambda x: jnp.sort(x)[-1],
}
assert all(is_nan(function(gradient)) for function in others.values())
assert jnp.argmax(gradient) == 100

for name, function, drops in (
    ("relu", jax.nn.relu, True),
    ("maximum", lambda x: jnp.maximum(x, 0), True),
    ("minimum", lambda x: jnp.minimum(x, 5), True),
    ("clip", lambda x: jnp.clip(x, 0, 5), False),
    ("where", lambda x: jnp.where(x < 0, 0, x), False),
):
    together = jax.jit(lambda x: function(x).sum())  # noqa: B023
    print(f"{name}: sum {function(gradient).sum()} eager, {together(gradient)} under jit")
    assert is_nan(function(gradient).sum()) and is_nan(together(gradient)) != drops

program = jax.jit(jnp.max).lower(gradient).compile().as_text()
assert "ynn_fusion" in program and "ynn_fusion" not in (
    jax.jit(jnp.max).lower(with_nan(4095, 0)).compile().as_text()
)
PYTHON
for version in 0.10.2 0.12.0.1; do
  "${PYTHON:-python3.12}" -m venv "$version"
  "$version/bin/pip" install -q --disable-pip-version-check "jax==$version" "jaxlib==$version"
  JAX_PLATFORMS=cpu "$version/bin/python" program.py
done
