"""A training step of a 1B-class decoder, with jax_fa3 and with jax.nn's attention in its place.

    python -m benchmarks.train_step [--implementations jax_fa3,cudnn,xla] [--dry-run]
    python -m benchmarks.train_step --layers 1 --width 128 --head-dim 32 --seqlen 128 \\
        --vocabulary 256 --rounds 2 --implementations jax_fa3,xla     # on any machine

The model is examples/decoder.py: bfloat16 products, causal grouped-query attention (four query
heads to a key/value head), float32 parameters, AdamW. Every block is recomputed in the backward
pass except for attention's forward pass, whose results all implementations keep. The steps take
turns in one process; milliseconds are medians over rounds.
"""

import argparse
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

from benchmarks.environment import RESULTS, environment, save, version
from benchmarks.implementations import Function, our_attention
from benchmarks.render import OURS, table, train_step_table
from benchmarks.timing import describe, platform
from jax_fa3.vjp import CHECKPOINT_NAME

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from decoder import Config  # noqa: E402  (the examples are no package)
from training import build, make_step  # noqa: E402

CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # the operation, as JAX calls it


def keep_attention(operation, *types, **parameters) -> bool:
    """The remat policy: attention's output and statistics stay, by name or, because JAX gives
    cuDNN's no names, by operation. So no implementation runs its forward pass twice."""
    by_name = jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)
    return operation.name == CUDNN_FORWARD or by_name(operation, *types, **parameters)


def jax_nn(implementation: str) -> Function:
    """jax.nn's attention, its output under the name that jax_fa3 gives its own."""

    def attention(query, key, value, **options):
        out = jax.nn.dot_product_attention(
            query, key, value, implementation=implementation, **options
        )
        return checkpoint_name(out, CHECKPOINT_NAME)

    return attention


ATTENTION = {OURS: our_attention, "cudnn": partial(jax_nn, "cudnn"), "xla": partial(jax_nn, "xla")}


def model_flops(config: Config, parameters, batch: int, seqlen: int) -> float:
    """Of a step, what is computed twice counted once: six per weight of a matrix and token, and
    the causal half of attention's two products forward and four backward."""
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    weights = sum(
        x.size for path, x in leaves if x.ndim > 1 and "embed" not in jax.tree_util.keystr(path)
    )
    attention = config.num_layers * config.num_heads_q * config.head_dim * seqlen
    return 6.0 * (weights + attention) * batch * seqlen


class Trainee:
    """One implementation in the model: lowered, compiled, started, then timed step by step."""

    def __init__(self, name: str, config: Config, tokens: jax.ShapeDtypeStruct):
        optimizer = optax.adamw(1e-4)
        loss, self.initialise = build(config, ATTENTION[name]())
        self.name, self.error, self.times = name, None, []
        self.step = make_step(loss, optimizer)
        self.start = partial(self._state, optimizer)  # jitted, XLA would fold all random numbers
        self.types = (*jax.eval_shape(self.start), tokens)

    def _state(self, optimizer):
        parameters = self.initialise()
        return parameters, optimizer.init(parameters)

    def attempt(self, action, *args) -> None:
        """A failure is kept in `error`, and ends this implementation only."""
        if self.error is None:
            try:
                action(*args)
            except Exception as error:
                self.error = f"{action.__name__}: {describe(error)}"

    def lower(self, platform: str) -> None:
        self.lowered = self.step.trace(*self.types).lower(lowering_platforms=(platform,))

    def compile(self) -> None:
        start = time.perf_counter()
        self.run = self.lowered.compile()
        self.compile_s = time.perf_counter() - start

    def begin(self, tokens: jax.Array) -> None:
        """Draws the state and takes the first step, which is not timed."""
        *self.state, loss = self.run(*self.start(), tokens)
        self.loss = float(loss)
        if not math.isfinite(self.loss):
            raise ArithmeticError(f"the loss is {self.loss}")

    def time_step(self, tokens: jax.Array) -> None:
        start = time.perf_counter()
        *self.state, loss = self.run(*self.state, tokens)
        jax.block_until_ready(loss)
        jax.block_until_ready(self.state)
        self.times.append((time.perf_counter() - start) * 1e3)

    def record(self) -> dict:
        row = dict(implementation=self.name, error=self.error)
        if self.error is None:
            memory = self.run.memory_analysis()
            row |= dict(
                loss=self.loss,
                compile_s=self.compile_s,
                step_ms=statistics.median(self.times),
                step_ms_rounds=self.times,
                temporaries_gib=memory.temp_size_in_bytes / 2**30,
            )
        return row


