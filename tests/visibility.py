"""A slow model of the table of visibility, in loops over rows and keys, from the words of
jax_fa3/visibility/table.py; and random sources for it.

test_visibility.py compares it with XLA's table, gpu/ with the kernel's.
"""

import numpy as np

from jax_fa3.options import MAX_SEQLEN

GROUP, NONE = 64, MAX_SEQLEN
BATCH = 8


def model(seqlen_q, seqlen_k, **sources):
    """int32 [batch, heads, words]; the arguments are those of make_visibility, arrays with their
    batch and heads or without."""
    arrays = {
        name: np.asarray(x).astype(np.int64)
        for name, x in sources.items()
        if isinstance(x, np.ndarray)
    }
    full = {name: _full(name, x) for name, x in arrays.items()}
    batch = max((len(x) for x in full.values()), key=lambda n: n != 1, default=1)
    heads = max((x.shape[1] for x in full.values() if x.ndim == 3), default=1)
    planes = [
        [
            _plane(
                seqlen_q,
                seqlen_k,
                sources
                | {name: _of_head(x[b if len(x) > 1 else 0], h, heads) for name, x in full.items()},
            )
            for h in range(heads)
        ]
        for b in range(batch)
    ]
    return np.asarray(planes, np.int32).reshape(batch, heads, -1)


def _full(name, x):
    if name.startswith("kv_"):
        return x.reshape(*(x.shape[:-1] or (1,)), 1, x.shape[-1]) if x.ndim < 3 else x
    if name == "query_offset":
        return x.reshape(-1)
    return x.reshape(-1, x.shape[-1]) if x.size else x.reshape(max(len(x), 1), x.shape[-1])


