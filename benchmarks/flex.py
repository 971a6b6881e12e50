"""Speed of flex_attention's kernels with score and mask functions, beside the kernels without.

    python -m benchmarks.flex                           # what fits into 170 s of one GPU
    python -m benchmarks.flex --quick                   # three functions of 4096 tokens
    python -m benchmarks.flex --filter '^(jax_fa3 flex|torch flex):' --output FOLDER
    python -m benchmarks.flex --merge FOLDER/flex.json OTHER/flex.json
    python -m benchmarks.flex --dry-run                 # trace and lower only; needs no GPU

Timed as benchmarks.attention does. "jax_fa3 flex" takes block masks that were made before. "jax_fa3
plain" has no score function, and is told by is_causal, a window or a `Visibility` what a mask
function tells the others. "xla" is jax.nn's, with biases and masks that were made before. After
these come the first calls of functions, in processes of their own ("first call:NAME" for --filter),
and then "torch flex", torch's flex_attention, in another.
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp

import jax_fa3
from benchmarks import first_call, torch_attention, torch_flex
from benchmarks.attention import Group, dry_run, log, options, run
from benchmarks.environment import save
from benchmarks.functions import CAP, Functional, problems
from benchmarks.implementations import Function, Implementation, our_attention
from benchmarks.merge import add_option, merge
from benchmarks.problems import MODES
from benchmarks.render import NAMES, Results, not_measured, table
from benchmarks.timing import Program, platform
from jax_fa3.flex import link

OURS, PLAIN, XLA, TORCH = "jax_fa3 flex", "jax_fa3 plain", "xla", torch_flex.NAME
QUICK = ("identity", "softcap", "window")
FIRST_CALLS = ("identity", "ALiBi", "softcap", "table")
FIRST_CALL = "first call"
BF16_BF16_F32 = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
CLOCKS = ("kernel", "wall")

# Of the budget, after which no more of these starts; torch has the rest.
UNTIL_FIRST_CALLS, UNTIL_TORCH = 0.5, 0.8

# What is wanted: speeds over that without a function, by kernel time, of the forward and the
# backward pass; over others, of both; and seconds of a first call.
WANTED = {
    "identity": (0.88, 0.92),
    "ALiBi": (0.80, 0.85),
    "softcap": (0.65, None),
    "softcap approx": (0.65, None),
    "table": (0.60, None),
}
WANTED_OVER = {XLA: 6.0, TORCH: 1.2}
WANTED_FIRST_CALL = {"forward": 6.0, "both": 12.0}


class FlexProgram(Program):
    def error_of(self, got, want) -> float:
        return super().error_of(got, want[self.implementation.name != PLAIN])


def ours(problem: Functional, mode: str) -> Function:
    attention = our_attention(jax_fa3.flex_attention)

    def attend(query, key, value, captured, blocks):
        return attention(query, key, value, *problem.functions(captured), block_mask=blocks)

    return attend


def plain(problem: Functional, mode: str) -> Function:
    attend = partial(our_attention(), **problem.masking())
    return lambda query, key, value, seen=None: attend(query, key, value, visibility=seen)


def xla(problem: Functional, mode: str) -> Function:
    if problem.score == "softcap":
        return capped
    is_causal = problem.causal and not problem.has_mask
    return partial(jax.nn.dot_product_attention, is_causal=is_causal, implementation="xla")


def capped(query, key, value, bias, mask):
    """The steps of jax.nn's, which has no cap, with one."""
    products = dict(precision=BF16_BF16_F32, preferred_element_type=jnp.float32)
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, **products) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(CAP * jnp.tanh(scores / CAP)).astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


IMPLEMENTATIONS = (
    Implementation(OURS, ours, beside=Functional.operands, target="jax_fa3_flex_{mode}"),
    Implementation(PLAIN, plain, beside=Functional.visibility, target="jax_fa3_{mode}"),
    # Keeps the scores of every head in memory: timed where they fit.
    Implementation(XLA, xla, beside=Functional.dense, seqlens=range(4097), serial=True),
)
# To XLA these are another function's program: its tanh has no rough kind, and buckets are a bias.
SAME_FOR_XLA = ("softcap approx", "T5")


def choose(chosen: list[Functional], pattern: str) -> list[Group]:
    """The programs whose labels match, those of one problem and mode together."""
    groups = []
    for problem in chosen:
        for mode in MODES:
            programs = [
                FlexProgram(x, problem, mode)
                for x in IMPLEMENTATIONS
                if problem.seqlen in x.seqlens
                and not (x.name == XLA and problem.name in SAME_FOR_XLA)
            ]
            programs = [x for x in programs if re.search(pattern, x.label)]
            if programs:
                groups.append((problem, programs))
    return groups


