"""Speed of attention over caches: decode steps, pages, ragged batches, pieces of prompts.

    python -m benchmarks.decode                         # what fits into 9 minutes of one GPU
    python -m benchmarks.decode --quick                 # the rows that have goals, within 3
    python -m benchmarks.decode --filter '^jax_fa3:cold:8-x-32k' --output FOLDER
    python -m benchmarks.decode --merge FOLDER/decode.json OTHER/decode.json
    python -m benchmarks.decode --dry-run               # trace and lower only; needs no GPU

A program is a chain of calls, each of which takes the output of the one before for its query; XLA
replays it as one command buffer. Wall time is that of programs back to back, divided by their
calls: memsets, launch gaps and what XLA puts beside a call are in it. "warm" calls have one cache,
"cold" ones take turns at enough of them that none is left in L2. "jax_fa3" takes part in all rows;
"cudnn" and "xla" are jax.nn's, with lengths, in those that they have words for; "jax_fa3 forward"
is dot_product_attention on the forward kernel. Bytes are of the keys and values that are seen.
"""

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3
from benchmarks.attention import Group, dry_run, log, options, run
from benchmarks.implementations import Function, Implementation
from benchmarks.merge import add_option, merge
from benchmarks.problems import DTYPES
from benchmarks.render import NAMES, OURS, Results, not_measured, table
from benchmarks.timing import Program, platform

CALLS = 16  # of a program
MODES = ("warm", "cold")
SOME_TOKENS = 4099  # random ones of a cache
L2_BYTES = 120e6  # more than any L2 keeps
FORWARD, APPENDING = "jax_fa3 forward", "append and attend"


