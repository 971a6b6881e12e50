"""The examples' packed documents: nothing is lost, and packing changes no loss and no gradient."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3
import tolerance
import train_decoder
from decoder import Config
from packing import Packed, pack, pad, segment_positions
from training import Setup, build, packed_rows, read_documents, read_text

CONFIG = Config(20, 1, 32, 4, 2, 16, jnp.bfloat16)
SETUP = Setup(CONFIG, batch=3, seqlen=40, steps=1, learning_rate=1e-3)
IN_FLOAT32 = dataclasses.replace(CONFIG, dtype=jnp.float32)
LENGTHS = (13, 40, 5, 1, 22, 9, 17, 3, 30, 8)


def draw_documents(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocabulary, n).astype(np.int32) for n in lengths]


def sort(documents):
    return sorted(map(tuple, documents))


def test_every_document_is_packed_once_and_whole():
    documents = draw_documents()
    packed = pack(documents, 41)
    assert packed.tokens.shape == packed.segment_ids.shape and packed.tokens.shape[1] == 41
    assert packed.tokens.dtype == packed.segment_ids.dtype == np.int32
    assert sort(packed.documents()) == sort(documents)
    assert packed.count == sum(LENGTHS)
    assert len(packed.tokens) < len(documents) / 2


def test_ids_count_up_and_padding_comes_last():
    for row in pack(draw_documents(), 41).segment_ids:
        used = row[row > 0]
        assert (row[used.size :] == 0).all()
        assert (np.diff(used, prepend=0) <= 1).all() and (np.diff(used) >= 0).all()


def test_a_document_longer_than_a_row_is_divided():
    (document,) = draw_documents([100])
    packed = pack([document], 41)
    assert [len(x) for x in packed.documents()] == [41, 41, 18]
    np.testing.assert_array_equal(np.concatenate(packed.documents()), document)


def test_padded_documents_have_a_row_each():
    documents = draw_documents()
    padded = pad(documents)
    assert padded.tokens.shape == (len(documents), max(LENGTHS))
    assert list(map(tuple, padded.documents())) == list(map(tuple, documents))
    assert padded.segment_ids.max() == 1


def test_positions_start_again_in_each_document():
    ids = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2], [0] * 8])
    want = [[0, 1, 2, 0, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert segment_positions(ids).tolist() == want


def test_the_text_is_its_documents():
    documents, vocabulary = read_documents()
    tokens, same = read_text()
    np.testing.assert_array_equal(np.concatenate(documents), tokens)
    assert vocabulary == same and len(documents) > 400 and min(map(len, documents)) > 0
    packed = pack(documents, 2049)
    assert packed.count == len(tokens) > 0.95 * packed.tokens.size


def test_batches_of_packed_rows():
    batches = packed_rows(draw_documents(), SETUP)
    first, second = next(batches), next(batches)
    assert first.tokens.shape == second.segment_ids.shape == (3, 41)
    assert isinstance(first, Packed) and not np.array_equal(first.tokens, second.tokens)


@pytest.fixture(scope="module")
def parameters():
    return build(CONFIG, jax_fa3.dot_product_attention)[1]()


def losses(parameters, config, *runs):
    """Of each (attention, batch)."""
    with jax.default_matmul_precision("float32"):
        return [jax.jit(build(config, attend)[0])(parameters, *batch) for attend, batch in runs]


def test_packed_and_padded_documents_have_one_loss(parameters):
    """The same gradients in float32; in bfloat16 the same loss within its error."""
    packed = pack(draw_documents(), 41)
    padded = pad(packed.documents())
    runs = (jax_fa3.dot_product_attention, packed), (train_decoder.one_a_row, padded)
    with jax.default_matmul_precision("float32"):
        got, exact = (
            jax.jit(jax.value_and_grad(build(IN_FLOAT32, attend)[0]))(parameters, *batch)
            for attend, batch in runs
        )
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6, rtol=2e-5), got, exact)
    got, same = losses(parameters, CONFIG, *runs)
    tolerance.check("loss", got, exact[0], same)


def test_the_loss_is_of_tokens_inside_documents(parameters):
    """As of a batch that is not packed, where every document has the same length."""
    documents = draw_documents([9] * 6)
    ours = jax_fa3.dot_product_attention
    runs = (ours, pack(documents, 41)), (ours, (np.stack(documents),))
    np.testing.assert_allclose(*losses(parameters, IN_FLOAT32, *runs), rtol=1e-6)


def test_padding_reaches_nothing(parameters):
    packed = pack(draw_documents(), 41)
    assert (packed.segment_ids[:, :-1] == 0).any()
    assert not train_decoder.padding_reaches(SETUP, parameters, packed)
