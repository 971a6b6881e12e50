"""Error of the implementations on the FlashAttention-3 paper's inputs with outliers.

    python -m benchmarks.accuracy [--quick] [--seqlen 4096 --heads 16 --head-dim 128] [--dry-run]

Query, key and value are drawn from N(0, 1) + N(0, 100) * Bernoulli(0.001), the output's cotangent
from N(0, 1). The reference is float64 on the inputs before they are rounded to the tested type, so
the figures hold the rounding of the inputs too. "standard" is the textbook formula with its scores
and weights kept in the tested type.

The float8 rows start from float16 inputs. Their "standard", the paper's baseline, has one scale per
tensor, float32 sums and a softmax in float16. The others are jax_fa3 with one scale per tensor
("per tensor"), with one ingredient alone, scales for blocks of rows ("blocks") or the Hadamard
rotation of query and key ("Hadamard"), and with both: "jax_fa3" is `forward_dtype`, whose gradients
are float16's at a float8 output.

A second table has the error of the output against the length of the sequence, for which some query
rows stand: each row meets all keys. A third has float8's, by head dim, for values with a mean and
without, N(0, 1) queries and keys, against float64 on the same rounded inputs. --quick is for a CPU:
short sequences and two heads.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3
from benchmarks.environment import RESULTS, environment, save
from benchmarks.implementations import Function, our_attention
from benchmarks.problems import DTYPES
from benchmarks.render import OURS, table
from benchmarks.timing import describe

ARRAYS = ("out", "dquery", "dkey", "dvalue")
SEQLENS, QUICK_SEQLENS = (1024, 4096, 16384, 65536, 131072), (512, 2048, 8192)
ROWS, ROW_HEADS = 512, 2  # query rows that stand for a sequence
MEAN_HEAD_DIMS = (64, 96, 128, 192, 256)
MEAN_VALUES = {  # of N(0, 1) numbers and their keys' positions, from 0 to 1
    "N(0, 1)": lambda noise, at: noise,
    "N(1, 1)": lambda noise, at: 1 + noise,
    "1": lambda noise, at: np.ones_like(noise),
    "1 in the first half": lambda noise, at: (at < 0.5) + 0 * noise,
    "1 at every second key": lambda noise, at: (np.arange(len(at)) % 2 == 0)[:, None] + 0 * noise,
}


def draw(queries: int, keys: int, heads: int, head_dim: int, seed: int = 0) -> list[np.ndarray]:
    """query, key, value, dout: float64 [1, queries or keys, heads, head_dim]."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((1, n, heads, head_dim)) for n in (queries, keys, keys, queries)]
    for x in arrays[:3]:
        x += 10 * rng.standard_normal(x.shape) * (rng.random(x.shape) < 1e-3)
    return arrays


def in_float64(formula):
    """The formula of one head's NumPy arrays, by XLA in float64 on the machine's accelerator."""
    compiled = jax.jit(formula)

    def run(*arrays):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, compiled(*(np.asarray(x, np.float64) for x in arrays)))

    return run


def weights_and_lse(query, key):
    """[queries, keys] and [queries, 1]."""
    scores = query.shape[-1] ** -0.5 * (query @ key.T)
    lse = jax.nn.logsumexp(scores, -1, keepdims=True)
    return jnp.exp(scores - lse), lse


@in_float64
def exact_head(query, key, value):
    """Output and LSE by the textbook formula."""
    weights, lse = weights_and_lse(query, key)
    return weights @ value, lse


@in_float64
def exact_head_gradients(query, key, value, dout):
    """Output and gradients likewise."""
    scale = query.shape[-1] ** -0.5
    p, _ = weights_and_lse(query, key)
    out = p @ value
    ds = p * (dout @ value.T - (dout * out).sum(-1, keepdims=True))
    return out, scale * ds @ key, scale * ds.T @ query, p.T @ dout


def by_head(formula, *arrays) -> list[np.ndarray]:
    """Results [1, rows, heads, columns] of a formula of one head."""
    heads = [formula(*(x[0, :, h] for x in arrays)) for h in range(arrays[0].shape[2])]
    return [np.stack(results, 1)[None] for results in zip(*heads, strict=True)]


