"""Seconds of the first call with a function: what tracing, linking, compiling and one run take.

benchmarks.flex starts this module twice, with the same folder for the cache: the first process
links all kernels, and the second finds them. It reads {"folder": PATH, "names": [...]} as JSON from
stdin and prints a JSON line for each call. Calls are of dot_product_attention and of each problem's
function: the forward pass, and that with the gradients of query, key and value, which is linked by
itself.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.torch_attention import answers

COMMAND = (sys.executable, "-m", "benchmarks.first_call")
BUILT_IN = "dot_product_attention"
PASSES = ("forward", "both")
LINKED, CACHED = "linked", "from the cache"
SHARE_LINKED = 0.7  # of the time

# ---- in the process of the benchmark


def records(names: Iterable[str], timeout_s: float, command=None) -> list[dict]:
    """A row for each process, call and pass; what a process does not come to has an error."""
    names, rows = list(names), []
    calls = [(name, passes) for name in (BUILT_IN, *names) for passes in PASSES]
    end = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        for process, share in ((LINKED, SHARE_LINKED), (CACHED, 1.0)):
            lines, why = answers(
                command or COMMAND,
                dict(folder=folder, names=names),
                share * max(1.0, end - time.monotonic()),
                XLA_PYTHON_CLIENT_PREALLOCATE="false",  # the benchmark's process has the memory
                CUDA_CACHE_DISABLE="1",  # what other processes have linked
            )
            lines += [dict(error=why)] * (len(calls) - len(lines))
            rows += [
                dict(name=name, passes=passes, process=process, error=None) | line
                for (name, passes), line in zip(calls, lines, strict=True)
            ]
    return rows


# ---- in a process of its own


def measure(name: str, passes: str, folder: Path) -> float:
    """Seconds, with what this process has linked and compiled forgotten."""
    import jax

    from benchmarks.flex import ours, plain
    from benchmarks.functions import problems
    from jax_fa3.flex import cache, link

    is_built_in = name == BUILT_IN
    problem = next(x for x in problems() if is_built_in or x.name == name)
    *qkv, dout = problem.inputs()
    operands = () if is_built_in else problem.operands()
    attend = (plain if is_built_in else ours)(problem, "forward")
    jax.block_until_ready((qkv, dout, operands))

    def both(qkv, operands, dout):
        out, pullback = jax.vjp(lambda *x: attend(*x, *operands), *qkv)
        return out, pullback(dout)

    def forward(qkv, operands, dout):
        return attend(*qkv, *operands)

    own = folder / f"{name}-{passes}"
    os.environ[cache.VARIABLE] = str(own)
    link.linked.cache_clear()
    jax.clear_caches()
    start = time.perf_counter()
    jax.block_until_ready(jax.jit(both if passes == "both" else forward)(qkv, operands, dout))
    seconds = time.perf_counter() - start
    if not is_built_in and not any(own.glob("*")):
        raise RuntimeError("the call has linked no kernel")
    return seconds


def main() -> int:
    import jax
    import jax.numpy as jnp

    from benchmarks.timing import describe

    request = json.load(sys.stdin)
    jax.block_until_ready(jax.jit(jax.grad(jnp.sin))(1.0))  # first uses of JAX
    for name in (BUILT_IN, *request["names"]):
        for passes in PASSES:
            try:
                found = dict(seconds=measure(name, passes, Path(request["folder"])))
            except Exception as error:
                found = dict(error=describe(error))
            print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
