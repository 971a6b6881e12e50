"""Speed of attention over the FlashAttention-3 paper's grid, jax_fa3 beside its peers.

    python -m benchmarks.attention                      # the grid, within 9 minutes of one GPU
    python -m benchmarks.attention --quick              # three sequence lengths, within 3
    python -m benchmarks.attention --filter 'd128-causal' --rounds 7
    python -m benchmarks.attention --dry-run            # trace and lower only; needs no GPU

Everything runs in one process. The implementations of a problem are timed turn by turn over several
rounds, because a board at its power limit drifts. Answers are checked before they are timed.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import render, torch_attention
from benchmarks.environment import RESULTS, environment, save
from benchmarks.implementations import IMPLEMENTATIONS, Implementation, available
from benchmarks.problems import DTYPES, QUICK_SEQLENS, SEQLENS, Problem, grid
from benchmarks.timing import Program, platform

Group = tuple[Problem, list[Program]]
TORCH_SHARE = 0.25  # of the budget, for torch's process


def log(text: str) -> None:
    print(text, flush=True)


def choose(
    problems: Iterable[tuple[Problem, str]], implementations: Iterable[Implementation], pattern: str
) -> list[Group]:
    """The programs whose labels match, those of one problem and mode together."""
    groups = []
    for problem, mode in problems:
        programs = [
            Program(implementation, problem, mode)
            for implementation in implementations
            if problem.seqlen in implementation.seqlens
        ]
        programs = [x for x in programs if re.search(pattern, x.label)]
        if programs:
            groups.append((problem, programs))
    return groups


def compile_all(groups: list[Group]) -> None:
    """Lowers on this thread and compiles on others; serial compilations come last, alone."""
    serial = []
    with ThreadPoolExecutor(max(1, min(12, (os.cpu_count() or 2) - 1))) as pool:
        for program in (x for _, programs in groups for x in programs):
            program.attempt(program.lower, platform())
            if program.implementation.serial:
                serial.append(program)
            else:
                pool.submit(program.attempt, program.compile)
    for program in serial:
        program.attempt(program.compile)


def measure(group: Group, rounds: int, kernel_clock: bool) -> None:
    """Times the programs of a problem turn by turn; each round starts with another one."""
    problem, programs = group
    inputs = problem.inputs()
    want = problem.reference(inputs)
    for program in programs:
        program.attempt(program.load, inputs, want)
    del want
    orders = [programs[i % len(programs) :] + programs[: i % len(programs)] for i in range(rounds)]
    for order in orders:
        for program in order:
            program.attempt(program.wall_round)
    for order in orders if kernel_clock else ():
        for program in order:
            program.attempt(program.kernel_round, order is orders[-1])


def report(program: Program) -> None:
    row = program.record()
    parts = [
        f"{row[f'{clock}_us']:9.1f} us {clock} {row[f'{clock}_tflops']:6.0f} TFLOP/s"
        for clock in ("kernel", "wall")
        if f"{clock}_us" in row
    ]
    log(f"  {program.label:55} {row['error'] or '   '.join(parts)}")


def by_head_dim(problem: Problem) -> str:
    return f"head_dim {problem.head_dim}"


def run(
    args: argparse.Namespace,
    groups: list[Group],
    name: str,
    chunk_of: Callable[[Problem], str] = by_head_dim,
    **facts,
) -> dict:
    """Compiles and measures chunk by chunk, saving after each problem, until time is out.

    The results, and `facts` with them, go to NAME.json.
    """
    start = time.monotonic()
    data = dict(environment=environment(), **facts, rounds=args.rounds, skipped=[], records=[])
    chunks: dict[str, list[Group]] = {}
    for group in groups:
        chunks.setdefault(chunk_of(group[0]), []).append(group)
    for what, chunk in chunks.items():
        if time.monotonic() - start < args.budget_s:
            compile_all(chunk)
            log(f"[{time.monotonic() - start:4.0f} s] {what} compiled")
        for problem, programs in chunk:
            if time.monotonic() - start > args.budget_s:
                data["skipped"] += [x.label for x in programs]
                continue
            measure((problem, programs), args.rounds, kernel_clock=platform() == "cuda")
            for program in programs:
                report(program)
                data["records"].append(program.record())
                program.release()
            data["seconds"] = round(time.monotonic() - start)
            save(data, args.output / f"{name}.json")
    if data["skipped"]:
        log(f"out of time: {len(data['skipped'])} measurements skipped")
    return data


def add_torch(data: dict, problems: list[tuple[Problem, str]], args: argparse.Namespace) -> None:
    """The records of FlashAttention-2's kernels, of the problems whose labels match, within the
    budget in seconds."""
    name = torch_attention.NAME
    asked = [x for x in problems if re.search(args.filter, f"{name}:{x[1]}:{x[0].label}")]
    if why := torch_attention.absent():
        log(f"{name}: left out, {why}")
    elif asked:
        data["records"] += torch_attention.records(asked, args.rounds, args.budget_s)
        save(data, args.output / "attention.json")


def dry_run(groups: list[Group]) -> int:
    """Lowers everything for CUDA; what has a custom call of its own must come out as that.

    Peers that refuse to lower without their CUDA libraries are reported, no more.
    """
    failed = 0
    for program in (x for _, programs in groups for x in programs):
        program.attempt(program.lower, "cuda")
        if program.implementation.target:
            program.attempt(program.expect_custom_call)
            failed += program.error is not None
        log(f"  {program.label:55} {program.error or 'lowered'}")
    return 1 if failed else 0


def options(description: str) -> argparse.ArgumentParser:
    """What all benchmarks that use `run` are asked for in the same words."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--filter", default="", help="regular expression, on IMPLEMENTATION:LABEL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-s", type=float, help="start nothing new after so many seconds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="trace and lower only")
    return parser


def grid_options(description: str) -> argparse.ArgumentParser:
    """`options`, and those of the grid."""
    parser = options(description)
    parser.add_argument("--seqlens", type=int, nargs="+", help="these sequence lengths instead")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tokens", type=int, default=16384, help="batch x sequence length")
    parser.add_argument("--hidden", type=int, default=2048, help="heads x head_dim")
    return parser


def main() -> int:
    parser = grid_options(__doc__)
    parser.add_argument("--quick", action="store_true", help=f"sequence lengths {QUICK_SEQLENS}")
    args = parser.parse_args()
    args.seqlens = args.seqlens or (QUICK_SEQLENS if args.quick else SEQLENS)
    args.budget_s = args.budget_s or (150 if args.quick else 480)
    problems = list(grid(args.tokens, args.hidden, args.seqlens, args.dtype))
    groups = choose(problems, available(IMPLEMENTATIONS, log), args.filter)
    if args.dry_run:
        return dry_run(groups)
    for_torch = argparse.Namespace(**vars(args))
    for_torch.budget_s = TORCH_SHARE * args.budget_s
    args.budget_s -= 0 if torch_attention.absent() else for_torch.budget_s
    data = run(args, groups, "attention", tokens=args.tokens, hidden=args.hidden)
    add_torch(data, problems, for_torch)
    if not data["records"]:
        log("nothing was measured")
        return 1
    log("\n" + render.write(data, args.output))
    wrong = [x for x in data["records"] if x["implementation"] == "jax_fa3" and x["error"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
