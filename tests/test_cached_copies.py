"""Where XLA copies a cache, and where it must not: compiled for an H200 where JAX's CUDA plugin is
installed, which needs no GPU; for the CPU, through XLA's own scatter, everywhere."""

import ctypes
import functools
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import h200
from jax_fa3 import cached_attention, native
from test_cpp import COMPILER, ROOT, ffi_headers

LAYERS, PAGES, SLOTS, HEADS, DIM = 3, 512, 16, 2, 64
CACHE = (PAGES, SLOTS, HEADS, DIM)
TABLES = np.arange(2 * 8).reshape(2, 8).astype(np.int32)
CALLS = ("jax_fa3_append", "jax_fa3_forward_cached")


def attend(caches, lengths, x, new_lengths=None, shift=0):
    """One layer's step: (output, caches)."""
    new = x[:, :, :HEADS]
    out, *caches = cached_attention(
        x, *caches, new, new,
        cache_lengths=lengths, block_tables=TABLES + shift, new_lengths=new_lengths,
    )  # fmt: skip
    return out, caches


def step(caches, lengths, x):
    out, caches = attend(caches, lengths, x)
    return out, caches


def twice(caches, lengths, x):
    x, caches = attend(caches, lengths, x)
    return jax.jit(attend)(caches, lengths + 1, x)


def layers(caches, lengths, x):
    """A pair of caches for each layer."""
    for i, of_layer in enumerate(caches):
        x, caches[i] = attend(of_layer, lengths, x)
    return x, caches


def over_tokens(caches, lengths, x):
    def body(carry, _):
        caches, lengths, x = carry
        x, caches = attend(caches, lengths, x)
        return (caches, lengths + 1, x), None

    (caches, _, x), _ = jax.lax.scan(body, (caches, lengths, x), length=4)
    return x, caches


def over_layers(caches, lengths, x):
    """The pages of all layers in one array, whose tables are shifted."""

    def body(carry, layer):
        caches, x = carry
        x, caches = attend(caches, lengths, x, shift=layer * (PAGES // LAYERS))
        return (caches, x), None

    (caches, x), _ = jax.lax.scan(body, (caches, x), jnp.arange(LAYERS))
    return x, caches


def switched(caches, lengths, x):
    """Every branch appends."""
    branches = [functools.partial(attend, shift=shift) for shift in (0, 1)]
    return jax.lax.switch(lengths[0] % 2, branches, caches, lengths, x)


def no_rows(caches, lengths, x):
    """A branch that leaves the cache alone, as lengths: in place on every JAX."""
    return attend(caches, lengths, x, new_lengths=jnp.where(lengths > 3, 1, 0))


def branched(caches, lengths, x):
    """One branch leaves the cache alone."""
    return jax.lax.cond(
        lengths[0] > 3, attend, lambda caches, lengths, x: (x, caches), caches, lengths, x
    )


def as_xs_and_ys(caches, lengths, x):
    """Caches stacked by layer and passed to a scan's body, as nnx.scan's cache axis does."""

    def body(x, caches):
        return attend(caches, lengths, x)

    return jax.lax.scan(body, x, caches)


# The XLA of JAX 0.10 copies a cache that goes through a branch.
BRANCHES = (branched, switched)
BRANCHES_COPY = jax.__version_info__ < (0, 11)
IN_PLACE = (step, twice, layers, over_tokens, over_layers, no_rows)
IN_PLACE += () if BRANCHES_COPY else BRANCHES
COPYING = (as_xs_and_ys,) + (BRANCHES if BRANCHES_COPY else ())


def arguments(program, dtype, sharding=None):
    shape = (LAYERS, *CACHE) if program is as_xs_and_ys else CACHE
    cache = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    caches = [[cache, cache] for _ in range(LAYERS)] if program is layers else [cache, cache]
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=sharding)
    return caches, lengths, jax.ShapeDtypeStruct((2, 1, 4, DIM), dtype, sharding=sharding)


def nbytes(caches):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))


@pytest.fixture(scope="module")
def an_h200(tmp_path_factory):
    """A sharding on an H200 that is not here, for which the custom calls have handlers."""
    devices = np.array(h200.devices(1))
    if not set(CALLS) <= native.registrations().keys():
        _register_stubs(tmp_path_factory.mktemp("stub") / "stub.so")
    return NamedSharding(Mesh(devices, ("x",)), P())


def _register_stubs(library):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    flags = ["-std=c++17", "-shared", "-fPIC", "-isystem", ffi_headers(), "-o", library]
    source = "tests/cpp/stub_library.cc"
    subprocess.run([COMPILER, *flags, source], cwd=ROOT, check=True)
    loaded = ctypes.CDLL(str(library))
    for name in CALLS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(loaded.stub), platform="CUDA")


@pytest.fixture
def plans(monkeypatch):
    plan = dict(workspace_bytes=4096, counters=8)
    monkeypatch.setattr(native, "IMPORT_ERROR", None)
    monkeypatch.setattr(native, "plan_forward_cached", lambda *call: plan)


def copies(text):
    """The copies of whole caches in a compiled program, by shape."""
    found = re.findall(r"= \(?(\w+)\[([\d,]+)\][^=]*? (?:copy|copy-start|fusion)\(", text)
    whole = int(np.prod(CACHE))
    return [shape for _, shape in found if np.prod([int(n) for n in shape.split(",")]) >= whole]


@pytest.mark.parametrize("program", (*IN_PLACE, *COPYING), ids=lambda x: x.__name__)
def test_compiled_for_an_h200(an_h200, plans, program):
    x = arguments(program, "bfloat16", an_h200)
    compiled = jax.jit(program, donate_argnums=0).trace(*x).lower().compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert all(f'custom_call_target="{name}"' in text for name in CALLS)
    is_free = program in IN_PLACE
    assert bool(copies(text)) != is_free
    if is_free:
        assert memory.alias_size_in_bytes >= nbytes(x[0])
        assert memory.temp_size_in_bytes < nbytes(x[0]) / 8


def test_a_cache_that_is_kept_is_copied_for_an_h200(an_h200, plans):
    """Not donated: one copy of each, and the caller's has its bits."""
    x = arguments(step, "bfloat16", an_h200)
    text = jax.jit(step).trace(*x).lower().compile().as_text()
    assert len(copies(text)) == 2


@pytest.mark.parametrize("program", (step, over_tokens), ids=lambda x: x.__name__)
def test_compiled_for_the_cpu(program):
    """In float32: XLA for CPUs converts a whole cache of bfloat16."""
    x = arguments(program, "float32")
    memory = jax.jit(program, donate_argnums=0).lower(*x).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes(x[0])
    assert memory.temp_size_in_bytes < nbytes(x[0]) / 8