@dataclasses.dataclass(frozen=True)
class Decode:
    """One call: `batch` sequences of `keys` keys, or of the lengths of a `kind`:

    "equal"     all of `keys`
    "one long"  1024 each, the last has `keys`
    "uniform"   from 1 to `keys`
    """

    name: str
    batch: int
    keys: int
    kind: str = "equal"
    rows: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int | None = None
    window: int | None = None  # keys to the left
    appends: bool = False
    dtype: str = "bf16"
    goal_us: float | None = None  # of a cold call
    quick: bool = False

    @property
    def label(self) -> str:
        return self.name.replace(" ", "-").replace(",", "")

    @property
    def numpy_dtype(self) -> jnp.dtype:
        return jnp.dtype(DTYPES[self.dtype])

    @property
    def lengths(self) -> np.ndarray:
        """int32 [batch], the keys of each sequence."""
        if self.kind == "equal":
            return np.full(self.batch, self.keys, np.int32)
        if self.kind == "one long":
            return np.array([1024] * (self.batch - 1) + [self.keys], np.int32)
        return np.random.default_rng(0).integers(1, self.keys + 1, self.batch).astype(np.int32)

    @property
    def seen(self) -> np.ndarray:
        """[batch], the keys that some row of a sequence sees."""
        if self.window is None:
            return self.lengths
        return np.minimum(self.lengths, self.window + self.rows)

    @property
    def bytes(self) -> int:
        row = 2 * self.kv_heads * self.head_dim * self.numpy_dtype.itemsize
        return int(self.seen.sum()) * row

    def flops(self, mode: str) -> float:
        return 4.0 * int(self.seen.sum()) * self.rows * self.heads * self.head_dim

    def copies(self, mode: str) -> int:
        """How many caches a program's calls take turns at."""
        return 1 if mode == "warm" else int(min(CALLS, -(-2 * L2_BYTES // self.bytes)))

    def inputs(self) -> list[jax.Array]:
        """Query [b, t, h, d]; a cache's keys and values; new keys and values [b, t, k, d]. A cache
        repeats some random tokens, as many as no page size divides."""
        rng, row = np.random.default_rng(0), (self.kv_heads, self.head_dim)
        size = self.page_size or int(self.lengths.max())
        pages = self.batch * -(-int(self.lengths.max()) // size)

        def draw(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape, np.float32), self.numpy_dtype)

        def cache() -> jax.Array:
            some, count = draw(min(pages * size, SOME_TOKENS), *row), pages * size
            repeated = jnp.tile(some, (-(-count // len(some)), 1, 1))[:count]
            return repeated.reshape(pages, size, *row)

        query = draw(self.batch, self.rows, self.heads, self.head_dim)
        caches = [cache() for _ in "kv"]
        return [query, *caches, *(draw(self.batch, self.rows, *row) for _ in "kv")]

    def where(self) -> dict[str, np.ndarray]:
        """Lengths, before the append where there is one, and tables of pages in random order."""
        lengths = self.lengths - (self.rows if self.appends else 0)
        found = dict(cache_lengths=lengths.astype(np.int32))
        if self.page_size:
            width = -(-int(self.lengths.max()) // self.page_size)
            pages = np.random.default_rng(1).permutation(self.batch * width)
            found["block_tables"] = pages.reshape(self.batch, width).astype(np.int32)
        return found

    def masking(self) -> dict:
        return dict(local_window_size=None if self.window is None else (self.window, 0))

    def reference(self, inputs: list[jax.Array]) -> jax.Array:
        """The output of one call, through XLA."""
        given = inputs if self.appends else inputs[:3]
        attend = partial(jax_fa3.cached_attention, implementation="xla", **self.masking())
        got = jax.jit(attend)(*given, **self.where())
        return got[0] if self.appends else got


def problems() -> list[Decode]:
    """The rows, those with goals first."""
    goals = {(1, 4): 9.0, (1, 32): 36.5, (8, 4): 36.5, (8, 32): 242, (64, 4): 242, (64, 32): 1900}
    found = []
    for (batch, thousands), goal in goals.items():
        name, keys = f"{batch} x {thousands}k", 1024 * thousands
        found.append(Decode(name, batch, keys, goal_us=goal, quick=True))
        for size, factor in ((64, 1.02), (16, 1.05)):
            quick = thousands == 32 and batch < 64
            paged = f"{name}, pages of {size}"
            found.append(
                Decode(paged, batch, keys, page_size=size, goal_us=factor * goal, quick=quick)
            )
        found.append(Decode(f"{name}, {APPENDING}", batch, keys, appends=True, quick=batch == 1))
    ragged = [
        Decode("63 x 1k and 128k", 64, 131072, "one long", page_size=64),
        Decode("64 x 1 to 32k", 64, 32768, "uniform", page_size=64),
    ]
    found += [dataclasses.replace(x, goal_us=round(x.bytes / 4.3e6, 1), quick=True) for x in ragged]
    found += [Decode("1 x 512", 1, 512), Decode("1 x 128k", 1, 131072)]
    found += [Decode("256 x 512", 256, 512)]
    eight = dict(batch=8, keys=8192)
    found += [Decode(f"{t} rows", **eight, rows=t) for t in (4, 16)]
    found += [
        Decode(f"{group} heads to a key head", **eight, heads=64, kv_heads=64 // group)
        for group in (1, 4, 8, 16, 64)
    ]
    found += [Decode(f"head dim {d}", **eight, head_dim=d) for d in (64, 256)]
    found += [
        Decode("window of 1024", **eight, window=1023),
        Decode("pages of 256", **eight, page_size=256),
        Decode("prompt, 512 rows", 1, 32768, rows=512, quick=True),
        Decode("prompt, 512 rows, 8 of 2 heads", 1, 32768, rows=512, heads=8, kv_heads=2),
    ]
    return found


# ---- implementations: build(problem, mode) gives one call, (query, keys, values, new...) -> out


def ours(problem: Decode, mode: str) -> Function:
    implementation = "fa3" if jax.default_backend() == "gpu" else None
    attend = partial(jax_fa3.cached_attention, implementation=implementation, **problem.masking())

    def call(query, *caches, lengths):
        got = attend(query, *caches, **lengths)
        return got if problem.appends else (got,)

    return call


def of_whole_arrays(attend: Callable) -> Callable:
    """A function of contiguous keys, values and lengths as a call."""

    def build(problem: Decode, mode: str) -> Function:
        def call(query, key, value, lengths):
            lengths = jnp.asarray(lengths["cache_lengths"])
            return (attend(problem, query, key, value, lengths),)

        return call

    return build


def jax_nn(implementation: str, problem: Decode, query, key, value, lengths):
    attend = partial(jax.nn.dot_product_attention, implementation=implementation)
    return attend(query, key, value, key_value_seq_lengths=lengths)


def forward(problem: Decode, query, key, value, lengths):
    """What takes more rows than the kernel of caches takes by itself."""
    offset = lengths - problem.rows
    given = dict(key_value_seq_lengths=lengths, query_offset=offset, is_causal=True)
    return jax_fa3.dot_product_attention(query, key, value, **given)


IMPLEMENTATIONS = (
    Implementation(OURS, ours, target="jax_fa3_forward_cached", tolerance=3e-2),
    Implementation("cudnn", of_whole_arrays(partial(jax_nn, "cudnn")), tolerance=3e-2),
    Implementation("xla", of_whole_arrays(partial(jax_nn, "xla")), serial=True, tolerance=3e-2),
    Implementation(FORWARD, of_whole_arrays(forward), target="jax_fa3_forward", tolerance=3e-2),
)


def implementations(problem: Decode) -> Iterator[Implementation]:
    """Those that have words for a problem."""
    is_plain = not (problem.page_size or problem.appends or problem.window)
    for x in IMPLEMENTATIONS:
        fits = {
            OURS: True,
            "cudnn": is_plain and problem.rows == 1,
            "xla": is_plain and problem.rows == 1 and problem.bytes < 2e9,
            FORWARD: is_plain and problem.rows * problem.heads // problem.kv_heads > 128,
        }
        if fits[x.name]:
            yield x


class DecodeProgram(Program):
    """CALLS calls in a row; times are of one. Caches that are written to are donated, and what a
    program returns is what the next one takes."""

    def chain(self, query, caches, new, where):
        """(output, caches); `caches` are pairs that the calls take turns at."""
        call = self.implementation.build(self.problem, self.mode)
        caches = list(caches)
        for i in range(CALLS):
            turn = i % len(caches)
            given = (*caches[turn], *new) if self.problem.appends else caches[turn]
            query, *written = call(query, *given, lengths=where)
            if self.problem.appends:
                caches[turn] = tuple(written)
        return query, caches if self.problem.appends else None

    def shapes(self) -> tuple:
        query, key, value, *new = jax.eval_shape(self.problem.inputs)
        where = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, self.problem.where()))
        return query, [(key, value)] * self.problem.copies(self.mode), new, where

    def lower(self, platform: str) -> None:
        donated = (1,) if self.problem.appends else ()
        traced = jax.jit(self.chain, donate_argnums=donated).trace(*self.shapes())
        self.lowered = [traced.lower(lowering_platforms=(platform,))]

    def take(self, inputs: list[jax.Array]) -> None:
        query, key, value, *new = inputs
        pairs = [
            tuple(x + 0 if self.problem.appends or i else x for x in (key, value))
            for i in range(self.problem.copies(self.mode))
        ]
        self.caches = pairs
        self.args = query, new, jax.tree.map(jnp.asarray, self.problem.where())
        self.run = self.run_once

    def run_once(self, query, new, where) -> jax.Array:
        out, caches = self.compiled[-1](query, self.caches, new, where)
        if self.problem.appends:
            self.caches = caches
        return out

    def load(self, inputs: list[jax.Array], want) -> None:
        """The answer that is checked is that of one call."""
        self.check_one(inputs, want)
        self.take(inputs)
        self.calls = 3
        self.calls = int(min(1000, max(5, 4e4 / (CALLS * self.time_wall()))))
        self.time_wall()

    def check_one(self, inputs: list[jax.Array], want) -> None:
        call = self.implementation.build(self.problem, self.mode)
        given = inputs if self.problem.appends else inputs[:3]
        where = jax.tree.map(jnp.asarray, self.problem.where())
        got = jax.jit(lambda *x: call(*x, lengths=where)[0])(*given)
        got, want = (x.astype(jnp.float32) for x in (got, want))
        self.relative_error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        if not self.relative_error <= self.implementation.tolerance:
            raise ArithmeticError(f"wrong result: relative error {self.relative_error:.1e}")

    def time_wall(self) -> float:
        return super().time_wall() / CALLS

    def kernel_round(self, detach: bool) -> None:
        before = len(self.kernel_us)
        super().kernel_round(detach)
        if len(self.kernel_us) > before:
            self.kernel_us[-1] /= CALLS

    def release(self) -> None:
        super().release()
        self.caches = None

    def record(self) -> dict:
        row = super().record()
        row["bytes"] = self.problem.bytes
        return row


def choose(rows: list[Decode], pattern: str) -> list[Group]:
    """The programs whose labels match, those of one problem together."""
    groups = []
    for problem in rows:
        every = [
            DecodeProgram(x, problem, mode) for x in implementations(problem) for mode in MODES
        ]
        programs = [x for x in every if re.search(pattern, x.label)]
        if programs:
            groups.append((problem, programs))
    return groups


def step_overhead() -> dict[str, float]:
    """Microseconds of wall time of a jitted step with donated caches at 1 x 4k, from Python, and
    of x + 1."""
    problem = Decode("", 1, 4096, appends=True)
    query, key, value, *new = problem.inputs()
    where = jax.tree.map(jnp.asarray, problem.where())
    implementation = "fa3" if platform() == "cuda" else None
    attend = partial(jax_fa3.cached_attention, implementation=implementation)
    step = jax.jit(attend, donate_argnums=(1, 2))
    caches, count, found = (key, value), 200, {}
    for _ in range(2):  # the first time compiles
        start = time.perf_counter()
        for _ in range(count):
            out, *caches = step(query, *caches, *new, **where)
            jax.block_until_ready(out)
        found["step"] = (time.perf_counter() - start) / count * 1e6
    plus, x = jax.jit(lambda x: x + 1), jnp.zeros(8)
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(plus(x))
        found["x + 1"] = (time.perf_counter() - start) / count * 1e6
    return found


# ---- the report


class DecodeResults(Results):
    """Looked up by (mode, name of the problem, implementation)."""

    fields = ("mode", "name", "implementation")

    def where(self, record: dict) -> str:
        return record["name"]

    def microseconds(self, mode: str, name: str, implementation: str) -> float | None:
        return self.cells.get((mode, name, implementation), {}).get("wall_us")

    def problems(self) -> list[dict]:
        """A record of each, in the order of the run."""
        return list({x["name"]: x for x in self.records}.values())


def speeds(results: DecodeResults) -> str:
    """Microseconds of a call, warm and cold, terabytes a second cold, and the goals."""
    names = results.implementations()

    def cell(mode: str, problem: dict, name: str) -> str:
        us = results.microseconds(mode, problem["name"], name)
        asked = (mode, problem["name"], name) in results.cells
        return f"{us:.1f}" if us else "refused" if asked else "-"

    rows = []
    for problem in results.problems():
        us = results.microseconds("cold", problem["name"], OURS)
        goal = problem["goal_us"]
        rows.append(
            [
                problem["name"],
                *(cell(mode, problem, name) for mode in MODES for name in names),
                f"{problem['bytes'] / us / 1e6:.2f}" if us else "-",
                f"{goal:.1f}" if goal else "-",
            ]
        )
    header = ["batch x keys", *(f"{NAMES[name]}, {mode}" for mode in MODES for name in names)]
    return table([*header, "TB/s, cold", "wanted, us"], rows)


def markdown(results: DecodeResults) -> str:
    environment, overhead = results.data["environment"], results.data["overhead"]
    took = ", ".join(f"{name} {us:.1f} us" for name, us in overhead.items())
    parts = [
        f"# Attention over caches on {environment['device']}\n",
        "Microseconds a call, in a command buffer of "
        f"{CALLS}, median over rounds; bf16, 32 query and 8 key/value heads of 128, one new row, "
        "where the name does not say otherwise. cuDNN and XLA are jax.nn's. Warm: one cache; cold: "
        "none of it in L2.\n",
        table(["", ""], environment.items()),
        f"Wall time from Python, each waited for: {took}.\n" if took else "",
        speeds(results),
        *not_measured(results),
    ]
    return "\n".join(filter(None, parts))


def write(data: dict, folder: Path) -> str:
    """Writes decode.md into folder; returns the report."""
    report = markdown(DecodeResults(data))
    (folder / "decode.md").write_text(report)
    return report


def parse() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="only rows that have goals")
    add_option(parser)
    args = parser.parse_args()
    args.budget_s = args.budget_s or (150 if args.quick else 480)
    return args


def main() -> int:
    args = parse()
    if args.merge:
        log(merge(args.merge, args.output / "decode.json", write))
        return 0
    groups = choose([x for x in problems() if x.quick or not args.quick], args.filter)
    if args.dry_run:
        return dry_run(groups)
    data = run(args, groups, "decode", overhead=step_overhead())
    if not data["records"]:
        log("nothing was measured")
        return 1
    log("\n" + write(data, args.output))
    return 1 if any(x["error"] for x in data["records"] if x["implementation"] == OURS) else 0


if __name__ == "__main__":
    sys.exit(main())
