"""The mesh example on eight devices against one, interrupted and not."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tolerance
import train_mesh
from decoder import Config
from training import Setup, build

CONFIG = Config(20, 1, 32, 4, 2, 16, jnp.bfloat16)
SETUP = Setup(CONFIG, batch=4, seqlen=32, steps=10, learning_rate=2e-2)
IN_FLOAT32 = dataclasses.replace(SETUP, config=dataclasses.replace(CONFIG, dtype=jnp.float32))
EIGHT, ONE = (2, 2, 2), (1, 1, 1)


def train(folder, shape, setup=SETUP, *, resume=False, packed=False):
    """The losses on text in which every character follows from the one before the last."""
    tokens = np.random.default_rng(0).permutation(20).astype(np.int32)
    tokens = np.ravel(np.stack([np.tile(tokens, 50), np.tile(tokens[::-1], 50)], 1))
    draw = train_mesh.of_text(tokens, setup)
    if packed:
        lengths = np.random.default_rng(1).integers(1, 40, 100)
        draw = train_mesh.of_documents(np.split(tokens, np.cumsum(lengths)[:-1]), setup)
    mesh = train_mesh.make_mesh(*shape)
    losses = train_mesh.train(setup, mesh, draw, folder, save_every=100, resume=resume)
    return np.array(losses, np.float32)


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Losses uninterrupted: on eight devices, on one, and on one in float32."""
    runs = ((EIGHT, SETUP), (ONE, SETUP), (ONE, IN_FLOAT32))
    return [train(tmp_path_factory.mktemp("checkpoints"), *run) for run in runs]


def test_eight_devices_learn_as_one(curves):
    eight, one, exact = curves
    assert exact[-1] < 0.8 * exact[0]
    tolerance.check("losses", eight, exact, one)


def test_packed_documents_are_learned_as_on_one_device(tmp_path):
    setup = dataclasses.replace(SETUP, steps=4)
    exact = dataclasses.replace(IN_FLOAT32, steps=4)
    runs = (((1, 2, 4), setup), (ONE, setup), (ONE, exact))
    split, one, exact = (train(tmp_path / str(i), *run, packed=True) for i, run in enumerate(runs))
    tolerance.check("losses", split, exact, one)


def test_resume_on_the_same_mesh_and_on_another(curves, tmp_path):
    """The same bits on the same mesh; within bfloat16's error on another."""
    eight, one, exact = curves
    half = train(tmp_path / "here", EIGHT, dataclasses.replace(SETUP, steps=5))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert half.tolist() == eight[:5].tolist()
    assert train(tmp_path / "here", EIGHT, resume=True).tolist() == eight.tolist()
    there = train(tmp_path / "there", ONE, resume=True)
    assert there[:5].tolist() == eight[:5].tolist()
    tolerance.check("losses", there, exact, one)


@pytest.fixture(scope="module")
def state():
    """Parameters and optimizer state as shapes."""
    _, initialise = build(CONFIG, jax.nn.dot_product_attention)

    def start():
        parameters = initialise()
        return parameters, optax.adamw(1e-3).init(parameters)

    return jax.eval_shape(start)


def test_every_matrix_and_its_moments_are_split(state):
    found = 0
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        spec = train_mesh.spec_of(path)
        name = jax.tree_util.keystr(path)
        assert (train_mesh.WIDTH in spec) == (x.ndim > 1), name
        assert ("tensor" in spec) == (x.ndim > 1 and "embed" not in name and "head" not in name), (
            name
        )
        found += x.ndim > 1
    assert found == 3 * 9


def test_default_shapes():
    shapes = {n: train_mesh.default_shape(n) for n in (1, 2, 3, 4, 6, 8, 16)}
    assert all(np.prod(shape) == n for n, shape in shapes.items())
    assert shapes[2] == (1, 1, 2) and shapes[4] == (1, 2, 2) and shapes[8] == EIGHT


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((8, 1, 1), "batch, 4, is not a multiple of 8"),
        ((1, 4, 1), "key/value heads, 2, is not a multiple of 4"),
        ((1, 1, 3), "sequence length, 32, is not a multiple of 3"),
        ((4, 1, 16), "width, 32, is not a multiple of 64"),
    ],
)
def test_shapes_that_do_not_fit(shape, words):
    with pytest.raises(ValueError, match=words):
        train_mesh.check_shape(SETUP, *shape)
