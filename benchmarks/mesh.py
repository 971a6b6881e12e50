"""Scaling over several GPUs: batch, heads or sequence divided, against one GPU.

    python -m benchmarks.mesh                           # all ways over 8, 4 and 2 GPUs, 9 minutes
    python -m benchmarks.mesh --devices 4 --tokens 65536
    python -m benchmarks.mesh --dry-run --tokens 4096   # trace and lower only; needs no GPU

Causal attention in bf16, 32 query and 8 key/value heads of 128. Efficiency is one GPU's time for
the same global problem, divided by the number of GPUs and by the time on all of them: 1 is perfect.
A run of the longest sequence, forward and backward, comes first, because a GPU's allocator
remembers its highest mark only; its mark stands beside the formula of docs/context_parallel.md.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jax_fa3
from benchmarks.environment import RESULTS, environment, save
from benchmarks.implementations import our_attention
from benchmarks.render import pyplot, table
from benchmarks.timing import describe

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MODES = ("forward", "forward and backward")
TOLERANCE = 2e-2  # of a result in bf16
CHECK_TOKENS = 512  # answers are checked at this length, against one device
AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to divide attention: the function each device runs, and what it has a part of."""

    name: str
    attend: Callable
    dim: int  # of (batch, seq, heads, head_dim)
    zigzag: bool = False

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(*[None] * self.dim, AXIS)

    def shapes(self, tokens: int, count: int) -> list[tuple[int, ...]]:
        """query, key, value and dout of `tokens` in all; one sequence, but for divided batches."""
        batch = count if self.dim == 0 else 1
        heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
        return [(batch, tokens // batch, n, HEAD_DIM) for n in heads]


def ways() -> list[Way]:
    implementation = our_attention().keywords["implementation"]
    local = partial(our_attention(), is_causal=True)

    def sequence(name, function, layout):
        options = dict(axis_name=AXIS, layout=layout, implementation=implementation)
        return Way(name, partial(function, is_causal=True, **options), 1, layout == "zigzag")

    return [
        Way("batch", local, 0),
        Way("heads", local, 2),
        sequence("ring, zigzag", jax_fa3.ring_attention, "zigzag"),
        sequence("ring, contiguous", jax_fa3.ring_attention, "contiguous"),
        sequence("allgather, zigzag", jax_fa3.allgather_attention, "zigzag"),
        sequence("allgather, contiguous", jax_fa3.allgather_attention, "contiguous"),
        sequence("ulysses", jax_fa3.ulysses_attention, "contiguous"),
    ]


def mesh_of(count: int) -> Mesh:
    return jax.make_mesh((count,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:count])


def program(attend: Callable, mode: str) -> Callable:
    """(query, key, value, dout) to the output, or to the gradients of query, key and value."""
    if mode == "forward":
        return lambda query, key, value, dout: attend(query, key, value)
    return lambda query, key, value, dout: jax.vjp(attend, query, key, value)[1](dout)


def divided(way: Way, count: int, mode: str) -> Callable:
    """The program over the first `count` devices, jitted."""
    spec = way.spec
    function = program(way.attend, mode)
    return jax.jit(jax.shard_map(function, mesh=mesh_of(count), in_specs=spec, out_specs=spec))


def whole(mode: str) -> Callable:
    """The same on one device."""
    return jax.jit(program(partial(our_attention(), is_causal=True), mode))


def draw(shapes: list[tuple[int, ...]], count: int, spec: PartitionSpec) -> list[jax.Array]:
    """N(0, 1) values, made where they belong."""

    def normal(key):
        keys = jax.random.split(key, len(shapes))
        return [
            jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)
        ]

    places = NamedSharding(mesh_of(count), spec)
    return jax.block_until_ready(jax.jit(normal, out_shardings=places)(jax.random.key(0)))


def check(way: Way, count: int) -> None:
    """Raises unless a small problem comes out as on one device."""
    inputs = draw(way.shapes(CHECK_TOKENS, count), 1, PartitionSpec())
    order = partial(jax_fa3.zigzag_permute, axis=1, num_devices=count) if way.zigzag else jnp.array
    parts = [jax.device_put(order(x), NamedSharding(mesh_of(count), way.spec)) for x in inputs]
    for mode in MODES:
        got, want = divided(way, count, mode)(*parts), whole(mode)(*inputs)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            g, w = (jax.device_get(x).astype("float32") for x in (g, order(w)))
            error = ((g - w) ** 2).sum() ** 0.5 / (w**2).sum() ** 0.5
            if not error <= TOLERANCE:
                raise ArithmeticError(f"wrong result {mode}: relative error {error:.1e}")


def clock(run: Callable, inputs: list[jax.Array], rounds: int, seconds: float = 0.5) -> list[float]:
    """Milliseconds a call, issued back to back; one figure a round of about `seconds`."""

    def once(calls):
        start = time.perf_counter()
        for _ in range(calls):
            out = run(*inputs)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls * 1e3

    once(1)  # compiles
    calls = int(min(100, max(1, seconds * 1e3 / once(1))))
    return [once(calls) for _ in range(rounds)]


def memory_bytes(tokens: int, count: int) -> int:
    """A device's peak, arguments and results among it, in a ring's forward and backward pass over
    zigzag parts: docs/context_parallel.md."""
    rows = tokens // count
    q, kv = 2 * rows * HEADS * HEAD_DIM, 2 * rows * KV_HEADS * 2 * HEAD_DIM
    partial = count if count <= 5 else 7
    return (4 + 2 * partial) * q + 5 * kv + 24 * rows * HEADS


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """What a device holds while the program runs, arguments and results among it, by XLA's plan."""
    plan = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return held - plan.alias_size_in_bytes


def peak_bytes(count: int) -> int | None:
    """The highest mark of a device's allocator since the process began."""
    marks = [device.memory_stats() for device in jax.devices()[:count]]
    return max(mark["peak_bytes_in_use"] for mark in marks) if all(marks) else None


def measure_long(tokens: int, count: int) -> dict:
    """One forward and backward pass over the longest sequence, and its memory."""
    way = next(x for x in ways() if x.name == "ring, zigzag")
    row = dict(way=way.name, devices=count, tokens=tokens, error=None)
    try:
        inputs = draw(way.shapes(tokens, count), count, way.spec)
        compiled = divided(way, count, MODES[1]).lower(*inputs).compile()
        row["ms"] = clock(compiled, inputs, rounds=1)[0]
        row |= dict(peak_bytes=peak_bytes(count), program_bytes=program_bytes(compiled))
        row["expected_bytes"] = memory_bytes(tokens, count)
    except Exception as error:
        row["error"] = describe(error)
    return row


def problems(args: argparse.Namespace) -> Iterator[tuple[Way, int, str, int]]:
    for tokens in args.tokens:
        for count in args.devices:
            for way in ways():
                for mode in MODES:
                    yield way, tokens, mode, count


def measure(way: Way, tokens: int, mode: str, count: int, rounds: int, alone: dict) -> dict:
    """A row of the results; `alone` remembers one GPU's times."""
    row = dict(way=way.name, tokens=tokens, mode=mode, devices=count, error=None)
    try:
        shapes = way.shapes(tokens, count)
        key = (mode, *shapes[0])
        if key not in alone:
            alone[key] = clock(whole(mode), draw(shapes, 1, PartitionSpec()), rounds)
        inputs = draw(shapes, count, way.spec)
        compiled = divided(way, count, mode).lower(*inputs).compile()
        times = clock(compiled, inputs, rounds)
        row |= dict(program_bytes=program_bytes(compiled))
        row |= dict(ms=statistics.median(times), ms_rounds=times, one_device_ms_rounds=alone[key])
        row["efficiency"] = statistics.median(alone[key]) / count / row["ms"]
    except Exception as error:
        row["error"] = describe(error)
    return row


def run(args: argparse.Namespace) -> dict:
    """Measures until time is out, saving after each row."""
    start = time.monotonic()
    data = dict(environment=environment(), heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    data |= dict(long=None, records=[], skipped=[])
    path, alone, answers = args.output / "mesh.json", {}, {}
    if args.long_tokens:
        data["long"] = measure_long(args.long_tokens, max(args.devices))
        print(f"  {data['long']}", flush=True)
        save(data, path)
    for way, tokens, mode, count in problems(args):
        label = f"{way.name}:{mode}:{tokens} tokens:{count} devices"
        if time.monotonic() - start > args.budget_s:
            data["skipped"].append(label)
            continue
        if (way.name, count) not in answers:
            try:
                answers[way.name, count] = check(way, count)
            except Exception as error:
                answers[way.name, count] = describe(error)
        row = dict(way=way.name, tokens=tokens, mode=mode, devices=count)
        row["error"] = answers[way.name, count]
        if row["error"] is None:
            row = measure(way, tokens, mode, count, args.rounds, alone)
        data["records"].append(row)
        result = row["error"] or f"{row['ms']:9.2f} ms, efficiency {row['efficiency']:.3f}"
        print(f"  {label:60} {result}", flush=True)
        save(data, path)
    return data


def render(data: dict) -> str:
    """Efficiencies in a table, one row a way, and the long run."""
    records = data["records"]
    columns = sorted({(x["tokens"], MODES.index(x["mode"]), x["devices"]) for x in records})
    cells = {
        (x["way"], x["tokens"], MODES.index(x["mode"]), x["devices"]): x["error"]
        and "refused"
        or f"{x['efficiency']:.3f}"
        for x in records
    }
    names = list(dict.fromkeys(x["way"] for x in records))
    rows = [[name, *(cells.get((name, *column), "-") for column in columns)] for name in names]
    heads = [f"{t // 1024}k {MODES[m]}, {count} GPUs" for t, m, count in columns]
    lines = ["# Scaling: one GPU's time / number of GPUs / time, bf16, causal\n"]
    lines += [table(["", ""], data["environment"].items()), table(["divided", *heads], rows)]
    lines += sorted({f"{x['way']}: {x['error']}" for x in records if x["error"]})
    if data["long"]:
        lines.append(table(data["long"], [map(str, data["long"].values())]))
    return "\n".join(lines)


def plot(data: dict, path: Path) -> None:
    """Efficiencies: a panel for each number of GPUs and pass, a bar for each way and length."""
    records = [x for x in data["records"] if not x["error"]]
    names = list(dict.fromkeys(x["way"] for x in records))
    lengths = sorted({x["tokens"] for x in records})
    panels = sorted({(x["devices"], MODES.index(x["mode"])) for x in records})
    figure, grid = pyplot().subplots(
        1, len(panels), figsize=(3.4 * len(panels) + 1.2, 0.5 * len(names) + 1.4),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    height = 0.8 / len(lengths)
    for axes, (count, mode) in zip(grid[0], panels, strict=True):
        for i, tokens in enumerate(lengths):
            bars = {
                names.index(x["way"]) + (i + 0.5) * height - 0.4: x["efficiency"]
                for x in records
                if (x["devices"], x["mode"], x["tokens"]) == (count, MODES[mode], tokens)
            }
            drawn = axes.barh(
                [*bars], [*bars.values()], 0.9 * height, color=f"C{i}", label=f"{tokens // 1024}k"
            )
            axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=7)
        axes.axvline(1, color="0.6", linewidth=0.8, zorder=0)
        axes.set_title(f"{count} GPUs, {MODES[mode]}", fontsize=10)
        axes.set_xlim(0, 1.15)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_yticks(range(len(names)), names)
    grid[0][0].invert_yaxis()
    figure.supxlabel("efficiency: one GPU's time / number of GPUs / time", fontsize=9)
    handles = {h.get_label(): h for axes in grid[0] for h in axes.containers}
    figure.legend([*handles.values()], [*handles], title="tokens", frameon=False,
                  loc="outside right center")  # fmt: skip
    figure.savefig(path, dpi=140)
    pyplot().close(figure)


def dry_run(args: argparse.Namespace) -> int:
    """Lowers everything for CUDA; each program must call the kernels."""
    failed = 0
    for way, tokens, mode, count in problems(args):
        shapes = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in way.shapes(tokens, count)]
        traced = divided(way, count, mode).trace(*shapes)
        calls = traced.lower(lowering_platforms=("cuda",)).as_text().count("@jax_fa3_")
        failed += calls == 0
        print(f"  {way.name}:{mode}:{tokens} tokens:{count} devices: {calls} kernel calls")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    counts = [n for n in (8, 4, 2) if n <= len(jax.devices())]
    parser.add_argument("--devices", type=int, nargs="+", default=counts)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 16, 1 << 18])
    parser.add_argument("--long-tokens", type=int, default=1 << 20, help="0: no long run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=480, help="start nothing new after that")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="trace and lower only")
    args = parser.parse_args()
    if not args.devices:
        print("there is one device: nothing to divide")
        return 1
    if args.dry_run:
        return dry_run(args)
    data = run(args)
    report = render(data)
    (args.output / "mesh.md").write_text(report)
    plot(data, args.output / "mesh.png")
    print("\n" + report)
    return 1 if any(x["error"] for x in data["records"]) else 0


if __name__ == "__main__":
    sys.exit(main())
