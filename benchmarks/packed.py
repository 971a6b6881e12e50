"""Speed of packed documents: sequences of many documents, each of which sees itself only.

    python -m benchmarks.packed                         # what fits into 9 minutes of one GPU
    python -m benchmarks.packed --quick                 # mean 1024 in 16k tokens, within 3
    python -m benchmarks.packed --head-dims 128 --tokens 65536 --output FOLDER
    python -m benchmarks.packed --merge FOLDER/packed.json OTHER/packed.json
    python -m benchmarks.packed --dry-run               # trace and lower only; needs no GPU

Timed as benchmarks.attention does. "jax_fa3" takes a `Visibility` that was made before, as the
layers of a model share it; "jax_fa3 direct" takes segment ids and makes it in the timed call. "FA3"
is upstream's varlen kernels from the package dew_flash_attn. cuDNN runs twice: on its packed layout
by an entry of JAX that is not public, and with a dense mask where that fits. Only pairs of a query
and a key that see each other count as work.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3
from benchmarks.attention import choose, dry_run, log, options, run
from benchmarks.implementations import Function, Implementation, available, our_attention
from benchmarks.merge import add_option, merge
from benchmarks.problems import (
    DOCUMENTS,
    FOURTEEN,
    HEAD_DIMS,
    MODES,
    PACKED_TOKENS,
    Packed,
    packed_grid,
)
from benchmarks.render import OURS, Results, mask_name, not_measured, table

CLOCKS = ("kernel", "wall")
RATIOS = (  # of speeds: the first over the second
    (OURS, "FA3"),
    (OURS, "cuDNN packed"),
    (OURS, "cuDNN mask"),
    ("jax_fa3 direct", OURS),
)


def with_visibility(problem: Packed, mode: str) -> Function:
    attend = partial(our_attention(), **problem.masking())
    return lambda query, key, value, visibility: attend(query, key, value, visibility=visibility)


def direct(problem: Packed, mode: str) -> Function:
    attend = partial(our_attention(), **problem.masking())
    return lambda query, key, value, ids: attend(query, key, value, query_segment_ids=ids)


def varlen(problem: Packed, mode: str) -> Function:
    """Upstream's kernels through XLA's FFI."""
    from dew_flash_attn import flash_mha_varlen

    def attend(*arrays):
        *qkv, starts = arrays
        qkv = (x[0] for x in qkv)
        return flash_mha_varlen(*qkv, starts, max(problem.lengths), is_causal=problem.causal)[None]

    return attend


def cudnn_packed(problem: Packed, mode: str) -> Function:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    mask = cudnn.MaskType.PADDING_CAUSAL if problem.causal else cudnn.MaskType.PADDING
    attend = partial(cudnn.dot_product_attention, scale=problem.head_dim**-0.5, mask_type=mask)

    def packed(query, key, value, lengths, starts):
        where = dict(q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts)
        return attend(query, key, value, **where)

    return packed


def cudnn_mask(problem: Packed, mode: str) -> Function:
    attend = partial(jax.nn.dot_product_attention, implementation="cudnn", **problem.masking())
    return lambda query, key, value, mask: attend(query, key, value, mask=mask)


def dense_mask(problem: Packed) -> jax.Array:
    """bool [1, 1, seqlen, seqlen]: whether two tokens are of one document."""
    ids = jnp.asarray(problem.segment_ids)[:, None]
    return ids[..., :, None] == ids[..., None, :]


IMPLEMENTATIONS = (
    Implementation(
        OURS, with_visibility, target="jax_fa3_{mode}",
        beside=lambda problem: (jax_fa3.make_visibility(problem.segment_ids),),
    ),
    Implementation(
        "jax_fa3 direct", direct, target="jax_fa3_{mode}",
        beside=lambda problem: (problem.segment_ids,),
    ),
    Implementation(
        "FA3", varlen, package="dew_flash_attn",
        beside=lambda problem: (problem.cu_seqlens,),
    ),
    Implementation(
        "cuDNN packed", cudnn_packed,
        beside=lambda problem: (np.int32([problem.lengths]), problem.cu_seqlens[None]),
    ),
    # As long as a mask and the bias that it becomes fit beside the rest.
    Implementation(
        "cuDNN mask", cudnn_mask, seqlens=range(16385),
        beside=lambda problem: (dense_mask(problem),),
    ),
)  # fmt: skip


class PackedResults(Results):
    """Looked up by documents too."""

    fields = ("mode", "head_dim", "causal", "seqlen", "documents", "implementation")

    def problems(self) -> list[tuple]:
        """The cells' (mode, head_dim, causal, seqlen, documents), in the order of the run."""
        return list(dict.fromkeys(cell[:-1] for cell in self.cells))

    def ratio(self, cell: tuple, ours: str, other: str, clock: str) -> float | None:
        """Of two implementations' speeds, where both ran."""
        speeds = [self.tflops(*cell, name, clock=clock) for name in (ours, other)]
        return speeds[0] / speeds[1] if all(speeds) else None

    def microseconds(self, cell: tuple, name: str, clock: str) -> float | None:
        return self.cells.get((*cell, name), {}).get(f"{clock}_us")


