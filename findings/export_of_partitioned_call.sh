#!/usr/bin/env bash
# jax.export refuses a program with custom_partitioning over several devices for host callbacks that
# it does not have.
#
# Versions: jax and jaxlib 0.10.2 (Shardy), ml_dtypes 0.6.0, numpy 2.4.6; four simulated CPU
#   devices.
# Expected: the call is exported, or it is refused by its name, as jax.export refuses any custom
#   call without a guarantee of compatibility, and DisabledSafetyCheck.custom_call lets it through.
# Seen: "serialization of host_callbacks is not yet implemented", from jax.export.export itself,
#   before anything is serialized. No callback is in the program: what counts as one is the
#   partition rule, which the lowering keeps alive in the same list. Disabling the check of the
#   custom call does not help. The same function exports for one device, where the call is inlined
#   and leaves no trace, and from inside a shard_map over the same four devices. So a program tested
#   on one device stops being exportable on a mesh.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check flatbuffers==25.12.19 \
  jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.4.6 scipy==1.17.1 opt_einsum==3.4.0
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 venv/bin/python - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax import export
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("i"))
x = jnp.arange(8.0)


@custom_partitioning
def sine(x):
    return jnp.sin(x)


sine.def_partition(
    partition=lambda mesh, args, result: (mesh, jnp.sin, args[0].sharding, (args[0].sharding,)),
    sharding_rule="i -> i",
)


def try_export(title, function, **options):
    try:
        exported = export.export(function, **options)(x)
        exported = export.deserialize(exported.serialize())
        outcome = f"{exported.nr_devices} devices"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    print(f"{title}: {outcome}")
    return outcome


refused = "NotImplementedError: serialization of host_callbacks is not yet implemented"
assert (jax.jit(sine, in_shardings=rows)(x) == jnp.sin(x)).all()
assert try_export("one device", jax.jit(sine)) == "1 devices"
assert "Partitioning" not in export.export(jax.jit(sine))(x).mlir_module()
assert try_export("jnp.sin, four devices", jax.jit(jnp.sin, in_shardings=rows)) == "4 devices"
assert try_export("four devices", jax.jit(sine, in_shardings=rows)) == refused
check = export.DisabledSafetyCheck.custom_call("CustomSPMDPartitioning")
assert try_export("four devices, check of the call disabled", jax.jit(sine, in_shardings=rows),
                  disabled_checks=[check]) == refused
mapped = jax.shard_map(sine, mesh=mesh, in_specs=rows.spec, out_specs=rows.spec)
assert try_export("inside shard_map", jax.jit(mapped, in_shardings=rows)) == "4 devices"
PYTHON
