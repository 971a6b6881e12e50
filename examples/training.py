"""What the training examples share: setup, text, batches, a loss, training, a plot of losses."""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import jax_fa3
from decoder import Attention, Config, Decoder
from packing import Packed, pack, segment_positions

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "output"


@dataclass(frozen=True)
class Setup:
    """What depends on the hardware."""

    config: Config
    batch: int
    seqlen: int
    steps: int
    learning_rate: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `choose_setup` reads."""
    parser.add_argument("--steps", type=int, help="training steps (default: by hardware)")
    parser.add_argument("--short", action="store_true", help="small batches and 30 steps: a check")


def choose_setup(vocabulary: int, args: argparse.Namespace) -> Setup:
    """A model that trains in a minute or two, on two CPU cores or on a GPU; with --short in
    seconds, most of them the compiler's."""
    setup = _setup_of_hardware(vocabulary)
    if args.short:
        setup = replace(setup, batch=4, seqlen=64, steps=30)
    return replace(setup, steps=args.steps or setup.steps)


def _setup_of_hardware(vocabulary: int) -> Setup:
    if jax.default_backend() == "gpu":
        config = Config(vocabulary, 6, 768, 6, 2, 128, jnp.bfloat16)
        return Setup(config, batch=8, seqlen=2048, steps=200, learning_rate=6e-4)
    config = Config(vocabulary, 2, 128, 4, 2, 32, jnp.float32)
    return Setup(config, batch=8, seqlen=256, steps=200, learning_rate=3e-3)


def describe(setup: Setup) -> str:
    """The model and its batches in one line."""
    config = setup.config
    return (
        f"{config.num_layers} layers of width {config.width}, {config.num_heads_q} query and "
        f"{config.num_heads_kv} key/value heads of {config.head_dim}, {config.dtype.__name__}; "
        f"batches of {setup.batch} x {setup.seqlen} characters"
    )


def _text() -> str:
    return "".join(path.read_text() for path in sorted((HERE / "data").glob("*.txt")))


def read_text() -> tuple[np.ndarray, int]:
    """The text as character indices, and how many different characters it has."""
    alphabet, tokens = np.unique(list(_text()), return_inverse=True)
    return tokens.astype(np.int32), len(alphabet)


def read_alphabet() -> str:
    """The characters of the text, by their index."""
    return "".join(np.unique(list(_text())))


def read_documents() -> tuple[list[np.ndarray], int]:
    """The paragraphs of `read_text`'s tokens, each with the empty lines after it."""
    tokens, vocabulary = read_text()
    starts = [match.end() for match in re.finditer(r"\n{2,}(?=.)", _text())]
    return np.split(tokens, starts), vocabulary


def draw_batch(rng: np.random.Generator, tokens: np.ndarray, setup: Setup) -> np.ndarray:
    """Random windows of the text: int32 [batch, seqlen + 1], inputs and targets in one."""
    starts = rng.integers(0, len(tokens) - setup.seqlen, setup.batch)
    return tokens[starts[:, None] + np.arange(setup.seqlen + 1)]


def windows(tokens: np.ndarray, setup: Setup) -> Iterator[tuple[np.ndarray]]:
    """Batches for `train`, of windows of the text."""
    rng = np.random.default_rng(0)
    while True:
        yield (draw_batch(rng, tokens, setup),)


def packed_rows(documents: list[np.ndarray], setup: Setup, seed: int = 0) -> Iterator[Packed]:
    """Batches for `train`, of packed documents: [batch, seqlen + 1], inputs and targets in one."""
    tokens, segment_ids = pack(documents, setup.seqlen + 1)
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.choice(len(tokens), setup.batch, replace=False)
        yield Packed(tokens[rows], segment_ids[rows])


def build(config: Config, attention: Attention):
    """The model as a pure loss(parameters, tokens, segment_ids), and a function that draws its
    parameters.

    With segment ids, each document sees itself only, and no loss is of padding or of a document's
    first token given another's last. All layers share one table of what a token sees.
    """

    def create():
        return Decoder(config, attention, rngs=nnx.Rngs(0))

    graph = nnx.graphdef(nnx.eval_shape(create))

    def loss(parameters, tokens, segment_ids=None):
        model, inputs, targets = nnx.merge(graph, parameters), tokens[:, :-1], tokens[:, 1:]
        if segment_ids is None:
            logits, counted = model(inputs), jnp.ones_like(targets, bool)
        else:
            ids, next_ids = segment_ids[:, :-1], segment_ids[:, 1:]
            visibility = jax_fa3.make_visibility(ids)
            logits = model(inputs, segment_positions(ids), visibility=visibility)
            counted = (ids == next_ids) & (ids > 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean(where=counted)

    return loss, lambda: nnx.state(create())


def make_step(loss, optimizer: optax.GradientTransformation, out_shardings=None):
    """One step, (parameters, state, *batch) -> (parameters, state, loss); it reuses the buffers."""

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=out_shardings)
    def step(parameters, state, *batch):
        value, gradients = jax.value_and_grad(loss)(parameters, *batch)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    return step


def make_optimizer(setup: Setup) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, setup.learning_rate, setup.steps // 10, setup.steps, 0.1 * setup.learning_rate
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


def train(setup: Setup, attention: Attention, batches: Iterator, title: str = "training"):
    """Trains on one device; returns the parameters and the loss of every step."""
    loss, initialise = build(setup.config, attention)
    optimizer, parameters = make_optimizer(setup), initialise()
    step, state = make_step(loss, optimizer), optimizer.init(parameters)
    losses = []
    # On stdout, so that the lines that follow stand behind the bar's own.
    with tqdm(range(setup.steps), desc=title, unit="step", file=sys.stdout) as progress:
        for _ in progress:
            parameters, state, value = step(parameters, state, *next(batches))
            losses.append(float(value))
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return parameters, losses


def plot_losses(curves: dict[str, list[float]], title: str, path: Path) -> None:
    """One curve for each name; a single one needs no legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    lines = (("#2a6fbb", 3.0), ("#c2410c", 1.0))  # a thin one over a wide one: both can be seen
    for (name, losses), (color, width) in zip(curves.items(), lines, strict=False):
        axes.plot(losses, color=color, linewidth=width if len(curves) > 1 else 1.5, label=name)
    if len(curves) > 1:
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="loss, nats per character", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
