"""Trains a small decoder twice, with attention's forward pass in bfloat16 and in float8.

The backward pass is in bfloat16 both times; parameters, batches and optimizer are the same. Runs on
whatever JAX finds: on the kernels of a Hopper GPU, through XLA anywhere else (on a CPU in a minute
or two, where the rest of the model is in float32). Ends with a PNG of both loss curves, and exits
with 1 if float8 ends above bfloat16 by more than the noise of the two curves.

    python examples/train_float8.py [--short] [--steps N] [--output FOLDER]
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3
from training import (
    OUTPUT,
    add_arguments,
    choose_setup,
    describe,
    plot_losses,
    read_text,
    train,
    windows,
)

FORWARD_DTYPES = {"bfloat16": None, "float8": "float8_e4m3fn"}


def attention(query, key, value, *, forward_dtype: str | None, **options) -> jax.Array:
    """In 16 bits, whatever the model is in; the forward pass in another type where one is given."""
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    out = jax_fa3.dot_product_attention(*half, forward_dtype=forward_dtype, **options)
    return out.astype(query.dtype)


def final_loss(losses: list[float]) -> tuple[float, float]:
    """Mean of the last tenth of the steps, and its standard error."""
    last = np.array(losses[-max(len(losses) // 10, 2) :])
    return float(last.mean()), float(last.std(ddof=1) / np.sqrt(last.size))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the PNG")
    args = parser.parse_args()

    tokens, vocabulary = read_text()
    setup = choose_setup(vocabulary, args)
    device = jax.devices()[0].device_kind
    print(f"{describe(setup)} on {device}; attention in bfloat16, and its forward pass in float8")
    curves = {
        name: train(setup, partial(attention, forward_dtype=dtype), windows(tokens, setup), name)[1]
        for name, dtype in FORWARD_DTYPES.items()
    }
    finals = {name: final_loss(losses) for name, losses in curves.items()}
    for name, (loss, error) in finals.items():
        print(f"{name:<10} loss {curves[name][0]:.3f} -> {loss:.4f} +- {error:.4f}")
    path = args.output / "loss-float8.png"
    plot_losses(curves, f"Forward pass of attention, {device}", path)
    print(f"loss curves: {path}")
    (loss, error), (loss8, error8) = finals["bfloat16"], finals["float8"]
    if not loss8 - loss <= 2 * np.hypot(error, error8):
        print(
            f"FAILED: float8 ends at {loss8:.4f} and bfloat16 at {loss:.4f}; expected a difference "
            f"of at most {2 * np.hypot(error, error8):.4f}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
