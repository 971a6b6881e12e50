"""What each part of the forward kernel is worth: builds that leave it out, against the whole one.

    make bench-ablation                             # builds the variants, then runs this
    python -m benchmarks.ablation build/ablation    # a folder of builds, named for what they lack

The problem is that of the FlashAttention-3 paper's ablation: batch 4, 8448 tokens, 16 heads of 128,
bf16, forward, dense. Builds take turns, round by round, each in a process of its own (see ab.py).
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.ab import Worker, package_root
from benchmarks.environment import RESULTS, environment, save
from benchmarks.problems import Problem
from benchmarks.render import pyplot, table

PROBLEM = Problem(batch=4, seqlen=8448, heads=16, head_dim=128)
PARTS = {
    "none": "the whole kernel",
    "rescale": "O rescaled only when a maximum grew by 2^8",
    "ping-pong": "warpgroups take turns to issue GEMMs",
    "overlap": "softmax under the warpgroup's own O += P V",
    "192-rows": "tiles of 192 rows by three warpgroups (then 128 by two)",
    "192-rows,overlap": "both of these",
    "192-rows,specialisation": "tiles of 192 rows; a warpgroup of its own for loads",
}


def measure(folder: Path, rounds: int) -> list[dict]:
    """A row for each build found, the whole kernel's first."""
    found = [name for name in PARTS if (folder / name).is_dir()]
    if "none" not in found:
        raise SystemExit(f"{folder} has no build 'none'; make ablation-builds makes them all")
    with tempfile.TemporaryDirectory() as scratch:
        workers = []
        for name in found:
            library = next((folder / name).glob("_C.*so")).resolve()
            workers.append(Worker(name, package_root(library, Path(scratch) / name), False))
        rows = [x.ask({"load": vars(PROBLEM), "mode": "forward"}) for x in workers]
        for _ in range(rounds):
            rows = [x.ask({"round": None}) for x in workers]
        for worker in workers:
            worker.close()
    return [dict(without=name) | row for name, row in zip(found, rows, strict=True)]


def render(data: dict) -> str:
    whole = data["records"][0]["kernel_us_rounds"]
    lines = []
    for x in data["records"]:
        speed = [a / b for a, b in zip(whole, x.get("kernel_us_rounds", []), strict=False)]
        ratio = f"{statistics.median(speed):.3f}" if speed else x["error"]
        lines.append([x["without"], PARTS[x["without"]], f"{x.get('kernel_tflops', 0):.0f}", ratio])
    title = f"# Ablation: {PROBLEM.label}, forward\n"
    heads = ["without", "what that is", "TFLOP/s", "of the whole"]
    return "\n".join([title, table(["", ""], data["environment"].items()), table(heads, lines)])


def plot(data: dict, path: Path) -> None:
    rows = [x for x in data["records"] if "kernel_tflops" in x][::-1]
    figure, axes = pyplot().subplots(figsize=(7, 0.45 * len(rows) + 1), layout="constrained")
    names = [x["without"].replace("none", "whole kernel").replace(",", ", ") for x in rows]
    bars = axes.barh(names, [x["kernel_tflops"] for x in rows], color="#4c72b0")
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel("TFLOP/s, without the named parts")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of builds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    records = measure(args.folder, args.rounds)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    data = dict(environment=environment(), records=records)
    save(data, args.output / "ablation.json")
    if records[0]["error"]:
        raise SystemExit(f"the whole kernel: {records[0]['error']}")
    report = render(data)
    (args.output / "ablation.md").write_text(report)
    plot(data, args.output / "ablation.png")
    print("\n" + report)
    return 1 if any(x["error"] for x in data["records"]) else 0


if __name__ == "__main__":
    sys.exit(main())
