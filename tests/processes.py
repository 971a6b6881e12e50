"""The same programs in one process with all devices and in several with a part of them each.

Run as a script, this file is one of the processes:
    python processes.py <its number> <number of processes> <coordinator's address>
"""

import functools
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
from meshes import run

HERE = Path(__file__).parent

CASE = Case(
    batch=4,
    seqlen_q=64,
    seqlen_k=64,
    heads_q=4,
    heads_kv=2,
    head_dim=64,
    causal=True,
    deterministic=True,
)
HEADS, SEQUENCE = P("x", None, "y"), P("x", "y")
PROGRAMS = {  # name -> kind of the axes x and y, sharding of the operands, strategy
    "heads, automatic": (AxisType.Auto, HEADS, "error"),
    "heads, explicit": (AxisType.Explicit, HEADS, "error"),
    "ring, automatic": (AxisType.Auto, SEQUENCE, "ring"),
    "allgather, explicit": (AxisType.Explicit, SEQUENCE, "allgather"),
}


def digests(devices):
    """Of each program's results over the devices, every part that one of this process has."""
    found = {}
    for name, (kind, spec, strategy) in PROGRAMS.items():
        across = min(len(devices), 2 if spec == HEADS else 4)
        mesh = jax.make_mesh(
            (len(devices) // across, across), ("x", "y"), axis_types=(kind,) * 2, devices=devices
        )

        attend = functools.partial(
            dot_product_attention,
            return_residual=True,
            sequence_parallel=strategy,
            **CASE.options,
        )

        def gradients(query, key, value, dout, dlse, attend=attend):
            results, vjp = jax.vjp(attend, query, key, value)
            return *results, *vjp((dout, dlse))

        with jax.set_mesh(mesh):
            x = [
                jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), a.__getitem__)
                for a in CASE.inputs()
            ]
            for i, result in enumerate(run(gradients, *x)):
                for shard in result.addressable_shards:
                    part = f"{name}, result {i}, {shard.index}"
                    data = np.asarray(shard.data)
                    assert np.isfinite(data.astype(np.float32)).all() and data.any()
                    found[part] = hashlib.sha256(data.tobytes()).hexdigest()
    return found


def digests_of_processes(environments):
    """`digests` over all devices of as many processes as there are environments."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    paths = dict(PYTHONPATH=os.pathsep.join([str(HERE.parent), str(HERE)]))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(number), str(len(environments)), address],
            env=os.environ | paths | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, environment in enumerate(environments)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), outputs
    found = [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]
    assert all(found)
    return dict(item for part in found for item in part.items())


if __name__ == "__main__":
    number, count, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=count, process_id=number)
    assert jax.local_device_count() * count == jax.device_count()
    print(json.dumps(digests(jax.devices())))
