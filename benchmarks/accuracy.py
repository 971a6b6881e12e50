"""Error of the implementations on the FlashAttention-3 paper's inputs with outliers.

    python -m benchmarks.accuracy [--seqlen 4096 --heads 16 --head-dim 128] [--dry-run]

Query, key and value are drawn from N(0, 1) + N(0, 100) * Bernoulli(0.001), the output's cotangent
from N(0, 1). The reference is float64 on the inputs before they are rounded to the tested type, so
the figures hold the rounding of the inputs too. "standard" is the textbook formula with its scores
and weights kept in the tested type.

The float8 rows start from float16 inputs. Their "standard" has one scale per tensor, float32 sums
and a softmax in float16, as in the paper; the others are jax_fa3 with its scales for blocks of rows
("blocks") or one per tensor, and with or without the Hadamard rotation of query and key. "jax_fa3"
itself, which has both, is `forward_dtype`: its gradients are float16's at a float8 output.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3
from benchmarks.environment import RESULTS, environment, save
from benchmarks.implementations import Function, our_attention
from benchmarks.problems import DTYPES
from benchmarks.render import table
from benchmarks.timing import describe

ARRAYS = ("out", "dquery", "dkey", "dvalue")


def draw(seqlen: int, heads: int, head_dim: int, seed: int = 0) -> list[np.ndarray]:
    """query, key, value, dout: float64 [1, seqlen, heads, head_dim]."""
    rng, shape = np.random.default_rng(seed), (1, seqlen, heads, head_dim)
    arrays = [rng.standard_normal(shape) for _ in range(4)]
    for x in arrays[:3]:
        x += 10 * rng.standard_normal(shape) * (rng.random(shape) < 1e-3)
    return arrays


def exact(query, key, value, dout) -> list[np.ndarray]:
    """Output and gradients by the textbook formulas in float64, head by head."""
    results = [np.empty_like(query) for _ in ARRAYS]
    scale = query.shape[-1] ** -0.5
    for h in range(query.shape[2]):
        q, k, v, do = (x[0, :, h] for x in (query, key, value, dout))
        scores = scale * (q @ k.T)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out = p @ v
        ds = p * (do @ v.T - (do * out).sum(-1, keepdims=True))
        answers = (out, scale * ds @ k, scale * ds.T @ q, p.T @ do)
        for result, answer in zip(results, answers, strict=True):
            result[0, :, h] = answer
    return results


FORWARD_ONLY = ("blocks", "Hadamard", "neither", "standard_float8")


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


SIXTEEN_BITS = {
    "jax_fa3": our_attention(),
    "cudnn": partial(jax.nn.dot_product_attention, implementation="cudnn"),
    "standard": standard,
}
FUNCTIONS: dict[str, dict[str, Function]] = {
    **dict.fromkeys(DTYPES, SIXTEEN_BITS),
    "fp8": {
        "jax_fa3": partial(jax_fa3.dot_product_attention, forward_dtype="float8_e4m3fn"),
        "blocks": partial(quantized, granularity="block", rotation_seed=None),
        "Hadamard": partial(quantized, granularity="tensor"),
        "neither": partial(quantized, granularity="tensor", rotation_seed=None),
        "standard_float8": standard_float8,
    },
}


def outputs(name: str, function: Function):
    """Output and, where it has them, gradients in one program."""

    def run(query, key, value, dout):
        if name in FORWARD_ONLY:
            return (function(query, key, value),)
        out, pullback = jax.vjp(function, query, key, value)
        return out, *pullback(dout)

    return jax.jit(run)


def rmse(got, want) -> float:
    return float(np.sqrt(np.mean((np.asarray(got, np.float64) - want) ** 2)))


def measure(arrays: list[np.ndarray]) -> list[dict]:
    want, rows = exact(*arrays), []
    for dtype, functions in FUNCTIONS.items():
        inputs = [jnp.asarray(x, DTYPES.get(dtype, jnp.float16)) for x in arrays]
        for name, function in functions.items():
            row = dict(implementation=name, dtype=dtype, error=None)
            try:
                got = outputs(name, function)(*inputs)
                row |= {x: rmse(g, w) for x, g, w in zip(ARRAYS, got, want, strict=False)}
            except Exception as error:
                row["error"] = describe(error)
            rows.append(row)
    return rows


def render(data: dict) -> str:
    header = ["dtype", "", *(f"{x} RMSE" for x in ARRAYS)]
    rows = []
    for row in data["records"]:
        figures = [f"{row[x]:.2e}" if x in row else "-" for x in ARRAYS]
        rows.append([row["dtype"], row["implementation"], *figures])
    notes = {f"{x['implementation']}: {x['error']}" for x in data["records"] if x["error"]}
    title = "# Accuracy: N(0, 1) + N(0, 100) * Bernoulli(0.001), batch 1, seqlen {seqlen}, "
    title += "{heads} heads of {head_dim}\n"
    facts = table(["", ""], data["environment"].items())
    return "\n".join([title.format(**data), facts, table(header, rows), *sorted(notes)])


def dry_run(seqlen: int, heads: int, head_dim: int) -> int:
    """Lowers all but cuDNN, which needs its library, for CUDA."""
    for dtype, functions in FUNCTIONS.items():
        array = jax.ShapeDtypeStruct((1, seqlen, heads, head_dim), DTYPES.get(dtype, jnp.float16))
        for name in functions.keys() - {"cudnn"}:
            outputs(name, FUNCTIONS[dtype][name]).trace(*[array] * 4).lower(
                lowering_platforms=("cuda",)
            )
            print(f"  {name}, {dtype}: lowered")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="trace and lower only")
    args = parser.parse_args()
    sizes = dict(seqlen=args.seqlen, heads=args.heads, head_dim=args.head_dim)
    if args.dry_run:
        return dry_run(**sizes)
    data = dict(environment=environment(), **sizes, records=measure(draw(**sizes)))
    save(data, args.output / "accuracy.json")
    report = render(data)
    (args.output / "accuracy.md").write_text(report)
    print(report)
    return 1 if data["records"][0]["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
