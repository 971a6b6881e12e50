"""Speed of attention with a bias, and with a boolean mask, beside what else JAX has for that.

    python -m benchmarks.bias                           # what fits into 9 minutes of one GPU
    python -m benchmarks.bias --quick                   # two biases and two masks, within 3
    python -m benchmarks.bias --filter '^(jax_fa3|cudnn):.*:pair' --output FOLDER
    python -m benchmarks.bias --merge FOLDER/bias.json OTHER/bias.json
    python -m benchmarks.bias --dry-run                 # trace and lower only; needs no GPU

Timed as benchmarks.attention does, but for the gradients: one call has the forward pass and the
gradients of query, key and value, and of the bias too ("gradients") or not ("gradients-no-dbias").
"jax_fa3 xla" is jax_fa3 without its kernels; "jax_fa3 plain" has no bias, and is told by is_causal,
lengths or segment ids what a mask tells the others. "cudnn" and "xla" are jax.nn's.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp

import jax_fa3
from benchmarks.attention import Group, dry_run, log, options, run
from benchmarks.dense import MODES, Dense, dense_problems, largest_error
from benchmarks.implementations import (
    Function,
    Implementation,
    available,
    our_attention,
    tokamax,
)
from benchmarks.merge import add_option, merge
from benchmarks.render import NAMES, OURS, Results, not_measured, table
from benchmarks.timing import Program

QUICK = ("pair", "relative", "causal", "padding")
PLAIN, BY_XLA = "jax_fa3 plain", "jax_fa3 xla"

# What is wanted. With a bias: the geometric mean of our speed over another's.
WANTED_SPEED = {
    ("cudnn", "forward"): 1.5,
    ("cudnn", "gradients"): 1.4,
    (BY_XLA, "forward"): 8.0,
    (BY_XLA, "gradients"): 3.9,
}
# With a mask: our time over that of is_causal or lengths, and the microseconds of one problem.
SAID_PLAINLY, WANTED_TIME = ("causal", "causal by sequence", "padding"), 1.15
WANTED_US = {("causal", "forward"): 450, ("causal", "gradients"): 1820}


class DenseProgram(Program):
    """The forward pass, or that and the gradients in one call."""

    @property
    def direction(self) -> str:
        return "forward" if self.mode == "forward" else "backward"

    def lower(self, platform: str) -> None:
        *qkv, dout = self.problem.shapes()
        arrays = jax.eval_shape(lambda: self.implementation.beside(self.problem))
        traced = jax.jit(self.results).trace(*qkv, arrays, dout)
        self.lowered = [traced.lower(lowering_platforms=(platform,))]

    def results(self, query, key, value, arrays: dict[str, jax.Array], dout):
        """The output, and the gradients that the mode has; a bias' is the last."""
        function = self.implementation.build(self.problem, self.mode)
        if self.mode == "forward":
            return function(query, key, value, **arrays)
        fixed = dict(arrays)
        bias = fixed.pop("bias", None) if self.mode == "gradients" else None

        def attend(query, key, value, bias):
            given = fixed if bias is None else fixed | dict(bias=bias)
            return function(query, key, value, **given)

        out, pullback = jax.vjp(attend, query, key, value, bias)
        return out, *pullback(dout)

    def take(self, inputs: list[jax.Array]) -> None:
        *qkv, dout = inputs
        arrays = jax.tree.map(jnp.asarray, self.implementation.beside(self.problem))
        self.args = *qkv, arrays, dout
        self.run = self.compiled[-1]

    def error_of(self, got, want) -> float:
        got = jax.tree.leaves(got)
        want = jax.tree.leaves(want[self.implementation.name != PLAIN])
        return largest_error(got, want[: len(got)])


def ours(problem: Dense, mode: str) -> Function:
    return our_attention()


def plain(problem: Dense, mode: str) -> Function:
    said, _ = problem.said
    return partial(our_attention(), **said)


def by_xla(problem: Dense, mode: str) -> Function:
    return partial(jax_fa3.dot_product_attention, implementation="xla")


def cudnn(problem: Dense, mode: str) -> Function:
    """What is the same for all rows is broadcast in the call: cuDNN takes a value for each."""

    def attend(query, key, value, **arrays):
        square = (problem.seqlen, problem.seqlen)
        arrays = {name: jnp.broadcast_to(x, x.shape[:2] + square) for name, x in arrays.items()}
        return jax.nn.dot_product_attention(query, key, value, **arrays, implementation="cudnn")

    return attend


def xla(problem: Dense, mode: str) -> Function:
    return partial(jax.nn.dot_product_attention, implementation="xla")


# Peers may sum a bias' gradient over the sequences in bfloat16.
PEER = dict(beside=Dense.arrays, tolerance=1e-1)
IMPLEMENTATIONS = (
    Implementation(OURS, ours, beside=Dense.arrays, target="jax_fa3_{mode}"),
    Implementation(PLAIN, plain, beside=lambda x: x.said[1], target="jax_fa3_{mode}"),
    Implementation(BY_XLA, by_xla, beside=Dense.arrays),
    Implementation("cudnn", cudnn, **PEER),
    Implementation("xla", xla, serial=True, **PEER),
    Implementation("tokamax", partial(tokamax, "mosaic"), package="tokamax", **PEER),
)


def choose(problems: list[Dense], pattern: str) -> list[Group]:
    """The programs whose labels match, those of one problem together."""
    implementations, groups = available(IMPLEMENTATIONS, log), []
    for problem in problems:
        every = [
            DenseProgram(x, problem, mode)
            for mode in problem.modes
            for x in implementations
            if not (x.name == PLAIN and problem.said is None)
        ]
        programs = [x for x in every if re.search(pattern, x.label)]
        if programs:
            groups.append((problem, programs))
    return groups


