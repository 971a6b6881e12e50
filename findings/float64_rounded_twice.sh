#!/usr/bin/env bash
# numpy and XLA round float64 differently, and which of them is wrong depends on the dtype.
#
# Versions: jax and jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6; CPU.
# Expected: a conversion is rounded once, to nearest. A float64 that lies above the middle of two
#   neighbors by less than float32 can tell becomes the upper one.
# Seen: whoever goes through float32 lands on the middle first, then on the even neighbor below.
#                  float8_e4m3fn   bfloat16   float16
#     numpy        lower           lower      upper     (ml_dtypes goes through float32)
#     XLA CPU      upper           lower      lower     (float16 and bfloat16 go through float32)
#   At the end of the range this decides about NaN: 464.0000000001 is 448 in numpy and NaN in XLA.
#   A reference in float64 that is quantized by numpy so differs from the same program under jit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.4.6 scipy==1.17.1 opt_einsum==3.4.0
JAX_PLATFORMS=cpu JAX_ENABLE_X64=1 venv/bin/python - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np


def convert(value, dtype):
    x = np.array([value], np.float64)
    by_numpy = x.astype(jnp.dtype(dtype))
    by_xla = np.asarray(jax.jit(lambda a: a.astype(dtype))(x))
    return [float(y.astype(np.float64)[0]) for y in (by_numpy, by_xla)]


seen = {}
for dtype, mantissa in (("float8_e4m3fn", 3), ("bfloat16", 7), ("float16", 10)):
    lower, upper = 1.0, 1 + 2.0**-mantissa
    value = (lower + upper) / 2 + 2.0**-40
    sides = []
    for result in convert(value, dtype):
        assert result in (lower, upper)
        sides.append("upper" if result == upper else "lower")
    print(f"{dtype:14} numpy: {sides[0]}, XLA CPU: {sides[1]}")
    seen[dtype] = tuple(sides)
end = convert(464.0000000001, "float8_e4m3fn")
print(f"464.0000000001 in float8_e4m3fn: numpy {end[0]}, XLA CPU {end[1]}")
assert seen == {
    "float8_e4m3fn": ("lower", "upper"),
    "bfloat16": ("lower", "lower"),
    "float16": ("upper", "lower"),
}
assert end[0] == 448 and np.isnan(end[1])
PYTHON
