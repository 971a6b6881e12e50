"""The kernels as an Implementation under test, and the problems that only they are given.

Before each run the memory that the results will be put into is filled with NaN, so that an element
which no kernel writes shows.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np

import cached
import contract
from cases import CASES, HEAD_DIMS, Case

LARGEST_BLOCK = 1 << 26  # bytes
COPIES = 3


@functools.cache
def poison():
    """Bytes that are NaN in every floating dtype."""
    return np.full(LARGEST_BLOCK, 0xFF, np.uint8)


def bits(tree):
    """The bytes of every array."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def spoil_free_memory(sizes):
    """Fill with NaN the free blocks that allocations of these sizes in bytes will get.

    The allocator takes the smallest free block that fits, so several blocks of each size, freed
    together, leave nothing but spoilt memory for the results.
    """
    sizes = [min(size, LARGEST_BLOCK) for size in sizes if size]
    blocks = [jax.device_put(poison()[:size]) for size in sizes for _ in range(COPIES)]
    for block in jax.block_until_ready(blocks):
        block.delete()


class Kernels(contract.Implementation):
    """implementation="fa3", with spoilt memory under every result and every temporary."""

    def prepare(self, executable):
        results = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(executable.out_info)]
        spoil_free_memory([*results, executable.memory_analysis().temp_size_in_bytes])


KERNELS = Kernels("fa3")


def unique(cases):
    return list({case.name: case for case in cases}.values())


def for_kernels(case):
    """The same problem in a dtype that has kernels."""
    return dataclasses.replace(case, dtype="bfloat16") if case.dtype == "float32" else case


SHARED = unique(map(for_kernels, CASES))

SHAPES = (
    (128, 128),
    (257, 384),
    (512, 512),
    (777, 500),
    (300, 1111),
    (1024, 640),
    (129, 1500),
    (1500, 129),
    (191, 193),
    (1, 1200),
    (1023, 1025),
    (640, 1),
)
HEADS = ((2, 2), (4, 2), (4, 1), (3, 3), (6, 2))
FEATURES = (
    dict(),
    dict(causal=True),
    dict(window=(100, 60)),
    dict(causal=True, window=(200, 0)),
    dict(causal=True, offset=77),
    dict(causal=True, offset=-150),
    dict(window=(0, 300)),
    dict(causal=True, key_lengths="half", query_lengths="most"),
    dict(key_lengths="most"),
    dict(causal=True, offset=(40,), query_lengths="most", key_lengths="half"),
    dict(window=(64, 129), offset=(-33,), key_lengths="most"),
)


def resolve(feature, seqlen_q, seqlen_k):
    """Words for lengths become numbers."""
    share = {"half": 0.5, "most": 0.9}
    extents = {"query_lengths": seqlen_q, "key_lengths": seqlen_k}
    return feature | {
        name: (int(extents[name] * share[word]),)
        for name, word in feature.items()
        if name in extents
    }


def large_cases():
    """For every head dim and dtype a walk through shapes, heads and features, which differ in
    period, so that all head dims together meet most combinations."""
    walk = zip(
        itertools.cycle(SHAPES),
        itertools.cycle(HEADS),
        itertools.cycle(FEATURES),
        itertools.cycle((True, False, None)),
        strict=False,
    )
    for head_dim, dtype in itertools.product(HEAD_DIMS, ("bfloat16", "float16")):
        for (sq, sk), (hq, hkv), feature, deterministic in itertools.islice(walk, 6):
            yield Case(
                batch=1,
                seqlen_q=sq,
                seqlen_k=sk,
                heads_q=hq,
                heads_kv=hkv,
                head_dim=head_dim,
                dtype=dtype,
                deterministic=deterministic,
                **resolve(feature, sq, sk),
            )


COMPILED_HEAD_DIMS = (64, 96, 128, 192, 256)
HEAD_DIM_PAIRS = (*((d, d) for d in COMPILED_HEAD_DIMS), (192, 128))  # (head_dim, head_dim_v)

# Several sequences of several tiles, each with its own mask: what the tile scheduler walks over.
BATCHED = [
    Case(
        batch=3,
        seqlen_q=330,
        seqlen_k=410,
        heads_q=6,
        heads_kv=3,
        head_dim=head_dim,
        causal=True,
        offset=(80, -60, 0),
        query_lengths=(330, 0, 257),
        key_lengths=(129, 410, 1),
        deterministic=deterministic,
    )
    for head_dim in COMPILED_HEAD_DIMS
    for deterministic in (True, False)
] + [
    Case(
        batch=3,
        seqlen_q=260,
        seqlen_k=260,
        heads_q=4,
        heads_kv=1,
        head_dim=head_dim,
        window=window,
        causal=causal,
        deterministic=deterministic,
    )
    for head_dim in (64, 128)
    for window in ((0, 0), (129, 1), (1, 129))
    for causal, deterministic in ((True, True), (False, False))
]

VALUE_DIMS = [
    Case(
        batch=1,
        seqlen_q=sq,
        seqlen_k=sk,
        heads_q=4,
        heads_kv=2,
        head_dim=192,
        head_dim_v=head_dim_v,
        dtype=dtype,
        deterministic=deterministic,
        **resolve(feature, sq, sk),
    )
    for head_dim_v, dtype in ((128, "bfloat16"), (128, "float16"), (72, "bfloat16"))
    for (sq, sk), feature, deterministic in zip(
        SHAPES[:6], FEATURES[1:7], itertools.cycle((True, False)), strict=False
    )
]

LARGE = unique([*large_cases(), *BATCHED, *VALUE_DIMS])
PADDED = [
    case for case in SHARED + LARGE if case.query_lengths or case.key_lengths or case.has_visibility
]


CACHED_DIMS = ((64, None), (96, None), (128, None), (192, 128), (256, None), (80, 40))
PAGE_SIZES = (8, 16, 24, 64, 128, 256)
GROUPS = (1, 2, 4, 8, 16, 64)


def cached_case(seed):
    """A random problem of a cache; fused caches have values of key's head_dim."""
    return cached.random_case(seed, head_dims=CACHED_DIMS, pages=PAGE_SIZES, groups=GROUPS)


def attend_to_cache(problem, **more):
    return cached.attend(problem, "fa3", **more)
