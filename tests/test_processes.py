"""The same program in one process with eight devices and in two with four each: the same bits.

Run as a script, this file is one of the two processes:
    python test_processes.py <number of the process> <coordinator's address>
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from case import Case
from jax_fa3 import dot_product_attention
from transforms import score

CASE = Case(batch=4, seqlen_q=32, seqlen_k=32, heads_q=4, heads_kv=2, head_dim=16, causal=True)
HEADS, SEQUENCE = P("x", None, "y"), P("x", "y")
PROGRAMS = {  # name -> sizes of the axes x and y, their kind, sharding of the operands, strategy
    "heads, automatic": ((4, 2), AxisType.Auto, HEADS, "error"),
    "heads, explicit": ((4, 2), AxisType.Explicit, HEADS, "error"),
    "ring, automatic": ((2, 4), AxisType.Auto, SEQUENCE, "ring"),
    "allgather, explicit": ((2, 4), AxisType.Explicit, SEQUENCE, "allgather"),
}


def digests():
    """Of each program's results, every part that a device of this process has."""
    found = {}
    for name, (sizes, kind, spec, strategy) in PROGRAMS.items():
        mesh = jax.make_mesh(sizes, ("x", "y"), axis_types=(kind,) * 2)

        def run(*x, strategy=strategy):
            def loss(*x):
                results = dot_product_attention(
                    *x, return_residual=True, is_causal=True, sequence_parallel=strategy
                )
                return score(*results), results

            gradients, results = jax.grad(loss, (0, 1, 2), has_aux=True)(*x)
            return *results, *gradients

        with jax.set_mesh(mesh):
            x = [
                jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), a.__getitem__)
                for a in CASE.inputs()[:3]
            ]
            for i, result in enumerate(jax.jit(run)(*x)):
                for shard in result.addressable_shards:
                    part = f"{name}, result {i}, {shard.index}"
                    data = np.asarray(shard.data)
                    assert np.isfinite(data.astype(np.float32)).all() and data.any()
                    found[part] = hashlib.sha256(data.tobytes()).hexdigest()
    return found


def test_two_processes_give_the_bits_of_one():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(number), address],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs)
    one_process = digests()
    assert first and second and first.keys() | second.keys() == one_process.keys()
    assert first | second == one_process


if __name__ == "__main__":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[1]))
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    print(json.dumps(digests()))
