#!/usr/bin/env bash
# XLA for GPUs removes the rounding to float8 from a jitted program that converts back, even through
# a bitcast to bytes; XLA for CPUs keeps the rounding, so a quantization recipe that passes its
# tests on a CPU does nothing on a GPU.
#
# Versions: jax, jaxlib, jax-cuda13-plugin and jax-cuda13-pjrt 0.10.2 and 0.12.0.1; compiled for an
#   H200 without a GPU.
# Expected: x.astype(float8).astype(float32) rounds x on every platform, and makes NaN of an element
#   beyond the range of float8_e4m3fn, as the same line does without jit.
# Seen: the compiled GPU program contains no narrow type and returns x. The same happens to
#   float8_e5m2, float8_e8m0fnu, float4_e2m1fn and bfloat16; to rounding with a measured scale and a
#   clip; before a matrix product and before a maximum; and to a conversion to uint8 and back by
#   bitcast_convert_type. int8 keeps its rounding. The rounding also stays if a transpose, a slice
#   or optimization_barrier is between the two conversions, or if the narrow array has a second use:
#   returning the array for inspection brings the rounding back. --xla_allow_excess_precision=false
#   keeps all of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >program.py <<'PYTHON'
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

H200 = """
  gpu_device_info {
    threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
    shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
    fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
    block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
    clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
    cuda_compute_capability { major: 9 minor: 0 }
    registers_per_core_limit: 65536 registers_per_block_limit: 65536
  }
  platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 13 }
  device_description_str: "NVIDIA H200"
"""
topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
gpu = NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())
keeps_all = "keeps" in sys.argv
e4m3 = jnp.float8_e4m3fn


def there_and_back(x, dtype=e4m3):
    return x.astype(dtype).astype(x.dtype)


def measured(x):
    scale = abs(x).max() / 448
    return there_and_back(jnp.clip(x / scale, -448, 448)) * scale


def by_bitcast(x):
    codes = lax.bitcast_convert_type(x.astype(e4m3), jnp.uint8)
    return lax.bitcast_convert_type(codes, e4m3).astype(x.dtype)


def product(x):
    square = there_and_back(x).reshape(32, 32)
    return square @ square.T


removed = {
    "float8_e4m3fn": there_and_back,
    "float8_e5m2": lambda x: there_and_back(x, jnp.float8_e5m2),
    "float8_e8m0fnu": lambda x: there_and_back(x, jnp.float8_e8m0fnu),
    "float4_e2m1fn": lambda x: there_and_back(x, jnp.float4_e2m1fn),
    "bfloat16": lambda x: there_and_back(x, jnp.bfloat16),
    "measured scale": measured,
    "bitcast to bytes": by_bitcast,
    "before a product": product,
    "before a maximum": lambda x: there_and_back(x).max(),
}
kept = {
    "int8": lambda x: there_and_back(x, jnp.int8),
    "transposed": lambda x: x.astype(e4m3).reshape(32, 32).T.astype(x.dtype),
    "sliced": lambda x: x.astype(e4m3)[:100].astype(x.dtype),
    "barrier": lambda x: lax.optimization_barrier(x.astype(e4m3)).astype(x.dtype),
    "returned too": lambda x: (x.astype(e4m3), there_and_back(x)),
}
x = jnp.asarray(np.random.default_rng(0).normal(size=1024) * 400, jnp.float32)
print("jax", jax.__version__, "keeps all" if keeps_all else "")
for name, function in (removed | kept).items():
    for_gpu = jax.jit(function, in_shardings=gpu, out_shardings=gpu)
    compiled = for_gpu.lower(jax.ShapeDtypeStruct(x.shape, x.dtype)).compile().as_text()
    is_narrow = re.search(r"\b(f8e|f4e|bf16|s8)\w*\[", compiled) is not None
    on_cpu = zip(jax.tree.leaves(function(x)), jax.tree.leaves(jax.jit(function)(x)), strict=True)
    is_same = all(np.allclose(*(np.float32(y) for y in pair), equal_nan=True) for pair in on_cpu)
    print(f"{name:16} GPU {'rounds' if is_narrow else 'does not round'}, "
          f"CPU {'rounds' if is_same else 'does not round'}")
    assert is_narrow == (keeps_all or name in kept) and is_same
assert jnp.isnan(jax.jit(there_and_back)(jnp.float32(1000)))  # on the CPU
PYTHON
for version in 0.10.2 0.12.0.1; do
  "${PYTHON:-python3.12}" -m venv "$version"
  "$version/bin/pip" install -q --disable-pip-version-check "jax==$version" "jaxlib==$version"
  "$version/bin/pip" install -q --disable-pip-version-check --no-deps \
    "jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version"
  export JAX_PLATFORMS=cpu
  "$version/bin/python" program.py 2>log || { cat log; exit 1; }
  XLA_FLAGS=--xla_allow_excess_precision=false "$version/bin/python" program.py keeps 2>log ||
    { cat log; exit 1; }
done
