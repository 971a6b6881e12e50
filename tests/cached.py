"""Problems over caches, and their meaning in NumPy on gathered keys: what the CPU and the GPU suite
share. Whatever no row may see is NaN: free slots, free pages, padding rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np

import jax_fa3
import tolerance

LAYOUTS = ("pskh", "kpsh", "pksh", "skph", "fused")
HOSTILE = (-1, np.iinfo(np.int32).min, np.iinfo(np.int32).max)  # entries that are no page


@dataclasses.dataclass(frozen=True)
class CachedCase:
    """`lengths` are what the call is told; `counts` are the query rows of ragged sequences."""

    lengths: tuple
    rows: int = 1
    counts: tuple | None = None
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    dtype: str = "float32"
    page_size: int | None = 8  # None: contiguous
    width: int = 6  # pages of a sequence; of a contiguous cache 8 slots each
    layout: str = "pskh"
    appends: bool = False
    new_lengths: tuple | None = None
    causal: bool = True
    window: tuple | None = None
    offset: object = None
    starts: tuple | None = None  # key_starts
    rotary: str | None = None  # "halves" or "interleaved"
    scale: float | None = None
    bad_pages: tuple = ()  # (sequence, entry) pairs in the visible range that are no page
    seed: int = 0

    @property
    def batch(self):
        return len(self.lengths)

    @property
    def capacity(self):
        return self.width * (8 if self.page_size is None else self.page_size)

    @property
    def before(self):
        """The tokens that the cache has before the call, [b]."""
        return np.clip(np.asarray(self.lengths, np.int64), 0, self.capacity)

    @property
    def dim_v(self):
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def row_counts(self):
        return (self.rows,) * self.batch if self.counts is None else self.counts

    @property
    def written(self):
        """How many rows of each sequence are appended, as far as there is room."""
        if not self.appends:
            return np.zeros(self.batch, np.int64)
        new = self.row_counts if self.new_lengths is None else self.new_lengths
        new = np.clip(np.asarray(new, np.int64), 0, self.row_counts)
        return np.minimum(new, self.capacity - self.before)

    @property
    def keys(self):
        """The keys that exist in the end, [b]."""
        return self.before + self.written

    @property
    def name(self):
        given = [
            f"{field.name}={value}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return " ".join(given).replace(" ", "_") or "plain"


class Problem:
    """The arrays of a case, its call, and what it must give."""

    def __init__(self, case):
        self.case = case
        self.rng = np.random.default_rng(case.seed)
        c, total = case, sum(case.row_counts)
        self.padding = 0 if c.counts is None else 3  # rows behind the last sequence's
        self.query = self.draw(total + self.padding, c.heads_q, c.head_dim)
        # By sequence, with room for all that may be written.
        self.key = self.draw(c.batch, c.capacity, c.heads_kv, c.head_dim)
        self.value = self.draw(c.batch, c.capacity, c.heads_kv, c.dim_v)
        self.new_key = self.draw(total + self.padding, c.heads_kv, c.head_dim)
        self.new_value = self.draw(total + self.padding, c.heads_kv, c.dim_v)
        self.first = np.concatenate([[0], np.cumsum(c.row_counts)])  # rows of each sequence
        self.spoil_rows()
        self.tables, self.pages = self.draw_tables()
        if c.rotary:
            angle = self.rng.uniform(-3, 3, (c.capacity, 8)).astype(np.float32)
            self.cos, self.sin = np.cos(angle), np.sin(angle)
        self.caches = self.laid_out(self.key, self.value, c.before)

    def draw(self, *shape):
        return self.rng.standard_normal(shape).astype(self.case.dtype)

    def spoil_rows(self):
        """Padding rows of query and of what is appended."""
        arrays = self.query, self.new_key, self.new_value
        for x in arrays:
            x[self.first[-1] :] = np.nan
        if self.case.new_lengths is not None:
            for b, n in enumerate(self.case.new_lengths):
                for x in arrays:
                    x[self.first[b] + max(n, 0) : self.first[b + 1]] = np.nan

    def draw_tables(self):
        """Tables [b, m], as many pages as that needs and some more, in random order. What no token
        stands in has no page, and is hostile."""
        c = self.case
        if c.page_size is None:
            return None, c.batch
        pages = c.batch * c.width + 2
        tables = self.rng.permutation(pages)[: c.batch * c.width].reshape(c.batch, c.width)
        used = -(-c.keys // c.page_size)
        for b in range(c.batch):
            rest = c.width - used[b]
            tables[b, used[b] :] = self.rng.choice(HOSTILE + (pages,), rest)
        for b, entry in c.bad_pages:
            tables[b, entry] = self.rng.choice(HOSTILE + (pages,))
        return tables.astype(np.int32), pages

    def laid_out(self, key, value, lengths):
        """The caches in the case's layout, with the first tokens of each sequence."""
        c = self.case
        size = c.page_size or c.capacity
        key_cache = np.full((self.pages, size, c.heads_kv, c.head_dim), np.nan, c.dtype)
        value_cache = np.full((self.pages, size, c.heads_kv, c.dim_v), np.nan, c.dtype)
        for b in range(c.batch):
            for j in range(lengths[b]):
                page = b if self.tables is None else self.tables[b, j // size]
                if 0 <= page < self.pages:
                    key_cache[page, j % size], value_cache[page, j % size] = key[b, j], value[b, j]
        return in_layout(key_cache, value_cache, c.layout)

    def by_rows(self, x):
        """Of [rows of all sequences, ...] what a call takes."""
        c = self.case
        return x if c.counts is not None else x.reshape(c.batch, c.rows, *x.shape[1:])

    def arguments(self, dtype=np.int32):
        """Positional arguments and options of cached_attention; integers of `dtype`."""
        c = self.case
        arrays = [self.by_rows(self.query), *self.caches]
        lengths = np.asarray(c.lengths, dtype)
        options = dict(cache_lengths=lengths, is_causal=c.causal, layout=c.layout)
        options |= dict(local_window_size=c.window, scale=c.scale, return_residual=True)
        if c.appends:
            arrays += [self.by_rows(self.new_key), self.by_rows(self.new_value)]
        if self.tables is not None:
            options["block_tables"] = self.tables.astype(dtype)
        if c.counts is not None:
            options["query_starts"] = self.first.astype(dtype)
        for name, x in (("new_lengths", c.new_lengths), ("key_starts", c.starts)):
            if x is not None:
                options[name] = np.asarray(x, dtype)
        if c.offset is not None:
            options["query_offset"] = (
                c.offset if isinstance(c.offset, int) else np.asarray(c.offset, dtype)
            )
        if c.rotary:
            is_interleaved = c.rotary == "interleaved"
            options["rotary"] = jax_fa3.Rotary(self.cos, self.sin, is_interleaved)
        return arrays, options

    def turned(self, x, position):
        """A row [heads, dim] by rotary at its position."""
        if not self.case.rotary:
            return x
        row = np.clip(position, 0, len(self.cos) - 1)
        rotation = (self.cos[row] + 1j * self.sin[row]).astype(np.complex128)
        turned, width = x.astype(np.float64), 2 * rotation.size
        if self.case.rotary == "interleaved":
            pairs = slice(0, width, 2), slice(1, width, 2)
        else:
            pairs = slice(0, width // 2), slice(width // 2, width)
        z = (turned[:, pairs[0]] + 1j * turned[:, pairs[1]]) * rotation
        turned[:, pairs[0]], turned[:, pairs[1]] = z.real, z.imag
        return turned.astype(x.dtype)

    def appended(self):
        """Key and value by sequence, with what is appended."""
        c, key, value = self.case, self.key.copy(), self.value.copy()
        for b in range(c.batch):
            for i in range(c.written[b]):
                position, row = c.before[b] + i, self.first[b] + i
                key[b, position] = self.turned(self.new_key[row], position)
                value[b, position] = self.new_value[row]
        return key, value

    def expected(self, precision):
        """out and lse [rows of all, N, ...] in float64 ("exact"), or as the dtype's own attention
        rounds."""
        c = self.case
        out = np.zeros((len(self.query), c.heads_q, c.dim_v))
        lse = np.full((len(self.query), c.heads_q), -np.inf)
        keys, values = self.appended()
        for b, i in np.ndindex(c.batch, max(c.row_counts, default=0)):
            sees = self.visible(b, i)
            if i >= c.row_counts[b] or not sees.any():
                continue
            row, position = self.first[b] + i, self.position(b, i)
            key, value = (self.seen(x, b, sees) for x in (keys, values))
            query = self.turned(self.query[row], position)
            of_row = attention(query, key, value, c.scale, precision)
            out[row], lse[row] = of_row
        return out, lse

    def position(self, b, i):
        c = self.case
        if c.offset is not None:
            return int(np.broadcast_to(c.offset, c.batch)[b]) + i
        return int(c.before[b] if c.appends else c.before[b] - c.row_counts[b]) + i

    def visible(self, b, i):
        """bool [capacity]: the keys that row i of sequence b sees."""
        c, j = self.case, np.arange(self.case.capacity)
        sees = j < c.keys[b]
        if c.starts is not None:
            sees &= j >= c.starts[b]
        if c.new_lengths is not None and i >= c.new_lengths[b]:
            return np.zeros_like(sees)
        left, right = (None, None) if c.window is None else c.window
        if c.causal:
            right = 0 if right is None else min(right, 0)
        position = self.position(b, i)
        if left is not None:
            sees &= j >= position - left
        if right is not None:
            sees &= j <= position + right
        return sees

    def seen(self, x, b, sees):
        """The tokens that are seen; of a page that does not exist, zeros."""
        x = x[b].copy()
        if self.tables is not None:
            page = self.tables[b, np.arange(len(x)) // self.case.page_size]
            x[(page < 0) | (page >= self.pages)] = 0
        return x[sees]

    def expected_caches(self):
        return self.laid_out(*self.appended(), self.case.keys)


def in_layout(key, value, layout):
    """Caches [p, s, k, h] in a layout."""
    if layout == "fused":
        fused = np.stack([key, value], 3)
        return fused.reshape(*key.shape[:2], -1, key.shape[3]), None
    order = ["pskh".index(letter) for letter in layout]
    return np.ascontiguousarray(key.transpose(order)), np.ascontiguousarray(value.transpose(order))


def attention(query, key, value, scale, precision):
    """out [N, dim_v] and lse [N] of one row [N, d] over keys [n, K, d]."""
    num_heads, head_dim = query.shape
    scale = 1 / np.sqrt(head_dim) if scale is None else scale
    work = np.float64 if precision == "exact" else np.float32
    query = query.reshape(key.shape[1], -1, head_dim)  # [K, group, d]
    query, key, value = (x.astype(work) for x in (query, key, value))
    logits = work(scale) * (query @ key.transpose(1, 2, 0))
    largest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(-1)
    lse = (largest[..., 0] + np.log(total)).reshape(num_heads)
    if precision != "exact":
        weights = weights.astype(precision).astype(work)
    out = weights @ value.transpose(1, 0, 2) / total[..., None]
    out = out.reshape(num_heads, -1)
    return (out if precision == "exact" else out.astype(precision)), lse


def check(problem, got, *, out_dtype=None):
    """A call's results against the meaning; caches bit for bit but for the rounding of rotary."""
    c = problem.case
    out, lse, *caches = got
    exact, same = problem.expected("exact"), problem.expected(c.dtype)
    assert out.dtype == (out_dtype or np.dtype(c.dtype))
    # Of what is turned an element may be rounded to the neighbor of what it is here.
    turned = float(jnp.finfo(c.dtype).eps) / 4 if c.rotary else 0
    for name, x, y, z in zip(("out", "lse"), (out, lse), exact, same, strict=True):
        z = problem.by_rows(z) + (turned if name == "lse" else 0)
        tolerance.check(name, np.asarray(x), problem.by_rows(y), z)
    for x, y in zip(caches, problem.expected_caches() if caches else (), strict=True):
        assert (x is None) == (y is None)
        if x is None:
            continue
        if c.rotary:
            x, y = (np.asarray(a, np.float32) for a in (x, y))
            eps = float(jnp.finfo(c.dtype).eps)
            np.testing.assert_allclose(x, y, rtol=2 * eps, atol=2 * eps)
        else:
            assert np.asarray(x).tobytes() == y.tobytes()


STATIC = ("is_causal", "layout", "local_window_size", "scale", "return_residual", "rotary")


def attend(problem, implementation, **more):
    """The problem's call under jax.jit."""
    arrays, options = problem.arguments()
    static = {name: options.pop(name) for name in STATIC if name in options}
    if isinstance(options.get("query_offset"), int):
        static["query_offset"] = options.pop("query_offset")
    run = functools.partial(
        jax_fa3.cached_attention, implementation=implementation, **static, **more
    )
    return jax.jit(run)(*arrays, **options)


# ---- hostile values


def check_hostile(run, seed, **sizes):
    """Any int32 in the index arrays of sequences 1 and 3 of four: what the others get and all pages
    but those two's own, keep their bits. `run` is cached_attention with return_residual."""
    rng = np.random.default_rng(seed)
    case = CachedCase(
        lengths=(40, 17, 46, 7),
        rows=2,
        appends=True,
        new_lengths=(2, 0, 1, 1),
        starts=(0, 0, 3, 0),
        offset=(40, 17, 46, 7),
        seed=seed,
    )
    problem = Problem(dataclasses.replace(case, **sizes))
    arrays, options = problem.arguments()
    index = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
    want = [np.asarray(x) for x in run(*arrays, **index)]
    changed = {name: x.copy() for name, x in index.items() if name != "query_starts"}
    for x in changed.values():
        for b in (1, 3):
            x[b] = rng.choice((*HOSTILE, 10**6, 3), np.shape(x[b]))
    changed["block_tables"][[1, 3]] = rng.choice(HOSTILE, changed["block_tables"][[1, 3]].shape)
    out, lse, *caches = (np.asarray(x) for x in run(*arrays, **index | changed))
    sequence = np.repeat(np.arange(4), problem.case.row_counts)
    sequence = np.append(sequence, np.full(problem.padding, 4, sequence.dtype))
    sane = problem.by_rows((sequence != 1) & (sequence != 3))
    for x, y in ((out, want[0]), (lse, want[1])):
        assert x[sane].tobytes() == y[sane].tobytes()
    own = {int(page) for b in (1, 3) for page in problem.tables[b]}
    others = [page for page in range(problem.pages) if page not in own]
    for x, y, z in zip(caches, want[2:], arrays[1:3], strict=True):
        assert x[others].tobytes() == y[others].tobytes()
        mine = [page for page in own if 0 <= page < problem.pages]
        assert x[mine].tobytes() == z[mine].tobytes()  # no page of theirs is in a table now


# ---- random problems


def random_case(
    seed, *, head_dims=((16, None), (24, None), (32, 16)), pages=(8, 16), groups=(1, 2, 4)
):
    """All kinds of problems; the GPU suite asks for the sizes that have kernels."""
    rng = np.random.default_rng(seed)

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    batch, layout = int(rng.integers(1, 6)), pick(*LAYOUTS)
    head_dim, head_dim_v = pick(*head_dims)
    head_dim_v = None if layout == "fused" else head_dim_v
    page_size = pick(None, *pages)
    width = int(rng.integers(1, 8)) * (1 if page_size else pages[-1] // 8)
    capacity = width * (page_size or 8)
    lengths = tuple(
        int(np.clip(pick(0, 1, page_size or 8, capacity, rng.integers(capacity + 1)), 0, capacity))
        for _ in range(batch)
    )
    appends = bool(rng.integers(2))
    counts, rows = None, pick(1, 1, 2, 3, 5, 16)
    if rng.integers(3) == 0:
        counts = tuple(int(n) for n in rng.integers(0, 7, batch))
    new_lengths = None
    if appends and rng.integers(2):
        new_lengths = tuple(int(n) for n in rng.integers(0, rows + 1, batch))
        if counts is not None:
            new_lengths = tuple(int(rng.integers(0, n + 1)) for n in counts)
    bad_pages = ()
    if page_size and rng.integers(4) == 0:
        bad_pages = ((int(rng.integers(batch)), int(rng.integers(width))),)
    heads_kv = pick(1, 2, 3)
    return CachedCase(
        lengths=lengths if rng.integers(8) else (*lengths[1:], pick(-7, 2**31 - 1)),
        rows=rows,
        counts=counts,
        heads_q=heads_kv * pick(*groups),
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=pick("bfloat16", "float16"),
        page_size=page_size,
        width=width,
        layout=layout,
        appends=appends,
        new_lengths=new_lengths,
        causal=bool(rng.integers(2)),
        window=pick(None, None, (3, 0), (int(rng.integers(70)), int(rng.integers(9)))),
        offset=pick(None, None, 5, tuple(int(n) for n in rng.integers(-9, capacity + 9, batch))),
        starts=pick(None, None, tuple(int(n) for n in rng.integers(-3, capacity // 2 + 2, batch))),
        rotary=pick(None, None, "halves", "interleaved") if head_dim >= 16 else None,
        scale=pick(None, None, 0.3, -0.2, 0.0),
        bad_pages=bad_pages,
        seed=seed,
    )
