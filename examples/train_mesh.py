"""Trains the decoder on a mesh of devices: data x tensor x context, every array split.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/train_mesh.py
    python examples/train_mesh.py --data 2 --tensor 2 --context 2 --steps 100 --resume
    python examples/train_mesh.py --packed

Batches are split over "data", heads and the MLP's hidden units over "tensor", positions over
"context", parameters and optimizer state over all three. The model is decoder.py as it is: a table
says where each parameter lives, and the attention function constrains its inputs. With --packed
rows hold several documents, the paragraphs of the text, each of which sees itself only; positions
are split all the same. Checkpoints hold the state and the losses; --resume goes on from the last
one, on whatever mesh. Ends with a PNG of the loss curve, and exits with 1 if the loss did not fall.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jax_fa3
from packing import pack
from training import (
    OUTPUT,
    Setup,
    add_arguments,
    build,
    choose_setup,
    describe,
    draw_batch,
    make_step,
    plot_losses,
    read_documents,
    read_text,
)

AXES = ("data", "tensor", "context")
WIDTH = ("data", "context")  # the axes that split a parameter along the model's width
HEADS = P("data", "context", "tensor", None)  # [batch, seqlen, heads, head_dim]

# Where the matrices live, by the name of their layer; all else is on every device.
MATRICES = {
    "query": P(WIDTH, "tensor", None),
    "key": P(WIDTH, "tensor", None),
    "value": P(WIDTH, "tensor", None),
    "out": P("tensor", None, WIDTH),
    "gate": P(WIDTH, "tensor"),
    "up": P(WIDTH, "tensor"),
    "down": P("tensor", WIDTH),
    "embed": P(None, WIDTH),
    "head": P(WIDTH, None),
}


def make_mesh(data: int, tensor: int, context: int) -> Mesh:
    """The first data * tensor * context devices; XLA propagates shardings from array to array."""
    shape = (data, tensor, context)
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def default_shape(devices: int) -> tuple[int, int, int]:
    """(data, tensor, context): two for context, then two for tensor, the rest for data."""
    context = 2 if devices % 2 == 0 else 1
    tensor = 2 if devices % 4 == 0 else 1
    return devices // (tensor * context), tensor, context


def check_shape(setup: Setup, data: int, tensor: int, context: int) -> None:
    """Raises ValueError where an axis does not divide what it splits."""
    config = setup.config
    for what, extent, parts in (
        ("batch", setup.batch, data),
        ("key/value heads", config.num_heads_kv, tensor),
        ("sequence length", setup.seqlen, context),
        ("width", config.width, data * context),
    ):
        if extent % parts:
            raise ValueError(f"the {what}, {extent}, is not a multiple of {parts}, its parts")


def spec_of(path) -> P:
    """Where a parameter lives, by its path, with which its moments in the optimizer state end."""
    *layers, leaf = [""] + [x.key for x in path if isinstance(x, jax.tree_util.DictKey)]
    return MATRICES.get(layers[-1], P()) if leaf in ("kernel", "embedding") else P()


def gather(mesh: Mesh, parameters):
    """Parameters with their width on every device, as the model's products take them.

    XLA makes this an all-gather, and of its gradient a reduce-scatter.
    """

    def one(path, x):
        spec = P(*(None if axes == WIDTH else axes for axes in spec_of(path)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, parameters)


def attention_on(mesh: Mesh):
    """jax_fa3's attention with inputs and output split over the mesh's three axes."""
    place = partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, HEADS))

    def attention(query, key, value, **options):
        arrays = map(place, (query, key, value))
        return place(jax_fa3.dot_product_attention(*arrays, **options))

    return attention


class Checkpoints:
    """The state and the losses so far, in a folder."""

    def __init__(self, folder: Path):
        self.manager = ocp.CheckpointManager(folder.absolute())

    def clear(self) -> None:
        for step in self.manager.all_steps():
            self.manager.delete(step)

    def save(self, state, losses: list[float]) -> None:
        """Writes in the background; arrays and losses are copied before this returns."""
        items = dict(state=ocp.args.StandardSave(state), losses=ocp.args.JsonSave(list(losses)))
        self.manager.save(len(losses), args=ocp.args.Composite(**items))

    def restore(self, like):
        """The last (state, losses), placed as `like`, a tree of ShapeDtypeStructs with shardings;
        None where there is none."""
        step = self.manager.latest_step()
        if step is None:
            return None
        items = dict(state=ocp.args.StandardRestore(like), losses=ocp.args.JsonRestore())
        found = self.manager.restore(step, args=ocp.args.Composite(**items))
        return found["state"], found["losses"]

    def close(self) -> None:
        self.manager.close()


def of_text(tokens: np.ndarray, setup: Setup) -> Callable[[int], tuple[np.ndarray]]:
    """The batch of each step, of windows of the text."""
    return lambda i: (draw_batch(np.random.default_rng(i), tokens, setup),)


def of_documents(documents: list[np.ndarray], setup: Setup) -> Callable[[int], tuple]:
    """The batch of each step, tokens and segment ids of packed documents."""
    packed = pack(documents, setup.seqlen + 1)

    def draw(i):
        rows = np.random.default_rng(i).choice(len(packed.tokens), setup.batch, replace=False)
        return packed.tokens[rows], packed.segment_ids[rows]

    return draw


def train(
    setup: Setup,
    mesh: Mesh,
    draw: Callable[[int], tuple],
    folder: Path,
    *,
    save_every: int,
    resume: bool,
) -> list[float]:
    """Trains up to setup.steps in all, from a checkpoint in `folder` or from the start; returns the
    loss of every step. Step i sees draw(i) on every mesh and after every interruption."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_constant_schedule(0.0, setup.learning_rate, 20)),
    )
    loss, initialise = build(setup.config, attention_on(mesh))

    def start():
        parameters = initialise()
        return parameters, optimizer.init(parameters)

    def gathered_loss(parameters, *batch):
        return loss(gather(mesh, parameters), *batch)

    shapes = jax.eval_shape(start)
    places = jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, spec_of(path)), shapes
    )
    step = make_step(gathered_loss, optimizer, (*places, NamedSharding(mesh, P())))

    checkpoints, restored = Checkpoints(folder), None
    if resume:
        like = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )
        restored = checkpoints.restore(like)
    else:
        checkpoints.clear()
    # Drawn where they live: no device ever holds all of the parameters.
    state, losses = restored or (jax.jit(start, out_shardings=places)(), [])

    if resume:
        kind = "from a checkpoint" if restored else "no checkpoint there"
        print(f"going on at step {len(losses)} ({kind})")
    numbers, done = range(len(losses), setup.steps), len(losses)
    with tqdm(
        numbers, "training", setup.steps, initial=done, unit="step", file=sys.stdout
    ) as progress:
        for i in progress:
            batch = jax.device_put(draw(i), NamedSharding(mesh, P("data")))
            *state, value = step(*state, *batch)
            losses.append(float(value))
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            if len(losses) % save_every == 0 or len(losses) == setup.steps:
                checkpoints.save(tuple(state), losses)
    checkpoints.close()
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for axis in AXES:
        parser.add_argument(f"--{axis}", type=int, help=f"size of the {axis} axis")
    add_arguments(parser)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--packed", action="store_true", help="train on packed paragraphs")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--output", type=Path, default=OUTPUT / "mesh", help="where results go")
    args = parser.parse_args()

    tokens, vocabulary = read_text()
    setup = choose_setup(vocabulary, args)
    config = replace(setup.config, dtype=jnp.bfloat16)
    setup = replace(setup, config=config)
    shape = tuple(getattr(args, axis) for axis in AXES)
    if None in shape:
        if shape != (None, None, None):
            parser.error("expected all of --data, --tensor and --context, or none")
        shape = default_shape(jax.device_count())
    try:
        check_shape(setup, *shape)
        mesh = make_mesh(*shape)
    except ValueError as error:
        parser.error(str(error))
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    device = jax.devices()[0].device_kind
    print(f"{describe(setup)} on {mesh.size} x {device}: {sizes}")

    draw = of_documents(read_documents()[0], setup) if args.packed else of_text(tokens, setup)
    folder = args.output / "checkpoints"
    losses = train(setup, mesh, draw, folder, save_every=args.save_every, resume=args.resume)
    last = statistics.mean(losses[-10:])
    path = args.output / "loss.png"
    plot_losses({"jax_fa3": losses}, f"Character-level decoder on {mesh.size} x {device}", path)
    print(f"loss {losses[0]:.3f} -> {last:.3f} (mean of the last 10 steps)")
    print(f"loss curve: {path}; checkpoints: {folder}")
    if not last < losses[0]:
        print("FAILED: the loss did not fall", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