def standard(query, key, value):
    """Attention with every intermediate result in the type of the inputs."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(query.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def standard_float8(query, key, value):
    """Attention with products of float8, the softmax between them in float16."""

    def rounded(x):
        scale = jnp.max(jnp.abs(x.astype(jnp.float32))) / 448
        return (x / scale).astype(jnp.float8_e4m3fn).astype(jnp.bfloat16), scale

    def product(subscripts, x, y):
        (x, x_scale), (y, y_scale) = rounded(x), rounded(y)
        return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32) * x_scale * y_scale

    scores = product("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores.astype(jnp.float16), axis=-1)
    return product("bhqk,bkhd->bqhd", weights, value).astype(query.dtype)


def quantized(query, key, value, **how):
    """Attention of what quantize_qkv makes of the inputs."""
    arrays = jax_fa3.quantize_qkv(query, key, value, **how)
    return jax_fa3.dot_product_attention(**arrays._asdict())


class Row(NamedTuple):
    """A row of the first table."""

    dtype: str  # of DTYPES, or "fp8" for what float8 makes of float16 inputs
    name: str
    function: Function
    differentiable: bool = True
    by_length: bool = False  # a column of the second table, too

    @property
    def inputs(self) -> jnp.dtype:
        return jnp.dtype(DTYPES.get(self.dtype, jnp.float16))


ROWS_OF_TABLE = (
    *(
        Row(dtype, name, function, by_length=name == OURS)
        for dtype in DTYPES
        for name, function in (
            (OURS, our_attention()),
            ("cudnn", partial(jax.nn.dot_product_attention, implementation="cudnn")),
            ("standard", standard),
        )
    ),
    Row("fp8", "standard", standard_float8, False, True),
    *(
        Row("fp8", name, partial(quantized, **how), False)
        for name, how in (
            ("per tensor", dict(granularity="tensor", rotation_seed=None)),
            ("blocks", dict(rotation_seed=None)),
            ("Hadamard", dict(granularity="tensor")),
        )
    ),
    Row(
        "fp8",
        OURS,
        partial(jax_fa3.dot_product_attention, forward_dtype="float8_e4m3fn"),
        by_length=True,
    ),
)


def program(row: Row):
    """Output and, where there are any, gradients."""

    def run(query, key, value, dout):
        if not row.differentiable:
            return (row.function(query, key, value),)
        out, pullback = jax.vjp(row.function, query, key, value)
        return out, *pullback(dout)

    return jax.jit(run)


def rmse(got, want) -> float:
    return float(np.sqrt(np.mean((np.asarray(got, np.float64) - want) ** 2)))


def measured(row: Row, function, arrays, want, **record) -> dict:
    """The record of a row: the RMSE of each result, or the error that came instead."""
    record |= dict(implementation=row.name, dtype=row.dtype, error=None)
    try:
        got = function(*(jnp.asarray(x, row.inputs) for x in arrays))
        return record | {x: rmse(g, w) for x, g, w in zip(ARRAYS, got, want, strict=False)}
    except Exception as error:
        return record | dict(error=describe(error))


def measure(seqlen: int, heads: int, head_dim: int) -> list[dict]:
    arrays = draw(seqlen, seqlen, heads, head_dim)
    want = by_head(exact_head_gradients, *arrays)
    return [measured(row, program(row), arrays, want) for row in ROWS_OF_TABLE]


def measure_lengths(seqlens: tuple[int, ...], head_dim: int) -> list[dict]:
    """The error of the output alone, for ROWS query rows."""
    records = []
    for seqlen in seqlens:
        *arrays, _ = draw(ROWS, seqlen, ROW_HEADS, head_dim)
        want = by_head(exact_head, *arrays)[0]
        for row in ROWS_OF_TABLE:
            if row.by_length:
                function = jax.jit(lambda *x, row=row: (row.function(*x),))
                size = float(np.sqrt(np.mean(want**2)))
                records.append(measured(row, function, arrays, [want], seqlen=seqlen, size=size))
    return records


def dequantized(x, descale) -> np.ndarray:
    """Of one head, [rows, head_dim], in float64."""
    rows = np.repeat(np.asarray(descale, np.float64).ravel(), 128)[: x.shape[1], None]
    scale = rows if np.size(descale) > 1 else np.asarray(descale, np.float64).item()
    return np.asarray(x[0, :, 0], np.float64) * scale


def measure_means(seqlens: tuple[int, ...]) -> list[dict]:
    """Relative error of float8's output and largest error of its LSE, for ROWS query rows."""
    records = []
    attend = jax.jit(partial(our_attention(), return_residual=True))
    for head_dim in MEAN_HEAD_DIMS:
        for seqlen in seqlens:
            rng = np.random.default_rng(head_dim + seqlen)
            query, key, noise = (rng.standard_normal((n, head_dim)) for n in (ROWS, seqlen, seqlen))
            at = np.arange(seqlen)[:, None] / seqlen
            for name, values in MEAN_VALUES.items():
                arrays = (x[None, :, None] for x in (query, key, values(noise, at)))
                x = jax_fa3.quantize_qkv(*(jnp.asarray(a, jnp.bfloat16) for a in arrays))
                out, lse = (np.asarray(a, np.float64)[0, :, 0] for a in attend(**x._asdict()))
                want, want_lse = exact_head(*map(dequantized, x[:3], x[3:]))
                records.append(
                    dict(
                        head_dim=head_dim,
                        seqlen=seqlen,
                        values=name,
                        error=float(np.linalg.norm(out - want) / np.linalg.norm(want)),
                        largest=float(np.abs(out - want).max()),
                        lse=float(np.abs(lse - want_lse[:, 0]).max()),
                    )
                )
    return records


