"""Shapes beyond the grid, each beside the plain shape it should be as fast as.

    python -m benchmarks.variety                        # all, on a Hopper GPU
    python -m benchmarks.variety --filter 'window'
    python -m benchmarks.variety --dry-run              # trace and lower only; needs no GPU

Ratios are of TFLOP/s by the work that is useful: pairs of a query and a key that see each other,
times the head dims of the kernel that runs. Both sides are timed turn by turn, in kernel time. The
last rows keep the GPU at its power limit for seconds and compare with cuDNN.
"""

import argparse
import dataclasses
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.environment import RESULTS, environment, save
from benchmarks.implementations import Implementation, our_attention
from benchmarks.problems import DTYPES, MODES
from benchmarks.render import table
from benchmarks.timing import Program, describe
from jax_fa3 import native

COMPILED_DIMS = sorted(
    {
        kernel["head_dim"]
        for kernel in native.module().listed_kernels()
        if kernel.get("variant") == "plain"
    }
)
SUSTAINED_S = 2.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Self-attention; window is how many keys before its own a row sees, None all of them."""

    batch: int = 4
    seqlen: int = 4096
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    head_dim_v: int = 128
    causal: bool = False
    window: int | None = None
    dtype: str = "bf16"
    deterministic: bool = False

    @property
    def label(self) -> str:
        dims = f"{self.head_dim}" + f",{self.head_dim_v}" * (self.head_dim != self.head_dim_v)
        mask = "causal" if self.causal else "dense"
        mask += f"-window{self.window}" if self.window is not None else ""
        heads = f"{self.heads}" + f"/{self.kv_heads}" * (self.heads != self.kv_heads)
        tail = "-deterministic" * self.deterministic
        return f"d{dims}-{mask}-s{self.seqlen}-b{self.batch}-h{heads}-{self.dtype}{tail}"

    @property
    def numpy_dtype(self) -> jnp.dtype:
        return jnp.dtype(DTYPES[self.dtype])

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """query, key, value and the output's cotangent."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        dims = (self.head_dim, self.head_dim, self.head_dim_v, self.head_dim_v)
        return [
            jax.ShapeDtypeStruct((self.batch, self.seqlen, h, d), self.numpy_dtype)
            for h, d in zip(heads, dims, strict=True)
        ]

    def inputs(self) -> list[jax.Array]:
        """N(0, 1) values for `shapes`."""
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = self.shapes()
        return [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, shapes, strict=True)]

    def flops(self, mode: str) -> float:
        """Two for each multiply-add; head dims as the kernels have them."""
        left = self.seqlen if self.window is None else self.window
        rows = range(self.seqlen)
        pairs = sum(min(i, left) + (1 if self.causal else self.seqlen - i) for i in rows)
        d, dv = (min(x for x in COMPILED_DIMS if x >= y) for y in (self.head_dim, self.head_dim_v))
        products = {"forward": d + dv, "backward": 3 * d + 2 * dv}[mode]
        return 2.0 * self.batch * self.heads * pairs * products

    def attend(self) -> Callable:
        return partial(
            our_attention(),
            is_causal=self.causal,
            local_window_size=None if self.window is None else (self.window, self.seqlen),
            deterministic=self.deterministic,
        )