def measure(trainees: list[Trainee], tokens: jax.Array, rounds: int) -> list[dict]:
    for trainee in trainees:
        trainee.attempt(trainee.lower, platform())
        trainee.attempt(trainee.compile)
        trainee.attempt(trainee.begin, tokens)
        print(f"  {trainee.name}: {trainee.error or f'compiled in {trainee.compile_s:.0f} s'}")
    for i in range(rounds):
        first = i % len(trainees)
        for trainee in trainees[first:] + trainees[:first]:
            trainee.attempt(trainee.time_step, tokens)
    return [trainee.record() for trainee in trainees]


def report(data: dict) -> str:
    rows = [
        [x["implementation"], f"{x['loss']:.4f}", f"{x['compile_s']:.1f}",
         f"{x['temporaries_gib']:.1f}"]
        for x in data["records"] if not x["error"]
    ]  # fmt: skip
    facts = data["environment"] | {k: str(v) for k, v in data["model"].items()}
    parts = ["# Training step\n", train_step_table(data)]
    parts += [f"{x['implementation']}: {x['error']}\n" for x in data["records"] if x["error"]]
    parts.append(table(["attention", "first loss", "compilation, s", "temporaries, GiB"], rows))
    return "\n".join([*parts, table(["", ""], facts.items())])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--implementations", default="jax_fa3,cudnn", help=f"of {','.join(ATTENTION)}"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="trace and lower only")
    args = parser.parse_args()
    args.implementations = args.implementations.split(",")
    for name in args.implementations:
        if name not in ATTENTION:
            parser.error(f"--implementations has {name!r}; expected of {', '.join(ATTENTION)}")
    if jax.default_backend() != "gpu" and "cudnn" in args.implementations:
        print("cudnn: left out, there is no GPU")
        args.implementations.remove("cudnn")
    return args


def main() -> int:
    args = parse()
    heads = args.width // args.head_dim
    sizes = (args.vocabulary, args.layers, args.width, heads, max(1, heads // 4), args.head_dim)
    config = Config(*sizes, jnp.bfloat16, remat=keep_attention)
    shape = jax.ShapeDtypeStruct((args.batch, args.seqlen + 1), jnp.int32)
    trainees = [Trainee(name, config, shape) for name in args.implementations]
    if args.dry_run:
        for trainee in trainees:
            trainee.lower("cuda")
            print(f"  {trainee.name}: lowered")
        return 0
    tokens = jax.random.randint(jax.random.key(0), shape.shape, 0, args.vocabulary, shape.dtype)
    parameters = trainees[0].types[0]
    model = dict(
        parameters=sum(x.size for x in jax.tree.leaves(parameters)),
        layers=args.layers,
        width=args.width,
        query_heads=config.num_heads_q,
        key_value_heads=config.num_heads_kv,
        head_dim=args.head_dim,
        vocabulary=args.vocabulary,
        batch=args.batch,
        seqlen=args.seqlen,
        flops=model_flops(config, parameters, args.batch, args.seqlen),
    )
    versions = {name: version(name) for name in ("flax", "optax")}
    records = measure(trainees, tokens, args.rounds)
    data = dict(environment=environment() | versions, model=model, records=records)
    save(data, args.output / "train_step.json")
    text = report(data)
    (args.output / "train_step.md").write_text(text)
    print(text)
    return 1 if any(x["error"] for x in records if x["implementation"] == OURS) else 0


if __name__ == "__main__":
    sys.exit(main())
