"""The float8 forward kernels, called as the FFI target that they are.

The exact answer is float64 attention on the dequantised arrays, the same-precision one rounds
256 * P to e4m3 before the second product. The LSE has a bound of its own: the tensor cores keep
about 13 bits of a sum of 8-bit products, so that a logit is known to 2^-10 of the largest.
"""

import dataclasses
import itertools
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernels import FEATURES, HEADS, SHAPES, resolve, spoil_free_memory

import tolerance
from cases import Case
from jax_fa3 import support
from jax_fa3.options import NUM_SMS, AttentionOptions, resolve_window

FLOAT8 = ml_dtypes.float8_e4m3fn
BLOCK = 128  # rows of a descale, keys of prepared value
GROUP = 16
# Position p of a group of 16 prepared keys holds this one (src/attention/prepared_value.h).
PREPARED_KEY = np.array([p % 4 // 2 * 8 + p // 4 * 2 + p % 2 for p in range(GROUP)])
NAN = np.uint8(0x7F)
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


def blocks(seqlen):
    return -(-seqlen // BLOCK)


def prepare(value, fill):
    """value [b, s, h, d] as bytes in the prepared layout, the keys past s all `fill`."""
    batch, seqlen, heads, dim = value.shape
    padded = np.full((batch, blocks(seqlen) * BLOCK, heads, dim), fill, np.uint8)
    padded[:, :seqlen] = value.view(np.uint8)
    groups = padded.reshape(batch, blocks(seqlen) * BLOCK // GROUP, GROUP, heads, dim)
    transposed = groups[:, :, PREPARED_KEY].reshape(padded.shape).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(transposed).view(FLOAT8)


@dataclasses.dataclass
class Problem:
    """A Case in float8: arrays with NaN wherever nothing may be read, and what they stand for."""

    case: Case
    out_dtype: np.dtype
    query: np.ndarray  # float8
    key: np.ndarray
    value: np.ndarray
    query_descale: np.ndarray  # [b, h_q, 1 | blocks]
    key_descale: np.ndarray  # [b, h_kv, 1 | blocks]
    value_descale: np.ndarray  # [b, h_kv]

    @classmethod
    def make(cls, case, by_block=True, out_dtype=ml_dtypes.bfloat16):
        rng = np.random.default_rng(zlib.crc32(f"{case.name} {by_block}".encode()))

        def quantise(seqlen, heads, dim, used, per_block):
            x = rng.standard_normal((case.batch, seqlen, heads, dim), np.float32)
            count = blocks(seqlen) if per_block else 1
            descale = rng.uniform(0.01, 0.04, (case.batch, heads, count)).astype(np.float32)
            rows = by_row(descale, seqlen)
            stored = np.clip(x / rows, -448, 448).astype(FLOAT8)
            stored.view(np.uint8)[~used] = NAN
            return stored, descale

        head_dim_v = case.head_dim_v or case.head_dim
        query, query_descale = quantise(
            case.seqlen_q, case.heads_q, case.head_dim, case.query_used, by_block
        )
        key, key_descale = quantise(
            case.seqlen_k, case.heads_kv, case.head_dim, case.key_used, by_block
        )
        value, value_descale = quantise(
            case.seqlen_k, case.heads_kv, head_dim_v, case.key_used, False
        )
        return cls(
            case,
            np.dtype(out_dtype),
            query,
            key,
            value,
            query_descale,
            key_descale,
            value_descale[:, :, 0],
        )

    def run(self, prepared=False, repeats=1):
        """out and lse; of several runs, which must all have the same bits."""
        case = self.case
        value = prepare(self.value, NAN) if prepared else self.value
        index = [jnp.asarray(x) for x in case.index_arrays.values()]
        window = resolve_window(case.window, case.causal)
        options = AttentionOptions(
            scale=case.softmax_scale,
            window_left=window[0],
            window_right=window[1],
            query_offset=case.offset if isinstance(case.offset, int) else 0,
            **{f"has_{field}": name in case.index_arrays for field, name in INDEX.items()},
        )
        head_dim_v = self.value.shape[-1]
        plan = float8_plan(case, prepared)
        results = (
            jax.ShapeDtypeStruct(
                (case.batch, case.seqlen_q, case.heads_q, head_dim_v), self.out_dtype
            ),
            jax.ShapeDtypeStruct((case.batch, case.heads_q, case.seqlen_q), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((plan["workspace_bytes"],), jnp.uint8),
        )

        @jax.jit
        def call(*operands):
            kernel = jax.ffi.ffi_call("jax_fa3_forward_float8", results)
            attributes = dict(options=options.to_ffi(), value_is_prepared=prepared)
            return kernel(*operands, **attributes)[:2]

        descales = (self.query_descale, self.key_descale, self.value_descale)
        operands = [jnp.asarray(x) for x in (self.query, self.key, value, *descales)] + index
        compiled = call.lower(*operands).compile()
        sizes = [int(np.prod(x.shape)) * x.dtype.itemsize for x in results]
        first = None
        for _ in range(repeats):
            spoil_free_memory(sizes)
            got = [np.asarray(x) for x in compiled(*operands)]
            first = first or got
            for name, x, y in zip(("out", "lse"), first, got, strict=True):
                assert x.tobytes() == y.tobytes(), f"{name} differs between runs"
        return first

    def references(self):
        """(out, lse) exactly and with P rounded; and the largest logit."""
        case = self.case
        group = case.heads_q // case.heads_kv
        wide = [
            np.nan_to_num(x.astype(np.float64)) * by_row(scale, x.shape[1])
            for x, scale in (
                (self.query, self.query_descale),
                (self.key, self.key_descale),
                (self.value, self.value_descale[:, :, None]),
            )
        ]
        query, key, value = (x.transpose(0, 2, 1, 3) for x in wide)
        key, value = (np.repeat(x, group, axis=1) for x in (key, value))
        logits = case.softmax_scale * (query @ key.swapaxes(2, 3))
        sees = case.sees[:, None]
        largest = np.max(np.abs(np.where(sees, logits, 0)), initial=0)
        scores = np.where(sees, logits, -np.inf)
        row_max = scores.max(-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isneginf(row_max), 0, row_max))
        row_sum = weights.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse = (row_max + np.log(row_sum))[..., 0]
        row_sum[row_sum == 0] = 1
        rounded = (256 * weights).astype(FLOAT8).astype(np.float64) / 256
        exact, same = (((p / row_sum) @ value).transpose(0, 2, 1, 3) for p in (weights, rounded))
        return exact, same.astype(self.out_dtype), lse, largest

    def check(self, got):
        out, lse = got
        exact, same, exact_lse, largest = self.references()
        assert out.dtype == self.out_dtype
        tolerance.check("out", out, exact, same)
        assert np.array_equal(np.isneginf(lse), np.isneginf(exact_lse))
        finite = np.isfinite(exact_lse)
        error = np.abs(np.where(finite, lse, 0) - np.where(finite, exact_lse, 0))
        bound = 2.0**-10 * (1 + largest)
        assert np.max(error, initial=0) <= bound, f"lse error {np.max(error)} above {bound}"
        blind = ~self.case.sees.any(axis=2)
        assert not out[blind].any()
        assert np.isneginf(lse.transpose(0, 2, 1)[blind]).all()


INDEX = {
    "query_lengths": "query_seq_lengths",
    "key_lengths": "key_value_seq_lengths",
    "query_offset": "query_offset",
}


def by_row(descale, seqlen):
    """[b, h, 1 | blocks] to [b, seqlen, h, 1]."""
    count = descale.shape[2]
    rows = np.arange(seqlen) // BLOCK if count > 1 else np.zeros(seqlen, int)
    return descale[:, :, rows].transpose(0, 2, 1)[..., None]


def float8_plan(case, prepared=False):
    window = resolve_window(case.window, case.causal)
    return support.native().forward_float8_plan(
        case.batch,
        case.seqlen_q,
        case.seqlen_k,
        case.heads_q,
        case.heads_kv,
        case.head_dim,
        case.head_dim_v or case.head_dim,
        *window,
        prepared,
        NUM_SMS,
    )


def walk():
    """For every head dim a walk through shapes, heads and features, which differ in period."""
    combinations = zip(
        itertools.cycle(SHAPES), itertools.cycle(HEADS), itertools.cycle(FEATURES), strict=False
    )
    for head_dim, head_dim_v in HEAD_DIMS:
        for (sq, sk), (hq, hkv), feature in itertools.islice(combinations, 12):
            yield Case(
                batch=1,
                seqlen_q=sq,
                seqlen_k=sk,
                heads_q=hq,
                heads_kv=hkv,
                head_dim=head_dim,
                head_dim_v=head_dim_v,
                **resolve(feature, sq, sk),
            )
    for head_dim, head_dim_v in ((16, 16), (48, 80), (112, 112), (160, 32), (240, 208)):
        yield Case(
            batch=2,
            seqlen_q=150,
            seqlen_k=330,
            heads_q=4,
            heads_kv=2,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            causal=True,
            offset=(180, -20),
            key_lengths=(330, 77),
        )


CASES = list({case.name: case for case in walk()}.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case):
    """Both layouts of value, whose bits agree; one scale for a head and one for 128 rows."""
    problem = Problem.make(case)
    plain, prepared = problem.run(), problem.run(prepared=True)
    problem.check(plain)
    assert all(x.tobytes() == y.tobytes() for x, y in zip(plain, prepared, strict=True))
    by_head = Problem.make(case, by_block=False, out_dtype=np.float16)
    by_head.check(by_head.run(prepared=True))


@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("prepared", (False, True), ids=("plain", "prepared"))
@pytest.mark.parametrize("out_dtype", (ml_dtypes.bfloat16, np.float16), ids=("bf16", "fp16"))
def test_one_key_a_row(head_dims, prepared, out_dtype):
    """A row that sees one key gives that key's value to the bit, wherever it stands in its tile."""
    head_dim, head_dim_v = head_dims
    case = Case(
        batch=2,
        seqlen_q=500,
        seqlen_k=500,
        heads_q=4,
        heads_kv=2,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        window=(0, 0),
        offset=(3, -70),
        key_lengths=(500, 391),
    )
    problem = Problem.make(case, out_dtype=out_dtype)
    problem.value_descale = np.full_like(problem.value_descale, 0.25)
    out, _ = problem.run(prepared)
    value = np.repeat(np.nan_to_num(problem.value.astype(np.float32)) * 0.25, 2, axis=2)
    for b, (offset, length) in enumerate(zip(case.offset, case.key_lengths, strict=True)):
        keys = np.arange(500) + offset
        seen = (keys >= 0) & (keys < length)
        expected = np.where(seen[:, None, None], value[b, np.where(seen, keys, 0)], 0)
        np.testing.assert_array_equal(out[b], expected.astype(out_dtype))


@pytest.mark.parametrize("head_dim", (64, 96, 128, 256))
@pytest.mark.parametrize("causal", (False, True), ids=("dense", "causal"))
def test_many_keys(head_dim, causal):
    """Beyond the length where sums are promoted, and the last rows of a long sequence."""
    case = Case(
        batch=1,
        seqlen_q=300,
        seqlen_k=20_000,
        heads_q=2,
        heads_kv=1,
        head_dim=head_dim,
        causal=causal,
        offset=19_700 if causal else None,
    )
    assert float8_plan(case)["promote"] == (0 if head_dim == 256 else 4)
    problem = Problem.make(case)
    problem.check(problem.run())


def test_descales_of_zero():
    """Blocks of zeros, quantised with a scale of zero, are logits of zero."""
    case = Case(
        batch=1, seqlen_q=256, seqlen_k=384, heads_q=2, heads_kv=1, head_dim=64, causal=True
    )
    problem = Problem.make(case)
    problem.key.view(np.uint8)[:, 128:256] = 0
    problem.key_descale[:, :, 1] = 0
    problem.query.view(np.uint8)[:, :128] = 0
    problem.query_descale[:, :, 0] = 0
    problem.check(problem.run())


@pytest.mark.parametrize(
    "case",
    (
        Case(batch=0, seqlen_q=64, seqlen_k=64),
        Case(batch=2, seqlen_q=0, seqlen_k=64),
        Case(batch=2, seqlen_q=200, seqlen_k=0),
        Case(
            batch=3, seqlen_q=200, seqlen_k=260, key_lengths=(0, 1, 260), query_lengths=(200, 7, 0)
        ),
    ),
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("prepared", (False, True), ids=("plain", "prepared"))
def test_empty(case, prepared):
    problem = Problem.make(case)
    problem.check(problem.run(prepared))


@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize(
    "options",
    (
        dict(),
        dict(causal=True),
        dict(window=(150, 70), key_lengths=(800, 650)),
    ),
    ids=("dense", "causal", "window"),
)
def test_bits_repeat(head_dims, options):
    head_dim, head_dim_v = head_dims
    case = Case(
        batch=2,
        seqlen_q=1000,
        seqlen_k=800,
        heads_q=16,
        heads_kv=4,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        **options,
    )
    problem = Problem.make(case)
    problem.check(problem.run(repeats=50))


def test_refuses():
    """What no kernel takes is refused with its reason, in the plan and in the call."""
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16 for float8"):
        float8_plan(Case(head_dim=72))
    problem = Problem.make(Case(head_dim=64))
    problem.query_descale = np.ones((2, 2, 3), np.float32)
    with pytest.raises(Exception, match="query_descale must have 1 or 1 scales of a head"):
        problem.run()
