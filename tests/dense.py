"""Problems with a bias or a dense mask, random ones of all kinds among them, and what every
implementation must do with them."""

import dataclasses
import functools
import itertools

import jax
import numpy as np

import contract
import oracle
from case import Case
from draws import Draws
from jax_fa3 import dot_product_attention
from oracle import Results
from transforms import assert_near

BIAS_DIMS = tuple("".join(x) + "s" for x in itertools.product("b1", "h1", "t1"))
MASK_DIMS = tuple("".join(x) for x in itertools.product("b1", "h1", "t1", "s1"))
BIAS_VALUES = ("normal", "strong", "low", "holes", "rows")
MASK_VALUES = ("half", "few", "most", "blocks", "rows")


@dataclasses.dataclass(frozen=True)
class Dense(Case):
    """A Case with a bias, a mask or both. Their dimensions are letters: b batch, h query heads,
    t rows, s keys, and 1 where they broadcast.

    With `fold` the call is mapped by jax.vmap over parts of the batch, that many; then g stands for
    one of each part, and an array whose first letter is 1 is not mapped.

    Values of a bias: "normal"; "strong", eight times as large; "low", -3000 here and there, and
    "holes", -inf; "rows", -inf in whole rows.
    Values of a mask: so many of True; "blocks", all or nothing for 64 rows and 48 keys at a time;
    "rows", False in whole rows.
    """

    bias: str | None = None
    bias_values: str = "normal"
    mask: str | None = None
    mask_values: str = "half"
    wants_dbias: bool = True
    is_short: bool = False  # leading dimensions of extent 1 are left out
    fold: int | None = None

    @property
    def name(self):
        words = [super().name]
        if self.bias:
            asked = "" if self.wants_dbias else "_constant"
            words.append(f"bias_{self.bias}_{self.bias_values}{asked}")
        if self.mask:
            words.append(f"mask_{self.mask}_{self.mask_values}")
        words += ["short"] * self.is_short + [f"fold_{self.fold}"] * (self.fold is not None)
        return "-".join(words)

    @functools.cached_property
    def bias_array(self):
        """With four dimensions, or None."""
        if self.bias is None:
            return None
        rng, shape = self._random("bias"), self._shape(self.bias)
        bias = rng.standard_normal(shape, np.float32)
        if self.bias_values == "strong":
            bias *= 8
        if self.bias_values in ("low", "holes"):
            low = -3e3 if self.bias_values == "low" else -np.inf
            bias[rng.random(shape) < 0.2] = low
        if self.bias_values == "rows":
            bias[rng.random(shape[:3]) < 0.2] = -np.inf
        return bias.astype(self.dtype)

    @functools.cached_property
    def mask_array(self):
        """With four dimensions, or None."""
        if self.mask is None:
            return None
        rng, shape = self._random("mask"), self._shape(self.mask)
        if self.mask_values == "blocks":
            size = (64, 48)
            blocks = (*shape[:2], *(-(-n // m) for n, m in zip(shape[2:], size, strict=True)))
            mask = rng.random(blocks) < 0.5
            for axis, (n, m) in enumerate(zip(shape[2:], size, strict=True), 2):
                mask = np.repeat(mask, m, axis).take(np.arange(n), axis)
            return mask
        if self.mask_values == "rows":
            seen = rng.random(shape[:3]) < 0.7
            return np.broadcast_to(seen[..., None], shape) & (rng.random(shape) < 0.9)
        return rng.random(shape) < {"half": 0.5, "few": 0.03, "most": 0.97}[self.mask_values]

    @property
    def allowed(self):
        """What all but the bias let rows see, [B, Hq or 1, Sq, Sk]."""
        return super().sees if self.mask is None else super().sees & self._of_batch(self.mask_array)

    @property
    def sees(self):
        if self.bias is None:
            return self.allowed
        return self.allowed & ~np.isneginf(self._of_batch(self.bias_array))

    @property
    def spoiled_bias(self):
        """NaN where nobody is allowed to see what a value stands for."""
        if self.bias is None:
            return None
        return np.where(self.met(self.allowed), self.bias_array, np.nan).astype(self.dtype)

    def met(self, sees):
        """Of each value of the bias, whether some row sees a key that it stands for."""
        full = (self.batch, self.heads_q, self.seqlen_q, self.seqlen_k)
        return oracle.over_shared(np.broadcast_to(sees, full), self.bias_array.shape, np.any)

    def reference(self, inputs, precision="exact", xp=np):
        results = super().reference(inputs, precision, xp)
        return results if self.wants_dbias else dataclasses.replace(results, dbias=None)

    def attend(self, implementation, query, key, value, bias, mask, index, heads):
        """Output, LSE and what else the case asks for; arrays have four dimensions and the whole
        batch, those of `heads` two, own_heads and query heads."""

        def call(query, key, value, bias, mask, index, heads):
            return dot_product_attention(
                query,
                key,
                value,
                bias,
                mask,
                return_residual=True,
                implementation=implementation,
                **self.options,
                **index,
                **heads,
            )

        if self.own_heads == 1:
            heads = {name: x[0] for name, x in heads.items()}
        if self.is_short:
            bias, mask = _without_leading_ones(bias), _without_leading_ones(mask)
        if self.fold is None:
            return call(query, key, value, bias, mask, index, heads)

        def parts(x):
            return x.reshape(self.fold, len(x) // self.fold, *x.shape[1:])

        is_mapped = [dims is not None and dims[0] != "1" for dims in (self.bias, self.mask)]
        bias, mask = (
            parts(x) if mapped else x for x, mapped in zip((bias, mask), is_mapped, strict=True)
        )
        axes = [0 if mapped else None for mapped in (*is_mapped, True, self.own_heads > 1)]
        operands = (*map(parts, (query, key, value)), bias, mask, jax.tree.map(parts, index), heads)
        results = jax.vmap(call, in_axes=(0, 0, 0, *axes))(*operands)
        return tuple(x.reshape(self.batch, *x.shape[2:]) for x in results)

    def _shape(self, dims):
        extents = dict(b=self.batch, g=self.fold, h=self.heads_q, t=self.seqlen_q, s=self.seqlen_k)
        return tuple(1 if letter == "1" else extents[letter] for letter in dims)

    def _of_batch(self, x):
        """Each plane as often as there are sequences that it serves."""
        return np.repeat(x, self.batch // len(x), axis=0)


def _without_leading_ones(x):
    """But with its last dimension."""
    if x is None:
        return None
    first = next((i for i, n in enumerate(x.shape[:-1]) if n > 1), len(x.shape) - 1)
    return x.reshape(x.shape[first:])


HEAD_DIMS = (  # of query and key, and of value
    (8, 8), (16, 16), (32, 32), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (160, 160),
    (192, 192), (256, 256), (32, 16), (24, 64), (40, 72), (128, 96), (192, 128), (64, 256),
)  # fmt: skip


NUMBERS = 384  # of random problems


def random_case(number):
    """The same for the same number. Neighbours differ in what they have and in dimensions, so that
    every few dozen meet all of them."""
    draws = Draws(number)
    pick, fold = draws.pick, draws.fold
    visibility = draws.visibility()
    heads_kv = pick(1, 2)
    bias = BIAS_DIMS[number // 3 % len(BIAS_DIMS)]
    mask = MASK_DIMS[number // 2 % len(MASK_DIMS)]
    if fold:
        bias, mask = (x.replace("b", pick("b", "g", "g")) for x in (bias, mask))
    head_dims = HEAD_DIMS[number % len(HEAD_DIMS)]
    return Dense(
        **draws.fields(heads_kv, head_dims, scales=(*[None] * 7, 0.05, -0.3, 0.0)),
        bias=None if number % 3 == 1 else bias,
        bias_values=pick(*BIAS_VALUES),
        mask=None if number % 3 == 0 else mask,
        mask_values=pick(*MASK_VALUES),
        wants_dbias=pick(True, True, True, False),
        is_short=fold is None and pick(False, True),
        fold=fold,
        **visibility,
    )


def compile_call(implementation, case, **compiler_options):
    """Output, LSE and gradients, a bias' only where the case wants it, as a function of the arrays
    that `operands` gives; the Results as a dictionary."""

    def results(query, key, value, dout, dlse, bias, mask, index, heads):
        def attend(query, key, value, *others):
            *learned, sinks = others
            arrays = learned[0] if learned else bias, mask, index, heads | sinks
            out, lse, *more = case.attend(implementation.name, query, key, value, *arrays)
            return (out, lse), more

        wants_dbias = case.wants_dbias and bias is not None
        names = ("dquery", "dkey", "dvalue", "dbias")[: 3 + wants_dbias]
        differentiated = [query, key, value, *[bias] * wants_dbias]
        sinks = {name: x for name, x in heads.items() if name == "sinks"}
        return contract.results_of(attend, dout, dlse, *differentiated, sinks, names=names)

    return jax.jit(results).lower(*operands(case)).compile(compiler_options)


def operands(case, inputs=None, bias=None):
    """The arrays of a call, with others in place of the case's own where they are given."""
    heads = {"alibi_slopes": case.slopes_array, "sinks": case.sinks_array}
    heads = {name: x for name, x in heads.items() if x is not None}
    inputs = case.inputs() if inputs is None else inputs
    bias = case.bias_array if bias is None else bias
    return *inputs, bias, case.mask_array, case.index_arrays, heads


def run(implementation, case, times=1):
    """The results of one run, and then of every further one: what stands where nobody looks is
    NaN, in the arrays and, as `implementation` sees to, below the results."""
    executable = compile_call(implementation, case)
    inputs = contract.spoil_padding(case, case.inputs())
    for _ in range(times):
        implementation.prepare(executable)
        yield contract.as_results(executable(*operands(case, inputs, case.spoiled_bias)))


def check(implementation, case):
    """Near the oracle, zero where it must be, and the same bits again; of dQ with a bias, or where
    they are asked for."""
    try:
        got, again = run(implementation, case, times=2)
        for name, x in got.items():
            assert x.dtype == ("float32" if name in contract.IN_FLOAT32 else case.dtype), name
            if name != "dquery" or case.bias is not None or case.deterministic:
                assert x.tobytes() == getattr(again, name).tobytes(), f"{name} has other bits again"
        contract.compare(case, contract.spoil_padding(case, case.inputs()), got)
        if got.dbias is not None:
            assert not np.any(got.dbias[~case.met(case.sees)]), "dbias is not zero where it must be"
    except Exception as error:
        error.add_note(case.name)
        raise


SAID = [  # (case, dimensions of a mask that says the same)
    (Case(seqlen_q=q, seqlen_k=k, head_dim=head_dim, heads_q=4, **options), dims)
    for head_dim, (q, k) in (
        (32, (200, 333)),
        (64, (257, 257)),
        (128, (130, 300)),
        (256, (65, 190)),
    )
    for options, dims in (
        (dict(causal=True, offset=k - q), "11ts"),
        (dict(causal=True, offset=(k - q, -30)), "b1ts"),
        (dict(window=(40, 20), offset=50), "11ts"),
        (dict(key_lengths=(k, k // 3)), "b11s"),
        (dict(query_lengths=(q // 2, q)), "b1t1"),
        (dict(intervals="head", causal=True), "bhts"),
    )
]


HIDDEN = [
    Dense(
        seqlen_q=q, seqlen_k=k, heads_q=4, head_dim=head_dim, mask=dims, mask_values=values,
    )
    for head_dim, q, k in ((64, 200, 333), (96, 130, 129), (128, 257, 300))
    for dims, values in (("b1ts", "rows"), ("bhts", "few"), ("11ts", "blocks"), ("b11s", "half"))
]  # fmt: skip

ASKED = [
    Dense(seqlen_q=200, seqlen_k=333, heads_q=4, head_dim=head_dim, bias=dims, **options)
    for head_dim, dims in ((32, "1hts"), (64, "bhts"), (128, "11ts"), (192, "b11s"), (256, "1h1s"))
    for options in (dict(), dict(mask="b11s", causal=True, key_lengths=(333, 100)))
]

ALONE = [
    Dense(batch=1, seqlen_q=65, seqlen_k=100, head_dim=head_dim, bias="1hts", mask="1h1s")
    for head_dim in (32, 128)
]


def check_said_by_a_mask(implementation, case, dims):
    """Arguments and the mask that means the same: both near the oracle, and near each other."""
    mask = case.sees
    for axis, letter in enumerate(dims):
        assert letter != "1" or (mask == mask.take([0], axis)).all(), "the mask has no such form"
        mask = mask.take([0], axis) if letter == "1" else mask
    inputs = case.inputs()
    by_mask = run_alone(implementation, inputs, mask=mask, scale=case.scale)
    contract.compare(case, inputs, by_mask)
    assert_alike(by_mask, implementation.run(case, inputs))


def check_bias_that_hides(implementation, case):
    """-inf in a bias hides as False in a mask does, rows that see nothing among them."""
    hides = np.where(case.mask_array, 0, -np.inf).astype(case.dtype)
    inputs = case.inputs()
    by_bias = run_alone(implementation, inputs, bias=hides)
    assert not np.any(by_bias.dbias[hides == -np.inf])
    by_mask = run_alone(implementation, inputs, mask=case.mask_array)
    assert_alike(by_bias, by_mask)


def check_what_is_asked_for(implementation, case, **compiler_options):
    """The other gradients have the same bits whether a bias' is wanted or not; a bias' has them
    where it is wanted alone."""
    arrays = operands(case)

    def bits(wants_dbias):
        asked = dataclasses.replace(case, wants_dbias=wants_dbias)
        executable = compile_call(implementation, asked, **compiler_options)
        implementation.prepare(executable)
        return {name: np.asarray(x).tobytes() for name, x in executable(*arrays).items()}

    with_dbias = bits(True)
    dbias = with_dbias.pop("dbias")
    assert bits(False) == with_dbias

    def results(query, key, value, dout, dlse, bias, mask, index, heads):
        def attend(bias):
            return case.attend(implementation.name, query, key, value, bias, mask, index, heads)

        return jax.vjp(attend, bias)[1]((dout, dlse))[0]

    executable = jax.jit(results).lower(*arrays).compile(compiler_options)
    implementation.prepare(executable)
    assert np.asarray(executable(*arrays)).tobytes() == dbias


def check_without_a_batch(implementation, case):
    """The bits of a batch of one."""
    assert case.batch == 1
    bias, mask, inputs = case.bias_array, case.mask_array, case.inputs()
    want = run_alone(implementation, inputs, bias, mask)
    got = run_alone(implementation, [x[0] for x in inputs], bias[0], mask[0])
    for (name, x), (_, y) in zip(got.items(), want.items(), strict=True):
        assert x.tobytes() == y.tobytes(), name


def run_alone(implementation, inputs, bias=None, mask=None, **options):
    """Results of a bias and a mask as they are, with no other arrays."""

    def results(query, key, value, dout, dlse, bias, mask):
        def attend(*x):
            return dot_product_attention(
                *x, mask=mask, return_residual=True, implementation=implementation.name, **options
            )

        differentiated = (query, key, value) if bias is None else (query, key, value, bias)
        (out, lse), vjp = jax.vjp(attend, *differentiated)
        return out, lse, *vjp((dout, dlse))

    operands = (*inputs, bias, mask)
    executable = jax.jit(results).lower(*operands).compile()
    implementation.prepare(executable)
    return Results(*map(np.asarray, executable(*operands)))


def assert_alike(got, want):
    """Near each other, and -inf at the same places of the LSE; a bias' gradient, where one of them
    has none, apart."""
    np.testing.assert_array_equal(np.isneginf(got.lse), np.isneginf(want.lse))
    for name in ("out", "lse", "dquery", "dkey", "dvalue"):
        x, y = (np.where(np.isneginf(z), 0, z) for z in (getattr(got, name), getattr(want, name)))
        assert_near(x, y)
