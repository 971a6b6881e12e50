#!/usr/bin/env bash
# A reduction in a custom_partitioning rule counts the padding of shards of unequal size.
#
# Versions: jax and jaxlib 0.10.2 (Shardy), ml_dtypes 0.6.0, numpy 2.4.6; four simulated CPU
#   devices.
# Expected: with_sharding_constraint may lay 6 rows over 4 devices. A custom_partitioning function
#   that gets them is told so, is refused (shard_map refuses) or gets the rows whole, and
#   sum(exp(x)) is the same as without devices.
# Seen: the rule is offered the sharding as it stands, with the global shape (6,), and its function
#   is traced for shards of 2. Shards are padded to 8 rows in total, so a psum of local sums of
#   exp(0) gives 8 instead of 6, without a warning; 5 rows give 8 as well. XLA masks the padding in
#   reductions of its own: the same sum in plain jax.numpy, with the same constraint, is right. The
#   padding is not zero either: operations before the call are applied to it. Elementwise functions
#   stay right, which hides the problem. A rule has to compare shape and mesh itself and ask for a
#   replicated operand.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.4.6 scipy==1.17.1 opt_einsum==3.4.0
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 venv/bin/python - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("i"))
offered, traced = [], []


@custom_partitioning
def exp_sum(x):
    return jnp.exp(x).sum()


def partition(mesh, args, result):
    offered.append((args[0].shape, args[0].sharding.spec))

    def local(x):
        traced.append(x.shape)
        return jax.lax.psum(jnp.exp(x).sum(), "i")

    return mesh, local, NamedSharding(mesh, PartitionSpec()), (args[0].sharding,)


exp_sum.def_partition(partition=partition, sharding_rule="i -> ")


@custom_partitioning
def double(x):
    return x * 2


double.def_partition(
    partition=lambda mesh, args, result: (mesh, lambda x: x * 2, args[0].sharding,
                                          (args[0].sharding,)),
    sharding_rule="i -> i",
)


def run(function, x, before=lambda x: x * 1):
    return jax.jit(lambda x: function(jax.lax.with_sharding_constraint(before(x), rows)))(x)


for count, result in ((8, 8), (6, 8), (5, 8)):
    offered.clear()
    traced.clear()
    got = float(run(exp_sum, jnp.zeros(count)))
    plain = float(run(lambda x: jnp.exp(x).sum(), jnp.zeros(count)))
    print(f"{count} rows: offered {offered}, traced for {traced}: sum {got}, jax.numpy {plain}")
    assert offered[0] == ((count,), PartitionSpec("i")) and traced[-1] == (2,)
    assert got == result and plain == count

shifted = float(run(exp_sum, jnp.zeros(6), lambda x: x + 1)) / float(jnp.exp(1.0))
print(f"6 rows of 0 + 1: {shifted:.3f} times exp(1)")
assert abs(shifted - 8) < 1e-5

x = jnp.arange(6.0)
assert (run(double, x) == x * 2).all()
try:
    jax.jit(jax.shard_map(lambda x: x, mesh=mesh, in_specs=rows.spec, out_specs=rows.spec))(x)
except ValueError:
    print("shard_map refuses 6 rows")
else:
    raise AssertionError("shard_map accepts 6 rows over 4 devices")
PYTHON
