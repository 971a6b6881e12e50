#!/usr/bin/env bash
# With one NaN in an array of bfloat16 or float8, np.sort leaves the array unsorted, np.median
# returns a wrong number and np.unique repeats values; XLA has two other orders.
#
# Versions: numpy 2.4.6, ml_dtypes 0.6.0, jax and jaxlib 0.10.2; CPU.
# Expected: NaN is sorted to the end, and the median of an array with a NaN is NaN, as in float16.
# Seen: with the dtypes of ml_dtypes, np.sort([3, nan, -1, 0, 2, 1]) is [3, nan, -1, 0, 1, 2] for
#   each `kind`; np.argsort and np.unique follow it, and np.median is -0.5. np.max and np.argmax see
#   the NaN. In 1000 random numbers with ten NaN, the other numbers are out of order after np.sort,
#   and np.unique repeats some. jnp.sort puts NaN last, as documented, but puts NaN first in the
#   fnuz dtypes, where lax.top_k puts it last. So the same array has three orders.
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

np.seterr(invalid="ignore")
VALUES = [3, np.nan, -1, 0, 2, 1]


def floats(x):
    return [float(number) for number in np.asarray(x)]


def text(x):
    return " ".join(f"{number:g}" for number in floats(x))


def is_equal(x, y):
    return np.array_equal(floats(x), y, equal_nan=True)


last, unsorted = [-1, 0, 1, 2, 3, np.nan], [3, np.nan, -1, 0, 1, 2]
first = [np.nan, -1, 0, 1, 2, 3]
for dtype, numpy_order, xla_order in (
    ("float16", last, last),
    ("bfloat16", unsorted, last),
    ("float8_e4m3fn", unsorted, last),
    ("float8_e5m2", unsorted, last),
    ("float8_e4m3fnuz", unsorted, first),
    ("float8_e4m3b11fnuz", unsorted, first),
):
    x = np.array(VALUES, jnp.dtype(dtype))
    top, _ = jax.lax.top_k(jnp.asarray(x), 3)
    print(f"{dtype:18} np.sort {text(np.sort(x))} | jnp.sort {text(jnp.sort(x))} | "
          f"top_k {text(top)} | np.median {float(np.median(x)):g}")
    for kind in ("quicksort", "heapsort", "stable"):
        assert is_equal(np.sort(x, kind=kind), numpy_order)
    assert is_equal(np.unique(x), numpy_order) and is_equal(x[np.argsort(x)], numpy_order)
    assert is_equal([np.median(x)], [np.nan if dtype == "float16" else -0.5])
    assert np.isnan(float(np.max(x))) and np.argmax(x) == 1
    assert is_equal(jnp.sort(x), xla_order)
    assert is_equal(top, [3, 2, 1] if xla_order == first else [np.nan, 3, 2])

drawn = np.random.default_rng(0).normal(size=1000).astype(jnp.bfloat16)
drawn[::100] = np.nan
ordered = np.sort(drawn).astype(np.float32)
ordered = ordered[~np.isnan(ordered)]
distinct = np.unique(drawn).size, np.unique(drawn.astype(np.float32)).size
print(f"1000 bfloat16, ten of them NaN: {(np.diff(ordered) < 0).sum()} steps down after np.sort, "
      f"{distinct[0]} values for np.unique, {distinct[1]} in float32")
assert (np.diff(ordered) < 0).any() and distinct[0] > distinct[1]
PYTHON
