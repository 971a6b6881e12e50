"""Tables and plots of saved results.

python -m benchmarks.render                         # benchmarks/results/attention.json
python -m benchmarks.render FILE.json --output FOLDER
python -m benchmarks.render --readme                # also fills in README.md and docs/speed.md
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.environment import RESULTS
from benchmarks.problems import MODES

ROOT = Path(__file__).resolve().parent.parent
README, SPEED = ROOT / "README.md", ROOT / "docs/speed.md"
OURS = "jax_fa3"
NAMES = {OURS: "jax_fa3", "cudnn": "cuDNN", "xla": "XLA", "mosaic": "Mosaic GPU"}
NAMES |= {"triton": "Pallas Triton", "tokamax triton": "tokamax Triton", "FA2": "FA2 (torch)"}
NAMES |= {x: x for x in ("float8", "float8 from bf16", "bf16", "cuDNN fp8")}  # benchmarks.float8's
NAMES |= {x: x for x in ("jax_fa3 direct", "FA3", "cuDNN packed", "cuDNN mask")}  # packed's
NAMES |= {x: x for x in ("jax_fa3 plain", "jax_fa3 xla", "tokamax")}  # bias'
NAMES |= {"jax_fa3 forward": "jax_fa3 forward"}  # decode's
NAMES |= {x: x for x in ("jax_fa3 flex", "torch flex")}  # flex's
COLORS = {OURS: "#c2410c", "cudnn": "#3f7d20", "xla": "#7c7f86", "mosaic": "#2a6fbb"}
COLORS |= {"FA2": "#8a5a9e", "FA3": "#1f1f1f", "triton": "#b08d2e"}
COLORS |= {"tokamax": "#4fa3a5", "tokamax triton": "#9bc9ca"}
COLORS |= {"float8": "#c2410c", "float8 from bf16": "#e39a3b"}
COLORS |= {"bf16": "#2a6fbb", "cuDNN fp8": "#3f7d20"}
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4}  # bf16, dense, by data sheet


def mask_name(causal: bool) -> str:
    return "causal" if causal else "dense"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(header)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(x.replace("|", "\\|") for x in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


class Results:
    """The records of one run, looked up by (mode, head_dim, causal, seqlen, implementation)."""

    fields = ("mode", "head_dim", "causal", "seqlen", "implementation")

    def __init__(self, data: dict):
        self.data, self.records = data, data["records"]
        self.cells = {tuple(x[field] for field in self.fields): x for x in self.records}

    def values(self, field: str) -> list:
        return sorted({x[field] for x in self.records})

    def implementations(self) -> list[str]:
        found = {x["implementation"] for x in self.records}
        return [name for name in NAMES if name in found]

    def where(self, record: dict) -> str:
        """A record's problem in short."""
        return f"d{record['head_dim']} {mask_name(record['causal'])} {record['seqlen']}"

    def tflops(self, *cell, clock: str | None = None) -> float | None:
        """By kernel time where CUPTI gave it, else by wall time."""
        row = self.cells.get(cell)
        if row is None or row["error"]:
            return None
        if clock:
            return row.get(f"{clock}_tflops")
        return row.get("kernel_tflops", row.get("wall_tflops"))

    @property
    def clock(self) -> str:
        return "kernel" if any("kernel_tflops" in x for x in self.records) else "wall"


def speed_row(results: Results, cell: tuple, names: list[str]) -> list[str]:
    """TFLOP/s of each implementation, the fastest bold, and our speed over the best peer's."""
    speeds = {name: results.tflops(*cell, name) for name in names}
    best = max((x for x in speeds.values() if x), default=None)
    row = []
    for name, speed in speeds.items():
        refused = (*cell, name) in results.cells and "refused"
        text = f"{speed:.0f}" if speed else refused or "-"
        if speed and not results.tflops(*cell, name, clock=results.clock):
            text += " by wall"
        row.append(f"**{text}**" if speed and speed == best else text)
    for clock in ("kernel", "wall"):
        ours = results.tflops(*cell, OURS, clock=clock)
        peers = [results.tflops(*cell, x, clock=clock) for x in names if x != OURS]
        peer = max((x for x in peers if x), default=None)
        row.append(f"{ours / peer:.2f}" if ours and peer else "-")
    return row


