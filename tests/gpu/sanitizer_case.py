"""A few calls, forward and backward, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck|synccheck|racecheck|initcheck python sanitizer_case.py PART

The tools see an access outside an array only if every array is an allocation of its own, so XLA's
pooling allocator and its command buffers are switched off here, before JAX is imported.
"""

import os
import sys

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import dataclasses
import functools
import pathlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from kernels import attend_to_cache, cached_case, for_kernels, many_rows_case

import cached
import contract
import dense
from cases import PACKED, SCORES, Case
from float8 import check_on_tensor_cores, make
from jax_fa3 import dot_product_attention, ffi
from jax_fa3.operands import Operands

BASE = Case(batch=2, seqlen_q=130, seqlen_k=197, heads_q=2, heads_kv=1)
CASES = [
    dataclasses.replace(BASE, **change)
    for change in (
        dict(head_dim=64, causal=True),
        dict(head_dim=40, dtype="float16", key_lengths=(197, 0), query_lengths=(1, 130)),
        dict(head_dim=96, window=(60, 20)),
        dict(head_dim=128, causal=True, offset=(67, -40), deterministic=True),
        dict(head_dim=192, seqlen_q=1, key_lengths=(65, 128)),
        dict(head_dim=256, causal=True, deterministic=True, dtype="float16"),
        dict(head_dim=248, window=(0, 70)),
        dict(head_dim=192, head_dim_v=128, causal=True),
        # dQ on a grid
        dict(head_dim=120, seqlen_k=1100, key_lengths=(1100, 1030), deterministic=True),
    )
]
DENSE = [
    dense.Dense(**(dict(batch=2, seqlen_q=130, seqlen_k=197, heads_kv=1) | options))
    for options in (
        dict(head_dim=32, bias="1hts"),
        dict(head_dim=64, bias="bhts", mask="b11s", causal=True),
        dict(head_dim=96, mask="1hts", mask_values="blocks", dtype="float16"),
        dict(head_dim=128, bias="11ts", mask="b1ts", mask_values="few", key_lengths=(197, 60)),
        dict(head_dim=128, bias="b11s", bias_values="rows", query_lengths=(1, 130)),
        dict(head_dim=192, head_dim_v=128, bias="1hts", mask="11t1", mask_values="rows"),
        dict(head_dim=192, mask="111s", seqlen_q=1),
        dict(head_dim=256, bias="1h1s", mask="bhts", window=(60, 20), dtype="float16"),
        dict(head_dim=64, bias="ghts", mask="g11s", batch=4, fold=2, intervals="any"),
    )
]
FLOAT8 = [
    dataclasses.replace(BASE, **change)
    for change in (
        dict(head_dim=64, causal=True),
        dict(head_dim=80, key_lengths=(197, 0), query_lengths=(1, 130)),
        dict(head_dim=128, window=(60, 20)),
        dict(head_dim=256, causal=True, offset=(67, -40)),
    )
]
# With four, two and one rows a thread; a last packet that half of a row's threads lack.
ROUNDED = [
    dataclasses.replace(BASE, **change)
    for change in (
        dict(head_dim=32, head_dim_v=256, dtype="float16"),
        dict(head_dim=80, head_dim_v=48, key_lengths=(197, 0), query_lengths=(1, 130)),
        dict(head_dim=128),
        dict(head_dim=240, head_dim_v=64, key_lengths=(65, 128)),
    )
]


def contracts(cases):
    kernels = contract.Implementation("fa3")
    for case in cases:
        contract.check_results(kernels, case)
        print(case.name, flush=True)


def dense_arrays():
    kernels = contract.Implementation("fa3")
    for case in DENSE:
        dense.check(kernels, case)
        print(case.name, flush=True)


def caches():
    cases = [cached_case(seed) for seed in range(0, 320, 32)]
    cases += [many_rows_case(seed) for seed in range(0, 36, 12)]
    for case in cases:
        problem = cached.Problem(case)
        cached.check(problem, attend_to_cache(problem))
        print("caches", case.name, flush=True)


def float8():
    attend = functools.partial(dot_product_attention, implementation="fa3", return_residual=True)
    for case in ROUNDED:
        names = dict(query_lengths="query_seq_lengths", key_lengths="key_value_seq_lengths")
        lengths = {field: case.index_arrays.get(name) for field, name in names.items()}
        for how in ({}, dict(prepare_value=True), dict(back=True)):
            jax.block_until_ready(ffi.quantize(Operands(*case.inputs()[:3], **lengths), **how))
        print("rounding", case.name, flush=True)
    for case in FLOAT8:
        x = make(case)
        check_on_tensor_cores(case, attend(**x._asdict(), **case.options, **case.index_arrays), x)
        print("float8", case.name, flush=True)


PARTS = dict(
    plain=functools.partial(contracts, CASES),
    dense=dense_arrays,
    packed=functools.partial(contracts, [for_kernels(case) for case in PACKED[::10]]),
    scores=functools.partial(contracts, [for_kernels(case) for case in SCORES[::3]]),
    caches=caches,
    float8=float8,
)

if __name__ == "__main__":
    PARTS[sys.argv[1]]()