def mean_table(records: list[dict]) -> str:
    rows = {(x["head_dim"], x["seqlen"]): [str(x["head_dim"]), str(x["seqlen"])] for x in records}
    for x in records:
        error = x["largest"] if x["values"] == "1" else x["error"]
        rows[x["head_dim"], x["seqlen"]].append(f"{error:.1e}")
    for x in records:
        if x["values"] == "N(0, 1)":
            rows[x["head_dim"], x["seqlen"]].append(f"{x['lse']:.1e}")
    return table(["head_dim", "keys", *MEAN_VALUES, "LSE, largest"], rows.values())


def error_table(records: list[dict]) -> str:
    """Errors, and how many times the output's is smaller than that of standard attention."""
    standards = {x["dtype"]: x.get("out") for x in records if x["implementation"] == "standard"}
    rows = []
    for x in records:
        figures = [f"{x[name]:.2e}" if name in x else "-" for name in ARRAYS]
        ratio = standards[x["dtype"]] / x["out"] if "out" in x and standards[x["dtype"]] else None
        figures.insert(1, f"{ratio:.2f}" if ratio else "-")
        rows.append([x["dtype"], x["implementation"], *figures])
    header = [f"{x} RMSE" for x in ARRAYS]
    header.insert(1, "standard / this")
    return table(["dtype", "", *header], rows)


def length_table(records: list[dict]) -> str:
    columns = dict.fromkeys((x["dtype"], x["implementation"]) for x in records)
    rows = {x["seqlen"]: [str(x["seqlen"]), f"{x['size']:.2e}"] for x in records}
    for x in records:
        rows[x["seqlen"]].append(f"{x['out']:.2e}" if "out" in x else "-")
    header = [f"{dtype} {name}" for dtype, name in columns]
    return table(["keys", "RMS of the output", *header], rows.values())


def render(data: dict) -> str:
    records, lengths = data["records"], data["lengths"]
    notes = {f"{x['implementation']}: {x['error']}" for x in records + lengths if x["error"]}
    return "\n".join(
        [
            "# Accuracy: N(0, 1) + N(0, 100) * Bernoulli(0.001), batch 1, seqlen {seqlen}, {heads} "
            "heads of {head_dim}\n".format(**data),
            table(["", ""], data["environment"].items()),
            error_table(records),
            f"## RMSE of the output against the length: {ROWS} query rows, {ROW_HEADS} heads of "
            f"{data['head_dim']}\n",
            length_table(lengths),
            f"## Float8 by head dim and values: relative error of the output ({ROWS} query rows, "
            "queries and keys N(0, 1), float64 on the same rounded inputs), for values of 1 the "
            "largest error\n",
            mean_table(data["means"]),
            *sorted(notes),
        ]
    )


def plot(data: dict, path: Path) -> None:
    """Errors in float8 by ingredient, and errors against the length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    bars = [x for x in data["records"] if x["dtype"] == "fp8" and "out" in x]
    left.barh([x["implementation"] for x in bars], [x["out"] for x in bars], color="#c2410c")
    left.invert_yaxis()
    left.set(xlabel="RMSE of the output", title="float8, by ingredient")
    lines: dict[str, list[tuple]] = {}
    for x in data["lengths"]:
        if "out" in x:
            label = f"{x['dtype']} {x['implementation']}"
            lines.setdefault(label, []).append((x["seqlen"], x["out"] / x["size"]))
    for label, points in lines.items():
        right.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    right.set(xlabel="keys", ylabel="RMSE / RMS of the output", title="against the length")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def dry_run(seqlen: int, heads: int, head_dim: int) -> int:
    """Lowers all but cuDNN, which needs its library, for CUDA."""
    for row in ROWS_OF_TABLE:
        if row.name != "cudnn":
            array = jax.ShapeDtypeStruct((1, seqlen, heads, head_dim), row.inputs)
            program(row).trace(*[array] * 4).lower(lowering_platforms=("cuda",))
            print(f"  {row.name}, {row.dtype}: lowered")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--quick", action="store_true", help="1024 tokens, 2 heads; up to 8192 keys"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="trace and lower only")
    args = parser.parse_args()
    sizes = dict(seqlen=args.seqlen, heads=args.heads, head_dim=args.head_dim)
    if args.quick:
        sizes |= dict(seqlen=1024, heads=2)
    if args.dry_run:
        return dry_run(**sizes)
    data = dict(
        environment=environment(),
        **sizes,
        records=measure(**sizes),
        lengths=measure_lengths(QUICK_SEQLENS if args.quick else SEQLENS, args.head_dim),
        means=measure_means(QUICK_SEQLENS if args.quick else SEQLENS),
    )
    save(data, args.output / "accuracy.json")
    report = render(data)
    (args.output / "accuracy.md").write_text(report)
    plot(data, args.output / "accuracy.png")
    print(report)
    return 1 if data["records"][0]["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