class DenseResults(Results):
    """Looked up by (mode, name of the problem, implementation)."""

    fields = ("mode", "name", "implementation")

    def where(self, record: dict) -> str:
        return record["name"]

    def problems(self, has_bias: bool) -> list[dict]:
        """A record of each, in the order of the run."""
        found = {x["name"]: x for x in self.records if bool(x["bias"]) == has_bias}
        return list(found.values())

    def microseconds(self, mode: str, name: str, implementation: str) -> float | None:
        return self.cells.get((mode, name, implementation), {}).get(f"{self.clock}_us")

    def ratios(self, mode: str, names: Iterable[str], over: str, under: str) -> dict[str, float]:
        """Of two implementations' times, by problem, where both ran."""
        times = {x: [self.microseconds(mode, x, y) for y in (over, under)] for x in names}
        return {name: pair[0] / pair[1] for name, pair in times.items() if all(pair)}


def summary_row(what: str, mode: str, ratios: dict[str, float], worst, wanted: str) -> list[str]:
    """`worst` is min or max."""
    name = worst(ratios, key=ratios.get)
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    return [what, mode, str(len(ratios)), f"{mean:.2f}", f"{ratios[name]:.2f} ({name})", wanted]


def summary(results: DenseResults) -> str:
    """Ratios to every other implementation: a row for each mode, with what is wanted of it."""
    biases, masks = ([x["name"] for x in results.problems(has)] for has in (True, False))
    said_plainly = [name for name in masks if name in SAID_PLAINLY]
    peers = [name for name in results.implementations() if name not in (OURS, PLAIN)]
    rows = []

    def add(what, mode, ratios, worst, wanted="-"):
        if ratios:
            rows.append(summary_row(what, mode, ratios, worst, wanted))

    for peer, mode in product(peers, MODES):
        wanted = WANTED_SPEED.get((peer, mode))
        ratios = results.ratios(mode, biases, peer, OURS)
        wanted = f"mean at least {wanted}" if wanted else "-"
        add(f"bias: speed over {NAMES[peer]}", mode, ratios, min, wanted)
    for mode in MODES:
        ratios = results.ratios(mode, biases, OURS, PLAIN)
        add("bias: time over that without", mode, ratios, max)
    for peer, mode in product(peers, MODES):
        ratios = results.ratios(mode, masks, peer, OURS)
        add(f"mask: speed over {NAMES[peer]}", mode, ratios, min)
    for mode in MODES:
        ratios = results.ratios(mode, said_plainly, OURS, PLAIN)
        wanted = f"each at most {WANTED_TIME}"
        add("mask: time over is_causal, lengths", mode, ratios, max, wanted)
    header = ["", "mode", "problems", "geometric mean", "worst", "wanted"]
    absolute = [
        f"{name}, {mode}: {us:.0f} us, wanted at most {wanted}.\n"
        for (name, mode), wanted in WANTED_US.items()
        if (us := results.microseconds(mode, name, OURS))
    ]
    return "\n".join([table(header, rows), *absolute])


def shape(record: dict) -> str:
    """As B x T x N x H, with the number of key/value heads where it is another."""
    kv_heads = f" ({record['kv_heads']})" if record["kv_heads"] else ""
    sizes = (record["batch"], record["seqlen"], f"{record['heads']}{kv_heads}", record["head_dim"])
    return " x ".join(map(str, sizes))


def times(results: DenseResults, mode: str, has_bias: bool) -> str:
    """Microseconds of every problem; "refused" where an implementation has an error."""
    names = results.implementations()

    def cell(problem: dict, name: str) -> str:
        us = results.microseconds(mode, problem["name"], name)
        asked = (mode, problem["name"], name) in results.cells
        return f"{us:.0f}" if us else "refused" if asked else "-"

    rows = [
        [problem["name"], shape(problem), *(cell(problem, name) for name in names)]
        for problem in results.problems(has_bias)
        if mode in {x["mode"] for x in results.records if x["name"] == problem["name"]}
    ]
    what = "bias" if has_bias else "mask"
    title = f"## {what.capitalize()}, {mode}\n\n"
    return title + table([what, "shape", *map(NAMES.get, names)], rows) if rows else ""


def markdown(results: DenseResults) -> str:
    data = results.data
    parts = [
        f"# Biases and masks on {data['environment']['device']}\n",
        f"Microseconds by {results.clock} time, median over rounds, bfloat16; shapes are batch x "
        "tokens x heads (of key and value) x head_dim. cuDNN and XLA are jax.nn's. The plain call "
        "has no bias, and is_causal, lengths or segment ids in place of a mask.\n",
        table(["", ""], data["environment"].items()),
        summary(results),
        *(times(results, mode, has_bias) for has_bias in (True, False) for mode in MODES),
        *not_measured(results),
    ]
    return "\n".join(filter(None, parts))


def write(data: dict, folder: Path) -> str:
    """Writes bias.md into folder; returns the report."""
    report = markdown(DenseResults(data))
    (folder / "bias.md").write_text(report)
    return report


def parse() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    add_option(parser)
    args = parser.parse_args()
    args.budget_s = args.budget_s or (150 if args.quick else 480)
    return args


def main() -> int:
    args = parse()
    if args.merge:
        log(merge(args.merge, args.output / "bias.json", write))
        return 0
    problems = [x for x in dense_problems() if not args.quick or x.name in QUICK]
    groups = choose(problems, args.filter)
    if args.dry_run:
        return dry_run(groups)
    data = run(args, groups, "bias")
    if not data["records"]:
        log("nothing was measured")
        return 1
    log("\n" + write(data, args.output))
    ours = {OURS, PLAIN, BY_XLA}
    return 1 if any(x["error"] for x in data["records"] if x["implementation"] in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
