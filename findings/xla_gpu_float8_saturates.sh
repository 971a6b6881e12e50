#!/usr/bin/env bash
# XLA's conversion to float8 saturates on Hopper GPUs. The same conversion on a CPU, or of a literal
# in the same GPU program, gives NaN or infinity.
#
# Versions: jax, jaxlib, jax-cuda13-plugin and jax-cuda13-pjrt 0.10.2 and 0.12.0.1; compiled for an
#   H200 without a GPU, so the PTX is read and not run.
# Expected: on every platform, as in ml_dtypes and in XLA for CPUs, 1000 is NaN in float8_e4m3fn,
#   whose largest number is 448, and 1e6 is infinity in float8_e5m2.
# Seen: the GPU program converts with cvt.rn.satfinite, which returns the largest number of the
#   dtype, 448 or 57344, for larger numbers and for infinity. The only comparison beside it selects
#   another path for small numbers; no instruction handles large ones. The same holds for bfloat16
#   and float16 inputs. XLA evaluates literals itself, without saturation: in one GPU program, the
#   literal 1000 becomes NaN and an argument of 1000 becomes 448. float8_e4m3fnuz, for which the GPU
#   has no instruction, is compared with its bound. An overflow that a test on a CPU finds as NaN is
#   therefore silent on the GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >program.py <<'PYTHON'
import glob
import os
import re
import shutil
from importlib.metadata import version

dump = "--xla_dump_to=dump"
if version("jaxlib") != "0.10.2":
    dump += " --xla_dump_emitter_re=.*"
os.environ["XLA_FLAGS"] = dump

import jax
import jax.numpy as jnp
import numpy as np
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


def compiled(function, *types):
    """The program for the GPU: its text and its PTX."""
    shutil.rmtree("dump", ignore_errors=True)
    jitted = jax.jit(function, in_shardings=gpu, out_shardings=gpu)
    text = jitted.lower(*types).compile().as_text()
    return text, "".join(open(path).read() for path in glob.glob("dump/*.ptx"))


print("jax", jax.__version__)
for dtype, large, overflow, name in (
    ("float8_e4m3fn", 1000, np.nan, "e4m3x2"),
    ("float8_e5m2", 1e6, np.inf, "e5m2x2"),
):
    beyond = np.array([large, np.inf], np.float32)
    found = np.float32(jnp.asarray(beyond).astype(dtype))
    for on_cpu in (found, np.float32(beyond.astype(jnp.dtype(dtype)))):
        assert np.array_equal(on_cpu, [overflow, overflow], equal_nan=True)
    for source in ("float32", "bfloat16", "float16"):
        x = jax.ShapeDtypeStruct((1024,), source)
        _, ptx = compiled(lambda x: x.astype(dtype), x)  # noqa: B023
        instructions = re.findall(r"cvt\.rn\.(?:satfinite\.)?e\dm\dx2\.\w+", ptx)
        comparisons = re.findall(r"setp\.(\w+)\.\w+\s+%p\d+, %\w+, (\d+)", ptx)
        print(f"{source} to {dtype}: {instructions}, comparisons {comparisons}; CPU {found}")
        assert len(instructions) == 1 and f"satfinite.{name}" in instructions[0]
        assert len(comparisons) == 1 and comparisons[0][0] == "lt"
        bound = np.array(int(comparisons[0][1]), np.uint32 if source != "float16" else np.uint16)
        assert bound.view(np.float32 if source != "float16" else np.float16) < 0.1
    x = jax.ShapeDtypeStruct((), "float32")
    text, ptx = compiled(lambda x: (x.astype(dtype), jnp.float32(large).astype(dtype)), x)
    constants = re.findall(r"f8e\w+\[\] constant\((\S+)\)", text)
    print(f"in one program for {dtype}: argument by satfinite, literal {large} is {constants}")
    assert constants == [str(overflow)] and "satfinite" in ptx

_, ptx = compiled(lambda x: x.astype("float8_e4m3fnuz"), jax.ShapeDtypeStruct((1024,), "float32"))
assert "satfinite" not in ptx and len(re.findall(r"setp\.", ptx)) > 1
PYTHON
export JAX_PLATFORMS=cpu
for version in 0.10.2 0.12.0.1; do
  "${PYTHON:-python3.12}" -m venv "$version"
  "$version/bin/pip" install -q --disable-pip-version-check "jax==$version" "jaxlib==$version"
  "$version/bin/pip" install -q --disable-pip-version-check --no-deps \
    "jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version"
  "$version/bin/python" program.py 2>log || { cat log; exit 1; }
done