def not_measured(results: Results) -> list[str]:
    """The report's last part: what refused, by its words, and what there was no time for."""
    out, refused = [], {}
    for x in results.records:
        if x["error"]:
            what = (NAMES[x["implementation"]], x["mode"], x["error"])
            refused.setdefault(what, []).append(results.where(x))
    if refused:
        rows = [[n, m, ", ".join(where), error] for (n, m, error), where in refused.items()]
        out.append("## Not measured\n\n" + table(["", "mode", "problems", "why"], rows))
    if results.data.get("skipped"):
        out.append(f"{len(results.data['skipped'])} measurements were skipped for time.\n")
    return out


def markdown(results: Results) -> str:
    """The whole report: environment, one table per mode and head dimension, what did not run."""
    data, names = results.data, results.implementations()
    out = [
        f"# Attention on {data['environment']['device']}\n",
        f"{data['tokens']} tokens, hidden size {data['hidden']}; TFLOP/s by {results.clock} time, "
        "median over rounds, the fastest bold. XLA is the standard attention, with all scores in "
        "memory; FA2 runs in a process of its own. The last columns are jax_fa3's speed over the "
        "best peer's, by kernel and by wall time. Mosaic GPU runs in float16.\n",
        table(["", ""], data["environment"].items()),
    ]
    for mode in MODES:
        for head_dim in results.values("head_dim"):
            cells = dict.fromkeys(
                (mode, head_dim, x["causal"], x["seqlen"])
                for x in results.records
                if (x["mode"], x["head_dim"]) == (mode, head_dim)
            )
            if cells:
                rows = [[mask_name(c[2]), str(c[3]), *speed_row(results, c, names)] for c in cells]
                header = ["mask", "seqlen", *(NAMES[x] for x in names), "kernel", "wall"]
                out.append(f"## {mode.capitalize()}, head_dim {head_dim}\n\n{table(header, rows)}")
    out += not_measured(results)
    return "\n".join(out)