# ---- linking


@contextlib.contextmanager
def only_named() -> Iterator[set[tuple[str, str]]]:
    """Programs are lowered with kernels that are not linked; gives their names and texts."""
    found = set()

    def named(name, text):
        found.add((name, text))
        return link.NO_KERNEL

    with mock.patch.object(link, "linked", named), mock.patch.object(link, "why_not", lambda: None):
        yield found


def link_all(groups: list[Group], timeout_s: float) -> None:
    """Fills the cache with the kernels that programs need, from many processes, so that lowering,
    which is serial, finds them. Errors are left to the programs."""
    programs = [x for _, programs in groups for x in programs if x.implementation.name == OURS]
    with only_named() as found:
        for program in programs:
            FlexProgram(program.implementation, program.problem, program.mode).attempt(
                program.lower, "cuda"
            )
    workers = max(1, min(len(found), 14, (os.cpu_count() or 2) - 1))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        wait([pool.submit(link.linked, *kernel) for kernel in found], timeout_s)
        pool.shutdown(wait=False, cancel_futures=True)
    log(f"{len(found)} kernels linked by {workers} processes")


# ---- the report


class FlexResults(Results):
    """Looked up by (mode, name of the problem, seqlen, implementation)."""

    fields = ("mode", "name", "seqlen", "implementation")

    def where(self, record: dict) -> str:
        return f"{record['name']} {record['seqlen']}"

    def microseconds(self, *cell, clock: str) -> float | None:
        return self.cells.get(cell, {}).get(f"{clock}_us")

    def ratios(self, *cell) -> list[float | None]:
        """An implementation's time over ours, by each clock."""
        *where, name = cell
        pairs = [[self.microseconds(*where, x, clock=c) for x in (name, OURS)] for c in CLOCKS]
        return [pair[0] / pair[1] if all(pair) else None for pair in pairs]


def both_clocks(numbers: list[float | None], form: str) -> str:
    return " / ".join(f"{x:{form}}" if x else "-" for x in numbers) if any(numbers) else "-"


def speeds(results: FlexResults, mode: str) -> str:
    """A row for each problem, in the order of the run."""
    others = [x for x in (XLA, TORCH) if x in results.implementations()]
    cells = dict.fromkeys(cell[:3] for cell in results.cells if cell[0] == mode)
    rows = []
    for _, name, seqlen in cells:
        wanted = WANTED.get(name, (None, None))[MODES.index(mode)]
        times = [results.microseconds(mode, name, seqlen, OURS, clock=c) for c in CLOCKS]
        ratios = [results.ratios(mode, name, seqlen, x) for x in (PLAIN, *others)]
        over_plain, *over = (both_clocks(x, ".2f") for x in ratios)
        us, wanted = both_clocks(times, ".0f"), f"{wanted:.2f}" if wanted else "-"
        rows.append([name, str(seqlen), us, over_plain, wanted, *over])
    names = [f"over {NAMES[x]}, wanted {WANTED_OVER[x]:g}" for x in others]
    header = ["function", "tokens", f"{OURS}, us", "over plain", "wanted", *names]
    return f"## {mode.capitalize()}\n\n" + table(header, rows) if rows else ""


def first_calls(records: list[dict]) -> str:
    """Seconds: a row for each call, and what is wanted."""
    columns = [(x, y) for x in (first_call.LINKED, first_call.CACHED) for y in first_call.PASSES]
    cells = {(x["name"], x["process"], x["passes"]): x for x in records}
    rows = []
    for name in dict.fromkeys(x["name"] for x in records):
        seconds = [cells.get((name, *x), {}).get("seconds") for x in columns]
        rows.append([name, *(f"{x:.2f}" if x else "-" for x in seconds)])
    rows.append(["wanted at most", *(f"{x:g}" for x in WANTED_FIRST_CALL.values()), "-", "-"])
    header = ["seconds", *(f"{passes}, {process}" for process, passes in columns)]
    errors = dict.fromkeys(x["error"] for x in records if x["error"])
    return "\n".join(["## First calls\n", table(header, rows), *(f"`-`: {x}\n" for x in errors)])