def describe_cell(cell: tuple) -> str:
    _, head_dim, causal, seqlen, documents = cell
    return f"d{head_dim} {mask_name(causal)} {documents} in {seqlen}"


def summary(results: PackedResults) -> str:
    """A row for each pair of implementations, mode and clock: the geometric mean, and the least."""
    rows = []
    for (ours, other), mode, clock in product(RATIOS, MODES, CLOCKS):
        found = {
            cell: ratio
            for cell in results.problems()
            if cell[0] == mode and (ratio := results.ratio(cell, ours, other, clock))
        }
        if found:
            least = min(found, key=found.get)
            mean = math.exp(sum(map(math.log, found.values())) / len(found))
            smallest = f"{found[least]:.3f} ({describe_cell(least)})"
            row = [f"{ours} / {other}", mode, clock, str(len(found)), f"{mean:.3f}", smallest]
            rows.append(row)
    return table(["speed", "", "clock", "cells", "geometric mean", "smallest"], rows)


def fourteen(results: PackedResults) -> str:
    """Microseconds of the problem that has a table of its own; empty where it was not asked for."""
    problem = FOURTEEN
    cells = [(mode, problem.head_dim, True, problem.seqlen, problem.documents) for mode in MODES]
    rows = []
    for name, clock in product(results.implementations(), CLOCKS):
        times = [results.microseconds(cell, name, clock) for cell in cells]
        if all(times):
            rows.append([name, clock, *(f"{x:.0f}" for x in (*times, sum(times)))])
    title = (
        f"## {len(problem.lengths)} documents in {problem.seqlen} tokens, {problem.heads} heads "
        f"of {problem.head_dim}, causal\n\nMicroseconds.\n\n"
    )
    return title + table(["", "clock", *MODES, "both"], rows) if rows else ""


def markdown(results: PackedResults) -> str:
    data, names = results.data, results.implementations()

    def row(cell: tuple) -> Iterator[str]:
        _, head_dim, causal, seqlen, documents = cell
        yield from (str(head_dim), mask_name(causal), str(seqlen), documents)
        speeds = (results.tflops(*cell, name) for name in names)
        yield from (f"{speed:.0f}" if speed else "-" for speed in speeds)

    header = ["head_dim", "mask", "tokens", "documents", *names]
    parts = [
        f"# Packed documents on {data['environment']['device']}\n",
        f"TFLOP/s by {results.clock} time, median over rounds; only pairs that see each other "
        "count. A batch of one, 16 heads of 64 and 128, 8 of 256.\n",
        table(["", ""], data["environment"].items()),
        summary(results),
        fourteen(results),
    ]
    for mode in MODES:
        rows = [row(cell) for cell in results.problems() if cell[0] == mode]
        parts.append(f"## {mode.capitalize()}\n\n{table(header, rows)}")
    return "\n".join([*parts, *not_measured(results)])


def write(data: dict, folder: Path) -> str:
    """Writes packed.md into folder; returns the report."""
    report = markdown(PackedResults(data))
    (folder / "packed.md").write_text(report)
    return report


def parse() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="mean 1024 in 16k tokens only")
    add_option(parser)
    parser.add_argument("--head-dims", type=int, nargs="+", choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default: {PACKED_TOKENS}")
    args = parser.parse_args()
    args.tokens = args.tokens or PACKED_TOKENS[: 1 if args.quick else None]
    args.budget_s = args.budget_s or (150 if args.quick else 480)
    return args


def main() -> int:
    args = parse()
    if args.merge:
        log(merge(args.merge, args.output / "packed.json", write))
        return 0
    documents = DOCUMENTS[: 1 if args.quick else None]
    problems = packed_grid(args.tokens, args.head_dims, documents, "bf16")
    groups = choose(problems, available(IMPLEMENTATIONS, log), args.filter)
    if args.dry_run:
        return dry_run(groups)
    data = run(args, groups, "packed")
    if not data["records"]:
        log("nothing was measured")
        return 1
    log("\n" + write(data, args.output))
    ours = {OURS, "jax_fa3 direct"}
    return 1 if any(x["error"] for x in data["records"] if x["implementation"] in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