def _of_head(x, h, heads):
    return x[h * len(x) // heads] if np.ndim(x) == 2 else x


def _plane(seqlen_q, seqlen_k, sources):
    intervals = [(0, seqlen_k)] * seqlen_q
    is_valid = _is_valid(sources) and _are_documents(seqlen_q, seqlen_k, sources)
    if is_valid:
        intervals = [_interval(i, seqlen_q, seqlen_k, sources) for i in range(seqlen_q)]
    greatest, greatests = (0, 0), []
    for begin, end in intervals:
        if begin < end:
            greatest = max(greatest[0], begin), max(greatest[1], end)
        greatests.append(greatest)
    seeing = [i for i, (begin, end) in enumerate(intervals) if begin < end]
    is_monotone = all(intervals[i] == greatests[i] for i in seeing)
    rows = [
        x if x[0] < x[1] else (mb, ~me) for x, (mb, me) in zip(intervals, greatests, strict=True)
    ]
    row_bounds = _bounds(intervals)
    if is_monotone:
        keys = [_rows_of(j, greatests) for j in range(seqlen_k)]
        key_bounds = _bounds(keys)
    else:
        keys = [(0, 0)] * seqlen_k
        key_bounds = [
            _reaching(g, row_bounds, seqlen_q, seqlen_k) for g in range(-(-seqlen_k // GROUP))
        ]
    plane = (
        is_valid + 2 * is_monotone,
        seeing[-1] + 1 if seeing else 0,
        max((intervals[i][1] for i in seeing), default=0),
        0,
    )
    return [word for part in ([plane], rows, row_bounds, key_bounds, keys) for word in _words(part)]


def _words(entries):
    words = [word for entry in entries for word in entry]
    return words + [0] * (-len(words) % 4)


def _interval(i, seqlen_q, seqlen_k, sources):
    begin, end = 0, seqlen_k
    ids = sources.get("query_segment_ids")
    if ids is not None:
        of_keys = sources.get("key_value_segment_ids")
        of_keys = ids if of_keys is None else of_keys
        own = np.flatnonzero(of_keys == ids[i]) if ids[i] else ()
        if not len(own):
            return 0, 0
        begin, end = max(begin, own[0]), min(end, own[-1] + 1)
    if sources.get("kv_start") is not None:
        begin = max(begin, sources["kv_start"][i])
    if sources.get("kv_end") is not None:
        end = min(end, sources["kv_end"][i])
    cu_q = sources.get("cu_seqlens_q")
    if cu_q is not None:
        cu_k = sources.get("cu_seqlens_k")
        cu_k = cu_q if cu_k is None else cu_k
        d = np.count_nonzero(cu_q <= i) - 1
        if not 0 <= d < len(cu_q) - 1:
            return 0, 0
        (q_begin, q_end), (k_begin, k_end) = (
            np.clip(cu[d : d + 2], 0, n) for cu, n in ((cu_q, seqlen_q), (cu_k, seqlen_k))
        )
        position = k_begin + (i - q_begin) + (k_end - k_begin) - (q_end - q_begin)
        left, right = sources.get("window", (-1, -1))
        right = min(right, 0) if sources.get("causal") and right >= 0 else right
        right = 0 if sources.get("causal") else right
        begin, end = max(begin, k_begin), min(end, k_end)
        if left >= 0:
            begin = max(begin, position - left)
        if right >= 0:
            end = min(end, position + right + 1)
    chunk = sources.get("attention_chunk")
    if chunk:
        offset = np.clip(sources.get("query_offset") or 0, -MAX_SEQLEN, MAX_SEQLEN)
        first = (i + offset) // chunk * chunk
        begin, end = max(begin, first), min(end, first + chunk)
    return (int(begin), int(end)) if begin < end else (0, 0)


def _is_valid(sources):
    ids, of_keys = (sources.get(f"{x}_segment_ids") for x in ("query", "key_value"))
    if ids is None:
        return True
    if of_keys is None:
        runs = [a for i, a in enumerate(ids) if i == 0 or a != ids[i - 1]]
        runs = [a for a in runs if a]
        return min(ids, default=0) >= 0 and len(set(runs)) == len(runs)
    return all(map(_is_in_order, (ids, of_keys)))


def _are_documents(seqlen_q, seqlen_k, sources):
    cu_q = sources.get("cu_seqlens_q")
    if cu_q is None:
        return True
    cu_k = sources.get("cu_seqlens_k")
    cu_k = cu_q if cu_k is None else cu_k
    return all(
        list(cu) == sorted(cu) and 0 <= cu[0] and cu[-1] <= n
        for cu, n in ((cu_q, seqlen_q), (cu_k, seqlen_k))
    )


def _is_in_order(ids):
    last, gap = 0, False
    for a in ids:
        if a < 0 or (a > 0 and (a < last or gap)):
            return False
        gap = gap or (a == 0 and last > 0)
        last = a or last
    return True


def _rows_of(j, greatests):
    begin = sum(end <= j for _, end in greatests)
    end = sum(begin <= j for begin, _ in greatests)
    return (begin, end) if begin < end else (0, 0)


def _bounds(intervals):
    found = []
    for first in range(0, len(intervals), GROUP):
        group = intervals[first : first + GROUP]
        filled = [x for x in group if x[0] < x[1]]
        begins, ends = (
            [x[side] if x[0] < x[1] else none for x in group] for side, none in ((0, NONE), (1, 0))
        )
        found.append(
            (
                min((x[0] for x in filled), default=NONE),
                max(begins),
                min(ends),
                max((x[1] for x in filled), default=0),
            )
        )
    return found


def _reaching(g, row_bounds, seqlen_q, seqlen_k):
    first, last = GROUP * g, min(GROUP * (g + 1), seqlen_k)
    groups = [i for i, bounds in enumerate(row_bounds) if bounds[0] < last and bounds[3] > first]
    if not groups:
        return NONE, NONE, 0, 0
    return GROUP * groups[0], NONE, 0, min(GROUP * (groups[-1] + 1), seqlen_q)


# ---- random sources

KINDS = (
    "own ids",
    "ids of both",
    "documents",
    "documents of both",
    "intervals",
    "start",
    "end",
    "by head",
    "chunks",
    "all",
    "broken ids",
    "broken ids of both",
    "broken documents",
    "broken documents of both",
)


def random_problem(rng, kind, most=200):
    """(seqlen_q, seqlen_k, sources) of a kind; the arrays have a batch or none."""
    seqlen_q, seqlen_k = (int(n) for n in rng.integers(1, most, 2))
    if kind in ("own ids", "broken ids", "all"):
        seqlen_k = seqlen_q
    batch = ((), (1,), (BATCH,))[rng.integers(3)]
    sources = {}
    if kind in ("own ids", "all"):
        sources["query_segment_ids"] = _stacked(rng, batch, own_ids, seqlen_q)
    if kind == "broken ids":
        sources["query_segment_ids"] = rng.integers(-1, 4, (BATCH, seqlen_q)).astype(np.int32)
    if kind in ("ids of both", "broken ids of both"):
        for name, n in (("query_segment_ids", seqlen_q), ("key_value_segment_ids", seqlen_k)):
            sources[name] = _stacked(rng, (BATCH,), ordered_ids, n)
    if kind == "broken ids of both":
        name = rng.choice(["query_segment_ids", "key_value_segment_ids"])
        at = rng.integers(0, sources[name].shape[1])
        sources[name][rng.integers(BATCH), at] = rng.integers(-1, 9)
    if "documents" in kind or kind == "all":
        count = int(rng.integers(1, 8))
        of_both = kind.endswith("documents of both")
        rows = seqlen_q if of_both else min(seqlen_q, seqlen_k)
        batch = (BATCH,) if kind.startswith("broken") else batch
        sources["cu_seqlens_q"] = _stacked(rng, batch, cu_seqlens, rows, count)
        if of_both:
            sources["cu_seqlens_k"] = _stacked(rng, batch, cu_seqlens, seqlen_k, count)
        if kind.startswith("broken"):
            x = sources["cu_seqlens_k" if of_both and rng.integers(2) else "cu_seqlens_q"]
            entries = rng.integers(BATCH, size=3), rng.integers(count + 1, size=3)
            x[entries] = rng.choice([-1, 0, 3, rows, 2 * rows, 1 << 30], 3)
        sources["causal"] = bool(rng.integers(2))
        sources["window"] = tuple(int(n) for n in rng.integers(-1, 30, 2))
    if kind in ("intervals", "start", "end", "all"):
        shape = (*batch, seqlen_q)
        start = rng.integers(-5, seqlen_k + 5, shape)
        start = np.sort(start, -1) if rng.integers(2) else start
        length = rng.integers(-3, 40, shape if rng.integers(2) else ())
        if kind != "end":
            sources["kv_start"] = start.astype(np.int32)
        if kind != "start":
            sources["kv_end"] = (start + length).astype(np.int32)
    if kind == "by head":
        start = np.sort(rng.integers(-5, seqlen_k, (2, 2, seqlen_q)), -1)
        sources["kv_start"] = start.astype(np.int32)
        end = np.repeat(start, 2, 1) + rng.integers(0, 60, (2, 4, 1))
        sources["kv_end"] = end.astype(np.int32)
    if kind in ("chunks", "all"):
        sources["attention_chunk"] = int(rng.integers(1, 90))
        offset = int(rng.integers(-99, 99))
        as_array = rng.integers(2)
        sources["query_offset"] = np.full((BATCH,), offset, np.int32) if as_array else offset
        if as_array:
            sources["query_offset"][1:3] = (-(1 << 31), (1 << 31) - 1)
    return seqlen_q, seqlen_k, sources


def own_ids(rng, seqlen):
    """Runs of any ids in any order, 0 among them more than once."""
    ids = np.repeat(rng.permutation(np.arange(1, 40)), rng.integers(0, 30, 39))
    ids = np.concatenate([ids, np.zeros(seqlen, int)])[:seqlen]
    for _ in range(rng.integers(3)):
        ids = np.where(ids == rng.choice(ids), 0, ids)
    return ids.astype(np.int32)


def ordered_ids(rng, seqlen):
    """Ids that do not fall, with zeros before and behind them."""
    before = np.zeros(rng.integers(5), int)
    ids = np.repeat(np.sort(rng.choice(np.arange(1, 12), 6)), rng.integers(0, 50, 6))
    return np.concatenate([before, ids, np.zeros(seqlen, int)])[:seqlen].astype(np.int32)


def cu_seqlens(rng, seqlen, count):
    """The ends of `count` documents, some empty; the last ones may be no document."""
    ends = np.sort(rng.integers(0, seqlen + 1, count + 1))
    ends[0] = 0 if rng.integers(4) else ends[0]
    ends[rng.integers(1, count + 1) :] = ends[-1]
    return ends.astype(np.int32)


def _stacked(rng, batch, make, *sizes):
    if not batch:
        return make(rng, *sizes)
    return np.stack([make(rng, *sizes) for _ in range(batch[0])])
