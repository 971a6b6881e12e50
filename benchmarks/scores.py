"""Speed of attention with sinks, largest logits, a cap or slopes, beside that without.

    python -m benchmarks.scores                         # what fits into 8 minutes of one GPU
    python -m benchmarks.scores --quick                 # two sequence lengths, within 2
    python -m benchmarks.scores --filter '^(plain|softcap):forward:d128' --output FOLDER
    python -m benchmarks.scores --dry-run               # trace and lower only; needs no GPU

The problems are those of benchmarks.attention, and all calls are of jax_fa3. Sinks are low, the cap
is high and slopes are slight: what the kernels do does not depend on them, and the answers are
those without, by which they are checked.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax.numpy as jnp

from benchmarks.attention import choose, dry_run, grid_options, log, run
from benchmarks.environment import save
from benchmarks.implementations import Function, Implementation, our_attention
from benchmarks.problems import MODES, Problem, grid
from benchmarks.render import Results, mask_name, not_measured, table

SEQLENS, QUICK_SEQLENS = (1024, 4096, 16384), (4096, 16384)
SINK, CAP, SLOPE = -30.0, 1000.0, 2.0**-20
PLAIN = "plain"

# Speeds over that without, by head dim; of the forward and the backward pass.
WANTED = {
    "sinks": {64: (0.99, 0.99), 128: (0.99, 0.99), 256: (0.99, 0.99)},
    "max-logits": {64: (0.99, 0.99), 128: (0.99, 0.99), 256: (0.99, 0.99)},
    "softcap": {128: (0.75, 0.85), 256: (None, None)},
    "alibi": {128: (0.80, 0.88)},
}


def without(problem: Problem, mode: str) -> Function:
    return partial(our_attention(), **problem.masking())


def sinks(problem: Problem, mode: str) -> Function:
    return partial(without(problem, mode), sinks=jnp.full(problem.heads, SINK))


def max_logits(problem: Problem, mode: str) -> Function:
    """The output and nothing else, which does not leave the largest logits out of the kernel."""
    attend = partial(without(problem, mode), return_max_logits=True)
    return lambda *x: attend(*x)[0]


def softcap(problem: Problem, mode: str) -> Function:
    return partial(without(problem, mode), logits_soft_cap=CAP)


def alibi(problem: Problem, mode: str) -> Function:
    return partial(without(problem, mode), alibi_slopes=jnp.full(problem.heads, SLOPE))


TARGET = "jax_fa3_{mode}"
IMPLEMENTATIONS = (
    Implementation(PLAIN, without, target=TARGET),
    Implementation("sinks", sinks, target=TARGET),
    Implementation("max-logits", max_logits, target=TARGET),
    Implementation("softcap", softcap, target=TARGET),
    Implementation("alibi", alibi, target=TARGET),
)


def has_kernels(implementation: Implementation, head_dim: int) -> bool:
    """Those for its own head dim: smaller ones than 128 take the caps and slopes of that."""
    return implementation.name == PLAIN or head_dim in WANTED[implementation.name]


class ScoreResults(Results):
    def implementations(self) -> list[str]:
        found = {x["implementation"] for x in self.records}
        return [x.name for x in IMPLEMENTATIONS if x.name in found]

    def ratio(self, *cell) -> float | None:
        """The speed of an implementation over that without."""
        ours, plain = (self.tflops(*cell[:-1], name) for name in (cell[-1], PLAIN))
        return ours / plain if ours and plain else None


def markdown(results: ScoreResults) -> str:
    data, names = results.data, results.implementations()
    rows = []
    for cell in dict.fromkeys(key[:-1] for key in results.cells):
        mode, head_dim, causal, seqlen = cell
        plain = results.cells[*cell, PLAIN].get(f"{results.clock}_us")
        ratios = [results.ratio(*cell, name) for name in names if name != PLAIN]
        cells = [f"{x:.3f}" if x else "-" for x in ratios]
        rows.append([mode, str(head_dim), mask_name(causal), str(seqlen), f"{plain:.0f}", *cells])
    wanted = [
        [name, str(head_dim), *(f"{x:.2f}" if x else "-" for x in both)]
        for name, by_dim in WANTED.items()
        if name in names
        for head_dim, both in by_dim.items()
    ]
    parts = [
        f"# Sinks, caps and slopes on {data['environment']['device']}\n",
        f"{data['tokens']} tokens, hidden size {data['hidden']}. Microseconds by {results.clock} "
        "time of the call without, and the speed of the others as ratios to that.\n",
        table(["", ""], data["environment"].items()),
        table(
            ["mode", "head_dim", "mask", "seqlen", "plain, us", *(x for x in names if x != PLAIN)],
            rows,
        ),
        "Wanted at least:\n\n" + table(["", "head_dim", *MODES], wanted),
        *not_measured(results),
    ]
    return "\n".join(parts)


def write(data: dict, folder: Path) -> str:
    """Writes scores.md into folder; returns the report."""
    report = markdown(ScoreResults(data))
    (folder / "scores.md").write_text(report)
    return report


def main() -> int:
    parser: argparse.ArgumentParser = grid_options(__doc__)
    parser.add_argument("--quick", action="store_true", help=f"sequence lengths {QUICK_SEQLENS}")
    args = parser.parse_args()
    seqlens = tuple(args.seqlens or (QUICK_SEQLENS if args.quick else SEQLENS))
    args.budget_s = args.budget_s or (100 if args.quick else 420)
    problems = grid(args.tokens, args.hidden, seqlens, args.dtype)
    groups = [
        (problem, [x for x in programs if has_kernels(x.implementation, problem.head_dim)])
        for problem, programs in choose(problems, IMPLEMENTATIONS, args.filter)
    ]
    if args.dry_run:
        return dry_run(groups)
    data = run(args, groups, "scores", tokens=args.tokens, hidden=args.hidden)
    if not data["records"]:
        log("nothing was measured")
        return 1
    save(data, args.output / "scores.json")
    log("\n" + write(data, args.output))
    return 1 if any(x["error"] for x in data["records"]) else 0


if __name__ == "__main__":
    sys.exit(main())
