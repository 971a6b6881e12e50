"""Builds of jax_fa3 against each other: the same cells, interleaved, as ratios to the first.

    python -m benchmarks.ab BASE VARIANT [VARIANT ...] [--filter d128-causal] [--rounds 5]
    python -m benchmarks.ab BASE VARIANT --packed       # packed documents, benchmarks.packed's
    python -m benchmarks.ab BASE VARIANT --padded       # batches of sequences that end in padding

A build is a folder that holds the package `jax_fa3`, or a path to another `_C*.so`, which then
stands in for the one beside this checkout's package; NAME=PATH names it in the table. Each build
lives in a process of its own and all take turns on one GPU, cell by cell and round by round.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def package_root(path: Path, scratch: Path) -> Path:
    """The folder to import jax_fa3 from; for a library, one of links with it in place of ours."""
    if path.is_dir():
        return path
    package = scratch / "jax_fa3"
    package.mkdir(parents=True)
    for entry in (ROOT / "jax_fa3").iterdir():
        if not re.fullmatch(r"_C\..*so|__pycache__", entry.name):
            (package / entry.name).symlink_to(entry)
    (package / path.name).symlink_to(path)
    return scratch


class Worker:
    """A process with one build; answers one JSON line per request line."""

    def __init__(self, name: str, root: Path, dry_run: bool):
        self.name = name
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(root), str(ROOT)]),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the builds share the GPU's memory
        }
        command = [sys.executable, "-P", "-m", "benchmarks.ab", "--worker", str(root)]
        self.process = subprocess.Popen(
            command + ["--dry-run"] * dry_run, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, request: dict):
        """The answer to a request; a worker that ended ends the run."""
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.name}: the worker ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve(root: Path, dry_run: bool) -> int:
    """The worker: loads, times and drops one cell after another, as asked on stdin."""
    # Only the standard finders, which are classes: an editable install's finder would put its own
    # package in front of PYTHONPATH.
    sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may write into the answers
    import jax_fa3
    from benchmarks import packed
    from benchmarks.float8 import OURS
    from benchmarks.implementations import IMPLEMENTATIONS
    from benchmarks.problems import Packed, Padded, Problem
    from benchmarks.timing import Program, platform

    if not Path(jax_fa3.__file__).is_relative_to(root):
        raise ImportError(f"jax_fa3 came from {jax_fa3.__file__}; expected {root}")
    types = {x.__name__: x for x in (Problem, Packed, Padded)}
    plain = {x.name: x for x in (*IMPLEMENTATIONS, *OURS)}
    implementations = dict(Problem=plain, Padded=plain)
    implementations |= dict(Packed={x.name: x for x in packed.IMPLEMENTATIONS})
    program = None
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            problem = types[request["type"]](**request["load"])
            implementation = implementations[request["type"]][request["implementation"]]
            program = Program(implementation, problem, request["mode"])
            program.attempt(program.lower, "cuda" if dry_run else platform())
            if not dry_run:
                inputs = problem.inputs()
                want = problem.reference(inputs)
                program.attempt(program.compile)
                program.attempt(program.load, inputs, want)
                del inputs, want
        elif not dry_run:
            program.attempt(program.wall_round)
            if platform() == "cuda":
                program.attempt(program.kernel_round, True)
        print(json.dumps(program.record()), file=answers, flush=True)
    return 0


def cases(args: argparse.Namespace):
    """(problem, mode), one after another."""
    from benchmarks import problems

    if args.cases == "packed":
        return problems.packed_grid(
            (args.tokens,), problems.HEAD_DIMS, problems.DOCUMENTS, args.dtype
        )
    if args.cases == "padded":
        seqlens = tuple(args.seqlens or problems.PADDED_SEQLENS)
        return problems.padded_grid(args.tokens, 2048, seqlens, args.dtype)
    seqlens = tuple(args.seqlens or problems.QUICK_SEQLENS)
    return problems.grid(args.tokens, 2048, seqlens, args.dtype)


def compare(workers: list[Worker], args: argparse.Namespace) -> None:
    """Prints a line per cell: microseconds of the first build, and the others' speed over it."""
    others = "".join(f"{worker.name[:14]:>16}" for worker in workers[1:])
    print(f"{'cell':64}{workers[0].name[:14] + ', us':>18}{others}")
    for problem, mode in cases(args):
        label = f"{mode}:{problem.label}"
        if not re.search(args.filter, label):
            continue
        load = dict(load=vars(problem), type=type(problem).__name__, mode=mode)
        load |= dict(implementation=args.implementation)
        rows = [worker.ask(load) for worker in workers]
        for _ in range(args.rounds):
            rows = [worker.ask({"round": None}) for worker in workers]
        print(f"{label:64}{cells(rows)}", flush=True)


def cells(rows: list[dict]) -> str:
    """Times of the first row and ratios of the rest, round by round, with their spread."""
    errors = [x["error"] for x in rows if x["error"]]
    if errors:
        return "  " + errors[0]
    clock = "kernel" if all("kernel_us_rounds" in x for x in rows) else "wall"
    times = [x.get(f"{clock}_us_rounds") for x in rows]
    if not all(times):
        return "  lowered"
    text = f"{statistics.median(times[0]):>13.1f} {clock:4.4}"
    for other in times[1:]:
        ratios = [a / b for a, b in zip(times[0], other, strict=True)]
        spread = (max(ratios) - min(ratios)) / 2
        text += f"{statistics.median(ratios):>9.3f} ±{spread:.3f}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("builds", nargs="*", metavar="[NAME=]PATH")
    parser.add_argument("--filter", default="", help="regular expression, on MODE:LABEL")
    parser.add_argument(
        "--implementation",
        default="jax_fa3",
        help="whose program is timed: jax_fa3, or a column of benchmarks.float8 or, with --packed, "
        "of benchmarks.packed such as 'jax_fa3 direct'",
    )
    for kind, what in (("packed", "packed documents"), ("padded", "padded batches")):
        parser.add_argument(
            f"--{kind}", dest="cases", action="store_const", const=kind, help=f"{what} instead"
        )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seqlens", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, default=16384, help="batch x sequence length")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--dry-run", action="store_true", help="trace and lower only")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(args.worker, args.dry_run)
    if len(args.builds) < 2:
        parser.error("two builds or more are needed")
    with tempfile.TemporaryDirectory() as scratch:
        workers = []
        for i, build in enumerate(args.builds):
            name, _, path = build.rpartition("=")
            root = package_root(Path(path).resolve(), Path(scratch) / str(i))
            workers.append(Worker(name or f"build {i}", root, args.dry_run))
        compare(workers, args)
        for worker in workers:
            worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
