"""Trains a small decoder on the text in data/ with jax_fa3 and compares it with jax.nn's attention.

The text's paragraphs are the documents: several are packed into a row, and each sees itself only.
Runs on whatever JAX finds: in bfloat16 on jax_fa3's kernels on a Hopper GPU, through XLA anywhere
else (on a CPU a smaller model in float32, a minute or two). Writes the loss curve as a PNG and ends
with two tables: loss, gradients and step time per attention implementation in the same model with
the same parameters and batch, and loss, step time and tokens per second of the same documents
packed and padded. Exits with 1 if the loss did not fall, the gradients disagree, packing changes
the loss or what stands in padding reaches anything.

    python examples/train_decoder.py [--short] [--steps N] [--output FOLDER]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3
from decoder import Attention
from packing import Packed, pad
from training import (
    OUTPUT,
    Setup,
    add_arguments,
    build,
    choose_setup,
    describe,
    draw_batch,
    make_optimizer,
    make_step,
    packed_rows,
    plot_losses,
    read_documents,
    train,
)


@dataclass(frozen=True)
class Measured:
    """One implementation in the trained model: a row of the closing table."""

    name: str
    loss: float
    gradient_error: float  # largest over the parameters, relative to float32 gradients
    step_ms: float


def relative_error(got, want) -> float:
    """The largest ||got - want|| / ||want|| over the arrays of two trees."""

    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    return float(max(jax.tree.leaves(jax.tree.map(one, got, want))))


def step_milliseconds(runs: Sequence[tuple[Callable, tuple]], optimizer, parameters) -> list[float]:
    """Median time of a training step of each (loss, batch), taken turn by turn."""
    steps = [make_step(loss, optimizer) for loss, _ in runs]
    states = []
    for step, (_, batch) in zip(steps, runs, strict=True):
        copy = jax.tree.map(jnp.copy, parameters)  # a step consumes its arguments
        states.append(step(copy, optimizer.init(copy), *batch))
    times = [[] for _ in steps]
    for _ in range(10):
        for i, (step, (_, batch)) in enumerate(zip(steps, runs, strict=True)):
            start = time.perf_counter()
            states[i] = jax.block_until_ready(step(*states[i][:2], *batch))
            times[i].append(time.perf_counter() - start)
    return [1e3 * statistics.median(each) for each in times]


def compare(setup: Setup, parameters, tokens: np.ndarray) -> list[Measured]:
    """The same parameters and batch through each implementation this machine runs."""
    exact, _ = build(replace(setup.config, dtype=jnp.float32), jax.nn.dot_product_attention)
    with jax.default_matmul_precision("float32"):
        reference = jax.jit(jax.grad(exact))(parameters, tokens)
    choices: dict[str, Attention] = {
        "jax_fa3": jax_fa3.dot_product_attention,
        "jax.nn (xla)": partial(jax.nn.dot_product_attention, implementation="xla"),
    }
    if jax.default_backend() == "gpu":
        choices["jax.nn (cudnn)"] = partial(jax.nn.dot_product_attention, implementation="cudnn")
    runs, found = [], {}
    for name, attention in choices.items():
        loss, _ = build(setup.config, attention)
        try:
            value, gradients = jax.jit(jax.value_and_grad(loss))(parameters, tokens)
        except Exception as error:
            if "cudnn" not in name:
                raise
            print(f"{name} does not run here: {str(error).splitlines()[0]}")
            continue
        runs.append((loss, (tokens,)))
        found[name] = float(value), relative_error(gradients, reference)
    times = step_milliseconds(runs, make_optimizer(setup), parameters)
    return [Measured(name, *found[name], each) for name, each in zip(found, times, strict=True)]


def print_table(rows: list[Measured]) -> None:
    print(f"\n{'attention':<16}{'loss':>10}{'gradient error*':>18}{'step, ms':>12}")
    for row in rows:
        print(f"{row.name:<16}{row.loss:>10.4f}{row.gradient_error:>18.1e}{row.step_ms:>12.1f}")
    print(
        "* largest over the parameters, against the same model with jax.nn's attention in float32"
    )


@dataclass(frozen=True)
class Arranged:
    """The same documents, packed or padded: a row of the table about packing."""

    name: str
    batch: Packed
    loss: float
    step_ms: float


def one_a_row(query, key, value, *, visibility, **options) -> jax.Array:
    """Attention where padding comes last and every row has one document: causal is enough."""
    return jax_fa3.dot_product_attention(query, key, value, **options)


def poisoned(segment_ids: np.ndarray) -> Attention:
    """jax_fa3's attention, given NaN wherever there is padding."""
    padding = segment_ids[:, :, None, None] == 0

    def attention(*arrays, **options) -> jax.Array:
        arrays = (jnp.where(padding, jnp.nan, x) for x in arrays)
        return jax_fa3.dot_product_attention(*arrays, **options)

    return attention


