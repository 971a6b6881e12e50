#!/usr/bin/env bash
# A jaxpr that runs everywhere else does not run inside of jax.shard_map, where the function that it
# was traced from does.
#
# Versions: jax and jaxlib 0.10.2, 0.11.2 and 0.12.0.1; CPU.
# Expected: jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(f)(...)) may stand for f.
# Seen: with check_vma, the default, `x + y` of an array that varies over the mesh axis and one that
#   does not is a ValueError, "Primitive add requires varying manual axes to match", with the advice
#   to report it and to turn the check off. jax.numpy and jax.lax make operands vary together before
#   they bind a primitive; evaluating a jaxpr binds at once. What was traced outside has no such step
#   in it, and what was traced inside has that of its own mesh axes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >program.py <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


def function(x, y):
    return x + y


mesh = Mesh(np.array(jax.devices()), ("x",))
part = jax.ShapeDtypeStruct((4,), jnp.float32)
traced = jaxpr_as_fun(jax.make_jaxpr(function)(part, part))


def over_the_mesh(f):
    mapped = jax.shard_map(f, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    return jax.jit(mapped)(jnp.arange(8.0), jnp.ones(4))


expected = np.arange(8) + 1
assert (over_the_mesh(function) == expected).all()
assert (traced(jnp.arange(4.0), jnp.ones(4))[0] == expected[:4]).all()
try:
    over_the_mesh(lambda *x: traced(*x)[0])
except ValueError as error:
    print(jax.__version__, str(error)[:110])
    assert "add requires varying manual axes to match" in str(error)
else:
    raise SystemExit(f"jax {jax.__version__}: the jaxpr runs inside of jax.shard_map")
PYTHON
for version in 0.10.2 0.11.2 0.12.0.1; do
  "${PYTHON:-python3.12}" -m venv "$version"
  "$version/bin/pip" install -q --disable-pip-version-check "jax==$version" "jaxlib==$version"
  JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 "$version/bin/python" program.py
done
