"""Balance of packed documents over a divided sequence: each device's part, one after another.

    python -m benchmarks.balance                        # on one GPU
    python -m benchmarks.balance --dry-run              # counts what rows see; needs no GPU
    python -m benchmarks.balance --tokens 65536 --documents lognormal-2048

Of so many devices each has its rows, as a layout deals them, and all keys, as an all-gather brings
them: causal attention in bf16, forward and backward, 32 query and 8 key/value heads of 128. All
devices wait for the slowest, so that the figure is the largest kernel time over the mean; beside it
stands the same of scores that are seen.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

import jax_fa3
from benchmarks.environment import RESULTS, environment, save
from benchmarks.implementations import our_attention
from benchmarks.problems import MODES, Packed

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ORDERS: dict[str, Callable] = {
    "contiguous": lambda x, axis, count: x,
    "zigzag": jax_fa3.zigzag_permute,
    "striped": jax_fa3.striped_permute,
}
Clock = Callable[..., float]


def rows_of(layout: str, tokens: int, devices: int) -> np.ndarray:
    """int32 [devices, rows]: the positions of each device's rows."""
    order = ORDERS[layout](jnp.arange(tokens, dtype=jnp.int32), 0, devices)
    return np.asarray(order).reshape(devices, -1)


def imbalance(parts: list[float] | np.ndarray) -> float:
    """The largest part over the mean."""
    return float(np.max(parts) / np.mean(parts))


def scores(begin: np.ndarray, end: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How many keys each device's rows see together."""
    return (end - begin)[rows].sum(1, dtype=np.int64)


def kernel_ms(run: Callable, *inputs) -> float:
    """Median kernel time of a call."""
    run(*inputs)
    _, times = profiler.Cupti(finalize=False).measure(run, iterations=5)(*inputs)
    return statistics.median(times)


def programs() -> dict[str, Callable]:
    """By mode, what makes of (query, key, value) and a table the program to be timed, and what it
    is given before dout. Arrays that it closed over would be part of it, and compiled with it."""
    attend = our_attention()

    @jax.jit
    def forward(qkv, table, dout):
        return attend(*qkv, visibility=table)

    @jax.jit
    def linearized(qkv, table):
        return jax.vjp(partial(attend, visibility=table), *qkv)[1]

    @jax.jit
    def pulled_back(pull, dout):
        return pull(dout)

    def kept(qkv, table):
        return forward, qkv, table

    def backward(qkv, table):
        return pulled_back, linearized(qkv, table)

    return dict(zip(MODES, (kept, backward), strict=True))


def timed(begin: np.ndarray, end: np.ndarray, rows: np.ndarray, clock: Clock) -> Iterator[dict]:
    """Of each device the kernel time of every mode, in milliseconds."""
    tokens = len(begin)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    seqlens = (rows.shape[1], tokens, tokens, rows.shape[1])
    query, key, value, dout = (
        jax.random.normal(k, (1, seqlen, count, HEAD_DIM), jnp.bfloat16)
        for k, seqlen, count in zip(keys, seqlens, heads, strict=True)
    )
    prepared = programs()
    for own in rows:
        table = jax_fa3.make_visibility(
            kv_start=begin[own][None], kv_end=end[own][None], seqlen_k=tokens
        )
        yield {
            mode: clock(*prepare((query, key, value), table), dout)
            for mode, prepare in prepared.items()
        }


def run(args: argparse.Namespace, clock: Clock | None) -> list[dict]:
    """A record of each kind of documents and layout; kernel times only with a clock."""
    records = []
    for documents in args.documents:
        problem = Packed(1, args.tokens, HEADS, HEAD_DIM, causal=True, documents=documents)
        begin, end = problem.intervals()
        for layout in ORDERS:
            rows = rows_of(layout, args.tokens, args.devices)
            seen = scores(begin, end, rows)
            record = dict(documents=documents, layout=layout, tokens=args.tokens)
            record |= dict(scores=seen.tolist(), imbalance=dict(scores=imbalance(seen)))
            if clock is not None:
                devices = []
                for device in timed(begin, end, rows, clock):
                    devices.append(device)
                    times = ", ".join(f"{mode} {x:.2f} ms" for mode, x in device.items())
                    print(f"  {documents}, {layout}, device {len(devices)}: {times}", flush=True)
                record["kernel_ms"] = {mode: [x[mode] for x in devices] for mode in MODES}
                for mode, times in record["kernel_ms"].items():
                    record["imbalance"][mode] = imbalance(times)
            records.append(record)
            figures = ", ".join(f"{name} {x:.2f}" for name, x in record["imbalance"].items())
            print(f"  {documents}, {layout}: largest over mean: {figures}", flush=True)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1 << 18)
    parser.add_argument("--documents", nargs="+", default=["lognormal-2048", "lognormal-32768"])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="count scores only")
    args = parser.parse_args()
    records = run(args, None if args.dry_run else kernel_ms)
    if not args.dry_run:
        save(dict(environment=environment(), records=records), args.output / "balance.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