def pyplot():
    """matplotlib.pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(results: Results, mode: str, path: Path) -> None:
    """Speed over sequence length: a panel per head dimension and mask."""
    dims, masks, seqlens = (results.values(x) for x in ("head_dim", "causal", "seqlen"))
    figure, panels = pyplot().subplots(
        len(masks), len(dims), figsize=(3.6 * len(dims), 2.7 * len(masks)),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for i, causal in enumerate(masks):
        for j, head_dim in enumerate(dims):
            axes = panels[i][j]
            for name in reversed(results.implementations()):  # ours is drawn last, on top
                speeds = [results.tflops(mode, head_dim, causal, s, name) for s in seqlens]
                points = [(s, y) for s, y in zip(seqlens, speeds, strict=True) if y]
                if points:
                    style = dict(color=COLORS[name], linewidth=2.2 if name == OURS else 1.4)
                    axes.plot(*zip(*points, strict=True), "o-", ms=4, label=NAMES[name], **style)
            axes.set_title(f"head_dim {head_dim}, {mask_name(causal)}", fontsize=10)
            axes.set_xscale("log", base=2)
            axes.set_xticks(seqlens, [f"{s // 1024}k" if s >= 1024 else str(s) for s in seqlens])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel(f"TFLOP/s, {results.clock} time")
    for axes in panels[-1]:
        axes.set_xlabel("sequence length")
    handles = {h.get_label(): h for axes in panels.flat for h in axes.get_lines()}
    ordered = [x for x in NAMES.values() if x in handles]
    figure.legend(
        [handles[x] for x in ordered], ordered, loc="outside lower center", ncols=4, frameon=False
    )
    figure.suptitle(f"Attention {mode}, {results.data['environment']['device']}", x=0.02, ha="left")
    figure.savefig(path, dpi=140)
    pyplot().close(figure)


def measured_on(environment: dict[str, str]) -> str:
    facts = [environment["device"], f"driver {environment['driver']}"]
    facts += [f"jax {environment['jax']}", f"commit {environment['commit']}", environment["date"]]
    return ", ".join(facts)


def speed_table(results: Results) -> str:
    """jax_fa3 / cuDNN per cell that was measured, with date and GPU."""
    environment, seqlens = results.data["environment"], results.values("seqlen")
    rows = []
    for mode in MODES:
        for head_dim in results.values("head_dim"):
            for causal in results.values("causal"):
                row = []
                for seqlen in seqlens:
                    speeds = [
                        results.tflops(mode, head_dim, causal, seqlen, x) for x in (OURS, "cudnn")
                    ]
                    text = " / ".join(f"{x:.0f}" if x else "-" for x in speeds)
                    row.append(text if any(speeds) else "")
                if any(row):
                    rows.append([f"{mode}, {head_dim}, {mask_name(causal)}", *row])
    return (
        f"TFLOP/s by {results.clock} time, jax_fa3 / cuDNN, bf16, {results.data['tokens']} tokens, "
        f"hidden size {results.data['hidden']}. {measured_on(environment)}.\n\n"
        + table(["pass, head_dim, mask", *map(str, seqlens)], rows)
    )


def train_step_table(data: dict) -> str:
    """Of benchmarks.train_step: a row for each implementation that ran, and what was trained.

    Utilisation is the model's operations, none counted twice, over the device's peak.
    """
    model, environment = data["model"], data["environment"]
    ran = {x["implementation"]: x for x in data["records"] if not x["error"]}
    peak, rows = PEAK_TFLOPS.get(environment["device"]), []
    for name, row in ran.items():
        seconds = row["step_ms"] / 1e3
        tflops = model["flops"] / seconds / 1e12
        ratio = row["step_ms"] / ran[OURS]["step_ms"] if OURS in ran else None
        rows.append(
            [
                NAMES[name],
                f"{row['step_ms']:.1f}",
                f"{model['batch'] * model['seqlen'] / seconds:,.0f}",
                f"{tflops / peak:.1%}" if peak else "-",
                f"{ratio:.3f}" if ratio else "-",
            ]
        )
    return (
        f"A training step of a decoder of {model['parameters'] / 1e9:.2f}B parameters (Flax nnx, "
        f"bf16, AdamW, remat that keeps attention): {model['layers']} layers of width "
        f"{model['width']}, {model['query_heads']} query and {model['key_value_heads']} key/value "
        f"heads of {model['head_dim']}, {model['batch']} x {model['seqlen']} tokens, causal. "
        f"{measured_on(environment)}.\n\n"
        + table(["attention", "step, ms", "tokens/s", "utilisation", "time / jax_fa3's"], rows)
    )


def fill(page: Path, name: str, text: str) -> None:
    """Puts text between the markers `name` of a page."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = page.read_text().split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{text}{end}{after}")


def write(data: dict, folder: Path) -> str:
    """Writes attention.md and a PNG per mode into folder; returns the report."""
    results, folder = Results(data), Path(folder)
    report = markdown(results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attention.md").write_text(report)
    for mode in results.values("mode"):
        plot(results, mode, folder / f"attention-{mode}.png")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, nargs="?", default=RESULTS / "attention.json")
    parser.add_argument("--output", type=Path, help="folder (default: that of the JSON file)")
    parser.add_argument("--readme", action="store_true", help="fill in README.md and docs/speed.md")
    args = parser.parse_args()
    data = json.loads(args.json.read_text())
    print(write(data, args.output or args.json.parent))
    if args.readme:
        fill(SPEED, "benchmarks", speed_table(Results(data)))
        train_step = args.json.parent / "train_step.json"
        if train_step.exists():
            fill(README, "train-step", train_step_table(json.loads(train_step.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
