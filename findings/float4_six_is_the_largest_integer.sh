#!/usr/bin/env bash
# XLA converts the float4_e2m1fn number 6 to the largest integer there is.
#
# Versions: jax and jaxlib 0.10.2 and 0.12.0.1; CPU.
# Expected: 6 is the largest number of float4_e2m1fn, a dtype without infinity and NaN. Its
#   conversion to an integer is 6, as with ml_dtypes, and as with a conversion to bfloat16 in
#   between.
# Seen: jnp.float4_e2m1fn(6) becomes 2147483647 in int32, 127 in int8, 255 in uint8 and 7 in int4,
#   and -6 becomes the smallest integer, with and without jit. All other numbers convert correctly,
#   so a table that is indexed by the elements of a scaled block fails only for the block's largest
#   element. In 0.10.2, jnp.isinf(6) and jnp.isfinite(6) are both True. The 8-bit dtypes convert
#   correctly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >program.py <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -4, -6], np.float32)
four = jnp.asarray(numbers).astype(jnp.float4_e2m1fn)
assert (np.asarray(four.astype(jnp.float32)) == numbers).all()
assert (np.asarray(four).astype(np.int32) == numbers.astype(np.int32)).all()

print("jax", jax.__version__)
for dtype in ("int4", "int8", "int16", "int32", "uint8", "uint32"):
    ends = jnp.iinfo(dtype)
    direct = [f(four) for f in (lambda x: x.astype(dtype), jax.jit(lambda x: x.astype(dtype)))]
    indirect = np.asarray(four.astype(jnp.bfloat16).astype(dtype), np.int64)
    for converted in direct:
        converted = np.asarray(converted, np.int64)
        print(f"6 and -6 in {dtype}: {converted[[7, 9]]}, by way of bfloat16 {indirect[[7, 9]]}")
        assert converted[7] == ends.max and indirect[7] == 6
        if ends.min < 0:
            assert converted[9] == ends.min and indirect[9] == -6
        assert (converted[:7] == indirect[:7]).all()

table = jnp.arange(7) * 10
found = table.at[four[6:8].astype(jnp.int32)].get(mode="fill")
print("a table of seven entries at 4 and 6:", found)
print("isinf, isfinite of 6:", jnp.isinf(four[7]), jnp.isfinite(four[7]))
assert bool(jnp.isinf(four[7])) == (jax.__version__ == "0.10.2") and jnp.isfinite(four[7])

for dtype in ("float8_e4m3fn", "float8_e5m2", "float8_e3m4", "float8_e4m3fnuz"):
    largest = jnp.finfo(dtype).max
    assert int(jnp.asarray(largest, dtype).astype(jnp.int32)) == int(largest)
PYTHON
for version in 0.10.2 0.12.0.1; do
  "${PYTHON:-python3.12}" -m venv "$version"
  "$version/bin/pip" install -q --disable-pip-version-check "jax==$version" "jaxlib==$version"
  JAX_PLATFORMS=cpu "$version/bin/python" program.py
done