def comparisons() -> list[tuple[str, Shape, Shape]]:
    """(what, the shape, the one beside it)."""
    rows = []

    def add(what, beside=None, **changes):
        plain = Shape(**(beside or {}))
        rows.append((what, dataclasses.replace(plain, **changes), plain))

    for causal in (False, True):
        plain = dict(causal=causal)
        add("grouped heads", plain, kv_heads=4)
        add("grouped heads", plain | dict(batch=1, heads=64, kv_heads=64), kv_heads=8)
        add("float16", plain, dtype="fp16")
        for head_dim, heads in ((64, 32), (128, 16)):
            dims = plain | dict(head_dim=head_dim, head_dim_v=head_dim)
            for seqlen, batch in ((4096, 4), (16384, 1)):
                shape = dims | dict(seqlen=seqlen, batch=batch, heads=heads, kv_heads=heads)
                add("deterministic", shape, deterministic=True)
        for seqlen, batch in ((1000, 16), (3333, 5), (5000, 3)):
            round_size = -(-seqlen // 128) * 128
            add("odd length", plain | dict(seqlen=round_size, batch=batch), seqlen=seqlen)
        add("odd heads", plain | dict(heads=8, kv_heads=8), heads=7, kv_heads=7)
        add("odd heads", plain | dict(heads=40, kv_heads=40, batch=2), kv_heads=8)
        add("odd head_dim", plain | dict(head_dim=96, head_dim_v=96), head_dim=80, head_dim_v=80)
        add("odd head_dim", plain, head_dim=112, head_dim_v=112)
    long = dict(seqlen=16384, batch=1)
    add("window", long, window=1024, causal=True)
    add("window", long | dict(head_dim=64, head_dim_v=64), window=1024, causal=True)
    eight = dict(seqlen=8192, batch=2, causal=True)
    add("value's head_dim", eight, head_dim=192)
    add("head_dim 192", eight, head_dim=192, head_dim_v=192)
    add("head_dim 96", eight, head_dim=96, head_dim_v=96)
    return rows


OURS = Implementation("jax_fa3", lambda shape, mode: shape.attend(), target="jax_fa3_{mode}")


def measure(pair: list[Program], rounds: int) -> None:
    """Kernel times of both, turn by turn, if both compiled."""
    for program in pair:
        program.kernel_us, program.calls = [], 16
        program.attempt(program.take, program.problem.inputs())
    for i in range(rounds):
        for program in pair[:: 1 if i % 2 == 0 else -1]:
            program.attempt(program.kernel_round, i == rounds - 1)
    for program in pair:
        program.args = None


def tflops(program: Program) -> float:
    return program.problem.flops(program.mode) / statistics.median(program.kernel_us) / 1e6


def sustained(mode: str, causal: bool, rounds: int) -> dict:
    """Wall time of calls back to back for seconds, jax_fa3 and cuDNN in turns."""
    shape = Shape(seqlen=16384, batch=1, causal=causal)
    row = dict(what="sustained", shape=shape.label, mode=mode, error=None)
    cudnn = partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    times = {}
    try:
        *qkv, dout = shape.inputs()
        for _ in range(rounds):
            for name, attend in (("jax_fa3", shape.attend()), ("cudnn", cudnn)):
                if mode == "forward":
                    run = partial(jax.jit(attend), *qkv)
                else:
                    run = partial(jax.jit(lambda pull, x: pull(x)), jax.vjp(attend, *qkv)[1], dout)
                jax.block_until_ready(run())
                calls, start = 0, time.perf_counter()
                while (elapsed := time.perf_counter() - start) < SUSTAINED_S:
                    for _ in range(20):
                        out = run()
                    jax.block_until_ready(out)
                    calls += 20
                times.setdefault(name, []).append(elapsed / calls * 1e6)
        ours, theirs = (statistics.median(times[x]) for x in ("jax_fa3", "cudnn"))
        row |= dict(tflops=shape.flops(mode) / ours / 1e6, ratio=theirs / ours, us=times)
    except Exception as error:
        row["error"] = describe(error)
    return row


def render(data: dict) -> str:
    """A row each, forward and backward side by side."""
    rows = {}
    for x in data["records"]:
        row = rows.setdefault((x["what"], x["shape"], x.get("beside", "cuDNN")), {})
        row[x["mode"]] = (f"{x['tflops']:.0f}", f"{x['ratio']:.2f}") if "ratio" in x else ("-", "-")
    lines = [[*key, *(c for m in MODES for c in row.get(m, ("", "")))] for key, row in rows.items()]
    heads = ["", "shape", "beside", "forward TFLOP/s", "ratio", "backward TFLOP/s", "ratio"]
    title = "# Beyond the grid: useful TFLOP/s, and the ratio to the plain shape's\n"
    return "\n".join([title, table(["", ""], data["environment"].items()), table(heads, lines)])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--filter", default="", help="regular expression, on WHAT:LABEL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=240, help="start nothing new after that")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="trace and lower only")
    args = parser.parse_args()
    start = time.monotonic()
    chosen = [x for x in comparisons() if re.search(args.filter, f"{x[0]}:{x[1].label}")]
    programs = {(s, m): Program(OURS, s, m) for _, *pair in chosen for s in pair for m in MODES}
    for program in programs.values():
        program.attempt(program.lower, "cuda")
        if args.dry_run:
            program.attempt(program.expect_custom_call)
            print(f"  {program.label:60} {program.error or 'lowered'}")
    if args.dry_run:
        return 1 if any(program.error for program in programs.values()) else 0
    with ThreadPoolExecutor(8) as pool:
        for program in programs.values():
            pool.submit(program.attempt, program.compile)
    data = dict(environment=environment(), records=[], skipped=[])
    path = args.output / "variety.json"
    for what, shape, plain in chosen:
        for mode in MODES:
            row = dict(what=what, shape=shape.label, beside=plain.label, mode=mode, error=None)
            if time.monotonic() - start > args.budget_s:
                data["skipped"].append(row)
                continue
            pair = [programs[x, mode] for x in (shape, plain)]
            measure(pair, args.rounds)
            row["error"] = next((e for x in pair for e in (x.error, x.clock_error) if e), None)
            if row["error"] is None:
                ours, theirs = map(tflops, pair)
                row |= dict(tflops=ours, ratio=ours / theirs)
                row |= dict(us=pair[0].kernel_us, beside_us=pair[1].kernel_us)
            data["records"].append(row)
            result = row["error"] or f"{row['tflops']:6.0f} TFLOP/s, ratio {row['ratio']:.3f}"
            print(f"  {what:18} {mode}:{shape.label:50} {result}", flush=True)
            save(data, path)
    if re.search(args.filter, "sustained"):
        for mode in MODES:
            for causal in (False, True):
                if time.monotonic() - start < args.budget_s:
                    data["records"].append(sustained(mode, causal, rounds=2))
                    print(f"  {data['records'][-1]}", flush=True)
                    save(data, path)
    report = render(data)
    (args.output / "variety.md").write_text(report)
    print("\n" + report)
    return 1 if any(x["error"] for x in data["records"]) else 0


if __name__ == "__main__":
    sys.exit(main())
