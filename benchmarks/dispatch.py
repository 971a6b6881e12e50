"""Host cost of one jitted call that is far too small to keep the GPU busy, and of tracing it.

    python -m benchmarks.dispatch [--rounds 9] [--dry-run]

Batch 1, 128 tokens, one head of 64, bf16. "back to back" issues calls without waiting, "waiting"
waits for each; both in microseconds a call, median over rounds in which the functions take turns.
"trace" is the time to trace and lower the function for CUDA with nothing remembered, in
milliseconds; it needs no GPU, and a dry run measures it alone.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.environment import RESULTS, environment, save
from benchmarks.implementations import our_attention
from benchmarks.problems import Problem
from benchmarks.render import table
from benchmarks.timing import describe

PROBLEM = Problem(batch=1, seqlen=128, heads=1, head_dim=64)
CLOCKS = ("back to back", "waiting")


def gradient(function: Callable) -> Callable:
    def loss(query, key, value):
        return function(query, key, value).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))


def functions() -> dict[str, Callable]:
    """What takes turns; `x + 1` is the least any jitted call costs."""
    cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn")
    found = {"x + 1": lambda query, key, value: query + 1}
    for name, function in (("jax_fa3", our_attention()), ("cudnn", cudnn)):
        found[f"{name} forward"] = function
        found[f"{name} forward and backward"] = gradient(function)
    return found


def back_to_back(run: Callable, args: list, count: int = 300) -> float:
    start = time.perf_counter()
    for _ in range(count):
        out = run(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / count * 1e6


def waiting(run: Callable, args: list, count: int = 100) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def trace(function: Callable, shapes: list) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    return (time.perf_counter() - start) * 1e3


def traces(rounds: int) -> dict[str, list[float]]:
    """{name: [milliseconds]} of what can be lowered without a GPU, in turns."""
    shapes = PROBLEM.shapes()[:3]
    ours = {name: function for name, function in functions().items() if "cudnn" not in name}
    found = {name: [] for name in ours}
    for function in ours.values():
        trace(function, shapes)  # imports and first uses
    for _ in range(rounds):
        for name, function in ours.items():
            found[name].append(trace(function, shapes))
    return found


def measure(rounds: int) -> list[dict]:
    traced = traces(rounds)  # first, because it forgets what is compiled
    args, rows, runs = PROBLEM.inputs()[:3], [], {}
    for name, function in functions().items():
        row = dict(name=name, error=None, **{clock: [] for clock in CLOCKS})
        row["trace"] = traced.get(name, [])
        rows.append(row)
        try:
            run = jax.jit(function)
            jax.block_until_ready(run(*args))
            runs[name] = run
        except Exception as error:
            row["error"] = describe(error)
    for _ in range(rounds):
        for row in (x for x in rows if x["name"] in runs):
            row[CLOCKS[0]].append(back_to_back(runs[row["name"]], args))
            row[CLOCKS[1]].append(waiting(runs[row["name"]], args))
    return rows


def render(data: dict) -> str:
    rows = []
    for row in data["records"]:
        clocks = (*CLOCKS, "trace")
        times = [f"{statistics.median(row[c]):.1f}" if row[c] else "-" for c in clocks]
        rows.append([row["name"], *times, row["error"] or ""])
    header = ["call", *(f"{clock}, us" for clock in CLOCKS), "trace, ms", ""]
    facts = table(["", ""], data["environment"].items())
    return "\n".join([f"# Dispatch: {PROBLEM.label}\n", facts, table(header, rows)])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="trace only")
    args = parser.parse_args()
    if args.dry_run:
        for name, times in traces(args.rounds).items():
            print(f"  {name}: traced and lowered in {statistics.median(times):.2f} ms")
        return 0
    data = dict(environment=environment(), records=measure(args.rounds))
    save(data, args.output / "dispatch.json")
    report = render(data)
    (args.output / "dispatch.md").write_text(report)
    print(report)
    return 1 if any(x["error"] for x in data["records"] if "jax_fa3" in x["name"]) else 0


if __name__ == "__main__":
    sys.exit(main())
