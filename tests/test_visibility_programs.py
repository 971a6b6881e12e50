"""How often a model's program makes its table: compiled for an H200 where JAX's CUDA plugin is
installed, which needs no GPU; lowered for CUDA where not."""

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3
from jax_fa3 import native
from test_cpp import COMPILER, DECODING, ROOT, ffi_headers
from test_lowering import custom_calls

LAYERS = 8
TARGETS = ("jax_fa3_visibility", "jax_fa3_forward", "jax_fa3_backward")
NAMED = jax.checkpoint_policies.save_only_these_names("context")
TARGET = """
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


def loss(direct, scanned, policy, x, weights, ids):
    """Of a model whose layers are rematerialised; each makes its own table, or all have one."""
    told = dict(query_segment_ids=ids)
    if not direct:
        told = dict(visibility=jax_fa3.make_visibility(ids))

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(x, weight):
        out = jax_fa3.dot_product_attention(x @ weight, x, x, is_causal=True, **told)
        return x + out, None

    if scanned:
        x, _ = jax.lax.scan(layer, x, weights)
    else:
        for weight in weights:
            x, _ = layer(x, weight)
    return x.astype(jnp.float32).sum()


def traced(direct, scanned, policy, sharding=None):
    types = (((1, 512, 4, 64), "bfloat16"), ((LAYERS, 64, 64), "bfloat16"), ((1, 512), "int32"))
    x = [jax.ShapeDtypeStruct(*kind, sharding=sharding) for kind in types]
    gradient = jax.grad(functools.partial(loss, direct, scanned, policy), (0, 1))
    return jax.jit(gradient).trace(*x)


@pytest.mark.parametrize("policy", [None, NAMED], ids=["remat", "named"])
@pytest.mark.parametrize("scanned", [True, False], ids=["scan", "unrolled"])
def test_a_table_made_before_is_made_once(scanned, policy):
    text = traced(False, scanned, policy).lower(lowering_platforms=("cuda",)).as_text()
    assert [target for target, *_ in custom_calls(text)].count("jax_fa3_visibility") == 1


def has_plugin():
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def h200(tmp_path_factory):
    """A sharding on an H200 that is not here, for which the custom calls have handlers."""
    if not has_plugin():
        pytest.skip("JAX's CUDA plugin is not installed")
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    if not native.registrations():
        _register_decoders(tmp_path_factory.mktemp("decode") / "decode.so")
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), P())


def _register_decoders(library):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    flags = ["-std=c++17", "-shared", "-fPIC", "-Isrc", "-isystem", ffi_headers(), "-o", library]
    sources = ("tests/cpp/decode_library.cc", *DECODING)
    subprocess.run([COMPILER, *flags, *sources], cwd=ROOT, check=True)
    loaded = ctypes.CDLL(str(library))
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="CUDA")


@pytest.mark.parametrize(
    ("direct", "scanned", "policy", "tables"),
    [
        (False, True, None, 1),
        (False, True, NAMED, 1),
        (False, False, None, 1),
        (True, True, NAMED, 1),  # XLA takes it out of the loops
        (True, False, NAMED, 1),
        (True, True, None, 2),  # one for each of the loops, forward and backward
    ],
)
def test_compiled_for_an_h200(h200, direct, scanned, policy, tables):
    text = traced(direct, scanned, policy, h200).lower().compile().as_text()
    counts = {name: len(re.findall(f'custom_call_target="{name}"', text)) for name in TARGETS}
    assert counts["jax_fa3_visibility"] == tables
    assert counts["jax_fa3_backward"] == (1 if scanned else LAYERS)