def markdown(results: FlexResults) -> str:
    data = results.data
    parts = [
        f"# Score and mask functions on {data['environment']['device']}\n",
        "Head dim 128, 16 heads, bfloat16, 16,384 tokens in all. Medians over rounds, by kernel / "
        "wall time; ratios are the speed of jax_fa3 flex over others'. The plain call has no score "
        "function, and is_causal, a window or documents in place of a mask function. Mask "
        "functions have block masks. XLA was not asked for 16,384 tokens in a sequence, whose "
        f"scores do not fit, nor for {' and '.join(SAME_FOR_XLA)}, which are the programs of "
        "softcap and table to it. Torch runs after the others, in a process of its own.\n",
        table(["", ""], data["environment"].items()),
        *(speeds(results, mode) for mode in MODES),
        first_calls(data["first_calls"]) if data.get("first_calls") else "",
        *not_measured(results),
        *([f"{TORCH} was left out: {data['no_torch']}.\n"] if data.get("no_torch") else []),
    ]
    return "\n".join(filter(None, parts))


def write(data: dict, folder) -> str:
    """Writes flex.md into folder; returns the report."""
    report = markdown(FlexResults(data))
    (folder / "flex.md").write_text(report)
    return report


# ---- the run


def add_first_calls(data: dict, args: argparse.Namespace, timeout_s: float) -> None:
    """The seconds of those whose labels match."""
    labels = {x: f"{FIRST_CALL}:{x}" for x in FIRST_CALLS}
    asked = [name for name, label in labels.items() if re.search(args.filter, label)]
    if timeout_s <= 0:
        data["skipped"] += map(labels.get, asked)
    elif asked:
        data["first_calls"] = first_call.records(asked, timeout_s)
        for x in data["first_calls"]:
            took = x["error"] or f"{x['seconds']:.2f} s"
            log(f"  {labels.get(x['name'], x['name'])}, {x['passes']}, {x['process']}: {took}")


def add_torch(
    data: dict, chosen: list[Functional], args: argparse.Namespace, timeout_s: float
) -> None:
    """The records of torch, of the problems whose labels match."""
    every = [(x, mode) for x in chosen if torch_flex.can_say(x) for mode in MODES]
    labels = [f"{TORCH}:{mode}:{x.label}" for x, mode in every]
    asked = [x for x, label in zip(every, labels, strict=True) if re.search(args.filter, label)]
    if asked and (why := torch_attention.absent()):
        data["no_torch"] = why
        log(f"{TORCH}: left out, {why}")
    elif timeout_s <= 0:
        data["skipped"] += [f"{TORCH}:{mode}:{x.label}" for x, mode in asked]
    elif asked:
        command = torch_flex.COMMAND
        found = torch_attention.records(asked, args.rounds, timeout_s, command, TORCH)
        for x in found:
            took = x["error"] or f"{x['kernel_us']:9.1f} us kernel {x['wall_us']:9.1f} us wall"
            log(f"  {TORCH}:{x['mode']}:{x['name']} {x['seqlen']} {took}")
        data["records"] += found


def parse() -> argparse.Namespace:
    parser = options(__doc__)
    parser.set_defaults(budget_s=170)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    add_option(parser)
    return parser.parse_args()


def main() -> int:
    start, args = time.monotonic(), parse()
    path = args.output / "flex.json"
    if args.merge:
        log(merge(args.merge, path, write))
        return 0
    chosen = list(problems())
    if args.quick:
        chosen = [x for x in chosen if x.name in QUICK and x.seqlen == 4096]
    groups = choose(chosen, args.filter)
    if args.dry_run:
        with only_named():
            return dry_run(groups)

    def left(share: float) -> float:
        """Seconds until a share of the budget is used up."""
        return start + share * args.budget_s - time.monotonic()

    if platform() == "cuda" and not link.why_not():
        link_all(groups, left(UNTIL_FIRST_CALLS))
    for_run = argparse.Namespace(**vars(args))
    for_run.budget_s = left(UNTIL_FIRST_CALLS)
    data = run(for_run, groups, "flex", chunk_of=lambda x: f"{x.name} {x.seqlen}")
    if platform() == "cuda":
        add_first_calls(data, args, left(UNTIL_TORCH))
        save(data, path)
        add_torch(data, chosen, args, left(1.0))
    if not data["records"] and not data.get("first_calls"):
        log("nothing was measured")
        return 1
    data["seconds"] = round(time.monotonic() - start)
    save(data, path)
    log("\n" + write(data, args.output))
    wrong = [x for x in data["records"] if x["implementation"] in (OURS, PLAIN) and x["error"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
