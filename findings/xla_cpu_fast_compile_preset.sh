#!/usr/bin/env bash
# XLA for CPU: the preset for fast compilation saves a tenth; two other flags save nine tenths.
#
# Versions: jax and jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6; x86-64.
# Expected: XLA_FLAGS=--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE compiles in clearly less time
#   than the default, and about as fast as flags found by hand.
# Seen: processor time to compile six small programs (blockwise attention and its gradient):
#     default                                         15.5 s
#     the preset                                      14.2 s
#     --xla_backend_optimization_level=0               6.9 s
#     that and --xla_cpu_use_fusion_emitters=false     2.0 s
#   In an earlier run 23.6, 19.4, 8.4 and 1.8 s, and 21.0 s with CPU_OPT_PRESET_FAST_RUNTIME, which
#   should compile for longer than the default. LLVM's passes take over half of the time; of what is
#   left, code from the emitters of fusions takes over two thirds, with no pass run on it. The
#   second flag is gone from jaxlib 0.12.0.1, where an unknown flag ends the process. There level 0
#   takes 0.40 of the default's time and the preset 0.97.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.4.6 scipy==1.17.1 opt_einsum==3.4.0
cat > compile.py <<'PYTHON'
import resource

import jax
import jax.numpy as jnp


def attend(q, k, v, block=16):
    batch, seqlen, heads, head_dim = q.shape
    keys, values = (
        x.reshape(batch, seqlen // block, block, heads, head_dim).swapaxes(0, 1) for x in (k, v)
    )

    def step(carry, block_of):
        largest, total, out = carry
        s = jnp.einsum("bthd,bshd->bhts", q, block_of[0]).astype(jnp.float32)
        new = jnp.maximum(largest, s.max(-1))
        p, kept = jnp.exp(s - new[..., None]), jnp.exp(largest - new)
        out = out * kept[..., None]
        out += jnp.einsum("bhts,bshd->bhtd", p.astype(q.dtype), block_of[1])
        return (new, total * kept + p.sum(-1), out), None

    rows = batch, heads, seqlen
    start = jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, head_dim))
    (_, total, out), _ = jax.lax.scan(step, start, (keys, values))
    return ((out / total[..., None]) ** 2).sum()


def user_s():
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


programs = []
for heads in (1, 2, 3):
    for head_dim in (16, 32):
        x = jax.ShapeDtypeStruct((2, 64, heads, head_dim), jnp.bfloat16)
        programs.append(jax.jit(jax.value_and_grad(attend, (0, 1, 2))).lower(x, x, x))
before = user_s()
for program in programs:
    program.compile()
print(f"{user_s() - before:.2f}")
PYTHON
time_of() { JAX_PLATFORMS=cpu XLA_FLAGS="$*" venv/bin/python compile.py; }
default=$(time_of)
preset=$(time_of --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE)
level=$(time_of --xla_backend_optimization_level=0)
plain=$(time_of --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false)
echo "default $default s, preset $preset s, level 0 $level s, without emitters $plain s"
venv/bin/python - "$default" "$preset" "$level" "$plain" <<'PYTHON'
import sys

default, preset, level, plain = map(float, sys.argv[1:])
assert preset > 0.7 * default
assert level < 0.6 * default
assert plain < 0.5 * level
PYTHON