def compare_packing(setup: Setup, parameters, packed: Packed) -> list[Arranged]:
    """A batch as it is, and its documents one a row."""
    choices = {
        "packed": (jax_fa3.dot_product_attention, packed),
        "padded": (one_a_row, pad(packed.documents())),
    }
    runs = [(build(setup.config, attention)[0], batch) for attention, batch in choices.values()]
    losses = [float(jax.jit(loss)(parameters, *batch)) for loss, batch in runs]
    times = step_milliseconds(runs, make_optimizer(setup), parameters)
    return [
        Arranged(name, batch, *measured)
        for (name, (_, batch)), *measured in zip(choices.items(), losses, times, strict=True)
    ]


def equal(setup: Setup, loss: float, other: float) -> bool:
    """Whether losses differ by no more than a rounding error of the model's type; NaN does."""
    tolerance = max(float(jnp.finfo(setup.config.dtype).eps), 1e-5)
    return abs(loss - other) <= tolerance * other


def padding_reaches(setup: Setup, parameters, batch: Packed) -> bool:
    """Whether NaN in the padding of attention's inputs changes the loss or reaches a gradient."""
    found = []
    for attention in (jax_fa3.dot_product_attention, poisoned(batch.segment_ids[:, :-1])):
        loss, _ = build(setup.config, attention)
        found.append(jax.jit(jax.value_and_grad(loss))(parameters, *batch))
    (clean, _), (value, gradients) = found
    finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradients))
    return not (equal(setup, float(value), float(clean)) and finite)


def print_packing(rows: list[Arranged]) -> None:
    print(f"\n{'':<12}{'rows':>14}{'padding':>9}{'loss':>9}{'step, ms':>11}{'tokens/s':>11}")
    for row in rows:
        count, size = row.batch.count, "{} x {}".format(*row.batch.tokens.shape)
        padding, speed = 1 - count / row.batch.tokens.size, count / row.step_ms * 1e3
        print(
            f"{row.name:<12}{size:>14}{padding:>9.0%}{row.loss:>9.4f}{row.step_ms:>11.1f}"
            f"{speed:>11,.0f}"
        )


def packing_failures(setup: Setup, parameters, rows: list[Arranged]) -> list[str]:
    """What the packed and the padded documents should have shown and did not."""
    packed, padded = rows
    found = []
    if not equal(setup, packed.loss, padded.loss):
        found.append(f"loss {packed.loss:.6f} packed, {padded.loss:.6f} padded; expected the same")
    if padding_reaches(setup, parameters, padded.batch):
        found.append("NaN in padding reached the loss or a gradient; expected no trace of it")
    return found


def failures(losses: list[float], rows: list[Measured]) -> list[str]:
    """What the run should have shown and did not.

    Gradients agree if jax_fa3's error is within twice jax.nn's in the same precision, plus a floor.
    """
    found = []
    ours, peer = rows[0], rows[1]
    first, last = losses[0], statistics.mean(losses[-10:])
    if not last < 0.75 * first:
        found.append(f"the loss went from {first:.3f} to {last:.3f}; expected a fall of a quarter")
    if not ours.gradient_error <= 2 * peer.gradient_error + 1e-4:
        found.append(
            f"gradient error {ours.gradient_error:.1e} of {ours.name} against "
            f"{peer.gradient_error:.1e} of {peer.name}; expected at most twice that"
        )
    if not abs(ours.loss - peer.loss) <= 0.01:
        found.append(f"losses {ours.loss:.4f} and {peer.loss:.4f} differ by more than 0.01")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the PNG")
    args = parser.parse_args()

    documents, vocabulary = read_documents()
    setup = choose_setup(vocabulary, args)
    device = jax.devices()[0].device_kind
    print(f"{describe(setup)} on {device}")
    batches = packed_rows(documents, setup)
    parameters, losses = train(setup, jax_fa3.dot_product_attention, batches)
    print(
        f"loss {losses[0]:.3f} -> {statistics.mean(losses[-10:]):.3f} (mean of the last 10 steps)"
    )

    batch = draw_batch(np.random.default_rng(1), np.concatenate(documents), setup)
    rows = compare(setup, parameters, batch)
    print_table(rows)
    long = replace(setup, batch=setup.batch // 4, seqlen=4 * setup.seqlen)
    arranged = compare_packing(setup, parameters, next(packed_rows(documents, long)))
    print_packing(arranged)
    path = args.output / "loss.png"
    plot_losses({"jax_fa3": losses}, f"Character-level decoder on {device}", path)
    print(f"loss curve: {path}")
    problems = failures(losses, rows) + packing_failures(setup, parameters, arranged)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
