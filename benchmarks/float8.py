"""Speed of the forward pass in float8, beside our own in bfloat16 and cuDNN's in float8.

    python -m benchmarks.float8                         # the grid from 1024 tokens on
    python -m benchmarks.float8 --seqlens 1024 2048 16384 --budget-s 60
    python -m benchmarks.float8 --filter 'd128-causal' --rounds 7
    python -m benchmarks.float8 --dry-run               # trace and lower only; needs no GPU

Timed as benchmarks.attention does. "float8" takes arrays that `quantize_qkv` made before, "float8
from bf16" makes them in the timed call. A run on a GPU begins with a float8 product of cuBLAS, by
which runs on boards of different speed can be compared.
"""

import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from benchmarks.attention import choose, dry_run, grid_options, log, run
from benchmarks.implementations import Function, Implementation, fa3, our_attention
from benchmarks.problems import SEQLENS, Problem, grid
from benchmarks.render import Results, mask_name, not_measured, plot, table
from benchmarks.timing import describe, platform
from jax_fa3 import QuantizedQKV, quantize_qkv

FLOAT8 = jnp.float8_e4m3fn
PRODUCT = 8192  # rows, columns and depth of cuBLAS' product
WEIGHT_SCALE = 256.0  # puts the largest weight of a row, at most 1, high in float8's range
RATIOS = (  # a column each: the first over the second, by a clock
    ("float8", "bf16", "kernel"),
    ("float8", "cuDNN fp8", "kernel"),
    ("float8 from bf16", "bf16", "wall"),
)


class Quantized(Implementation):
    """Takes what `quantize_qkv` gives, value as the kernels read it."""

    def prepare(self, problem: Problem, query, key, value) -> QuantizedQKV:
        return quantize_qkv(query, key, value, prepare_value=True)


def float8(problem: Problem, mode: str) -> Function:
    attend = partial(our_attention(), value_is_prepared=True, **problem.masking())
    return lambda *arrays: attend(**QuantizedQKV(*arrays)._asdict())


def float8_from_bf16(problem: Problem, mode: str) -> Function:
    return partial(fa3(problem, mode), forward_dtype=FLOAT8)


def cudnn_float8(problem: Problem, mode: str) -> Function:
    """JAX's entry to cuDNN's float8 kernels, which is not public: inputs and output at scale 1."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    scales = dict.fromkeys(cudnn.fp8_params_keys, jnp.ones((1, 1, 1, 1), jnp.float32))
    scales |= dict(scale_s=scales["scale_s"] * WEIGHT_SCALE)
    scales |= dict(descale_s=scales["descale_s"] / WEIGHT_SCALE)
    attend = partial(
        cudnn.dot_product_attention,
        fp8_params=scales,
        scale=problem.head_dim**-0.5,
        mask_type=cudnn.MaskType.CAUSAL if problem.causal else cudnn.MaskType.NO_MASK,
        use_fp8=True,
    )
    return lambda query, key, value: attend(query, key, value)[0]


OURS = (
    Quantized("float8", float8, target="jax_fa3_forward_float8", tolerance=8e-2),
    Implementation("float8 from bf16", float8_from_bf16, target="jax_fa3_quantize", tolerance=8e-2),
    Implementation("bf16", fa3, target="jax_fa3_{mode}"),
)
# Its output is float8 too, at a scale of 1: the small means of long rows lose bits.
CUDNN = Implementation("cuDNN fp8", cudnn_float8, dtype=FLOAT8, tolerance=1e-1)


def cublas(rounds: int) -> dict:
    """TFLOP/s of a float8 matrix product by kernel time, and the kernels that it was."""
    shape, keys = (PRODUCT, PRODUCT), jax.random.split(jax.random.key(0))
    inputs = [jax.random.normal(key, shape, jnp.bfloat16).astype(FLOAT8) for key in keys]
    product = partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),  # as the tensor core takes float8
        preferred_element_type=jnp.bfloat16,
    )
    product = jax.jit(product, compiler_options={"xla_gpu_enable_triton_gemm": False})
    clock = profiler.Cupti().measure(product, aggregate=False, iterations=20)
    try:
        calls = [call for _ in range(rounds) for call in clock(*inputs)[1]]
    except Exception as error:
        return dict(error=describe(error))
    ms = statistics.median(sum(time for _, time in call) for call in calls)
    kernels = [name for name, _ in calls[0]]
    return dict(error=None, tflops=2 * PRODUCT**3 / ms / 1e9, kernel_us=ms * 1e3, kernels=kernels)


def yardstick(product: dict) -> str:
    what = product["error"] or f"{product['tflops']:.0f} TFLOP/s ({', '.join(product['kernels'])})"
    return f"cuBLAS, float8, {PRODUCT}³: {what}\n"


def markdown(results: Results) -> str:
    data, names = results.data, results.implementations()

    def ratio(cell: tuple, ours: str, other: str, clock: str) -> str:
        ours, other = (results.tflops(*cell, x, clock=clock) for x in (ours, other))
        return f"{ours / other:.2f}" if ours and other else "-"

    def row(cell: tuple) -> Iterator[str]:
        _, head_dim, causal, seqlen = cell
        speeds = (results.tflops(*cell, name) for name in names)
        yield from (str(head_dim), mask_name(causal), str(seqlen))
        yield from (f"{speed:.0f}" if speed else "-" for speed in speeds)
        yield from (ratio(cell, *columns) for columns in RATIOS)

    cells = sorted({cell[:-1] for cell in results.cells})
    header = ["head_dim", "mask", "seqlen", *names, *(f"{x} / {y}, {c}" for x, y, c in RATIOS)]
    return "\n".join(
        [
            f"# The forward pass in float8 on {data['environment']['device']}\n",
            f"{data['tokens']} tokens, hidden size {data['hidden']}; TFLOP/s by {results.clock} "
            "time, median over rounds; then ratios of speeds by kernel and by wall time.\n",
            table(["", ""], data["environment"].items()),
            yardstick(data["cublas"]),
            table(header, map(row, cells)),
            *not_measured(results),
        ]
    )


def write(data: dict, folder: Path) -> str:
    """Writes float8.md and float8.png into folder; returns the report."""
    results = Results(data)
    report = markdown(results)
    (folder / "float8.md").write_text(report)
    plot(results, "forward", folder / "float8.png")
    return report


def main() -> int:
    parser = grid_options(__doc__)
    parser.set_defaults(seqlens=[x for x in SEQLENS if x >= 1024], budget_s=240)
    args = parser.parse_args()
    problems = grid(args.tokens, args.hidden, args.seqlens, args.dtype)
    forward = [(problem, mode) for problem, mode in problems if mode == "forward"]
    groups = choose(forward, (*OURS, CUDNN), args.filter)
    if args.dry_run:
        return dry_run(groups)
    product = cublas(args.rounds) if platform() == "cuda" else dict(error="no GPU")
    log(yardstick(product))
    facts = dict(tokens=args.tokens, hidden=args.hidden, cublas=product)
    data = run(args, groups, "float8", **facts)
    if not data["records"]:
        log("nothing was measured")
        return 1
    log("\n" + write(data, args.output))
    ours = {x.name for x in OURS}
    return 1 if any(x["error"] for x in data["records"] if x["implementation"] in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
