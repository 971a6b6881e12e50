"""Programs compiled for H200s that are not here, which JAX's CUDA plugin does without a GPU.

`make test` has the plugin in the environment's folder cuda, without CUDA.
"""

import ctypes
import functools
import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies

from jax_fa3 import native
from test_cpp import COMPILER, DECODING, ROOT, ffi_headers

TARGETS = ("jax_fa3_visibility", "jax_fa3_forward", "jax_fa3_backward")
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


def devices(count):
    """So many H200s of one host, for which the custom calls have handlers; skips the test where
    JAX's CUDA plugin is not installed."""
    if not _has_plugin():
        pytest.skip("JAX's CUDA plugin is not installed")
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology=f"1x1x{count}"
    )
    if not native.registrations():
        _register_decoders()
    return topology.devices


def _has_plugin():
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _register_decoders():
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "decode.so"
        flags = ["-std=c++17", "-shared", "-fPIC", "-Isrc", "-isystem", ffi_headers()]
        sources = ("tests/cpp/decode_library.cc", *DECODING)
        subprocess.run([COMPILER, *flags, "-o", library, *sources], cwd=ROOT, check=True)
        loaded = ctypes.CDLL(str(library))
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="CUDA")
