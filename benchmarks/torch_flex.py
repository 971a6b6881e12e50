"""torch's flex_attention under torch.compile, timed in a process of its own.

benchmarks.flex starts this module where torch is installed, as benchmarks.attention starts
torch_attention; requests and answers are those of that module.
"""

import sys

from benchmarks.torch_attention import TOLERANCE, clocks
from benchmarks.torch_attention import main as serve

NAME = "torch flex"
COMMAND = (sys.executable, "-m", "benchmarks.torch_flex")
CAP, REACH = 30.0, 128  # as in benchmarks.functions, which imports JAX
SCORES = ("identity", "ALiBi", "softcap", "table")


def can_say(problem) -> bool:
    """Its own tanh is exact, and T5's buckets are one more table."""
    return problem.score is None or problem.score in SCORES


def functions(torch, problem: dict):
    """The score function and the mask function, or None, of scalars or of tensors like such."""
    heads, score, mask = problem["heads"], problem["score"], None
    table = torch.randn(heads, 2 * REACH + 1, device="cuda")
    scores = {
        None: None,
        "identity": lambda score, b, h, i, j: score,
        "ALiBi": lambda score, b, h, i, j: score + torch.exp2(-8.0 * (h + 1) / heads) * (j - i),
        "softcap": lambda score, b, h, i, j: CAP * torch.tanh(score / CAP),
        "table": lambda score, b, h, i, j: (
            score + table[h, torch.clamp(j - i, -REACH, REACH) + REACH]
        ),
    }
    window = problem["window"]
    if problem["documents"]:
        lengths = torch.tensor(problem["documents"], device="cuda")
        ids = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), lengths)

        def mask(b, h, i, j):
            return (ids[i] == ids[j]) & (i >= j)
    elif window is not None:

        def mask(b, h, i, j):
            return (i >= j) & (i - j <= window)
    elif problem["causal"]:

        def mask(b, h, i, j):
            return i >= j

    return scores[score], mask


def measure(torch, problem: dict, rounds: int) -> dict:
    """Microseconds of each round by both clocks, and the error against float32."""
    from torch import _dynamo
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _dynamo.reset()  # it compiles a function for so many kinds of arguments and no more
    config.donated_buffer = False  # a backward pass runs again and again
    attend = torch.compile(flex_attention, dynamic=False)
    seqlen, is_backward = problem["seqlen"], problem["mode"] == "backward"
    # [batch, seqlen, heads, head_dim] in memory, as the others have them.
    shape = [problem[name] for name in ("batch", "seqlen", "heads", "head_dim")]
    arrays = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)
    ]
    *qkv, dout = arrays
    score, mask = functions(torch, problem)
    blocks = create_block_mask(mask, None, None, seqlen, seqlen) if mask else None

    def exact(query, key, value):
        """Of the last head of the last sequence, [seqlen, head_dim]."""
        row = torch.arange(seqlen, device="cuda")
        last = (torch.tensor(problem[x] - 1, device="cuda") for x in ("batch", "heads"))
        where = *last, row[:, None], row
        scores = query @ key.T * query.shape[1] ** -0.5
        scores = score(scores, *where) if score else scores
        scores = scores.masked_fill(~mask(*where), float("-inf")) if mask else scores
        return scores.softmax(-1) @ value

    def linearized(function, qkv):
        leaves = [x.detach().requires_grad_() for x in qkv]
        return leaves, function(*leaves)

    def call():
        if not is_backward:
            with torch.no_grad():
                return [attend(*qkv, score_mod=score, block_mask=blocks)]
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    if is_backward:
        leaves, out = linearized(lambda *x: attend(*x, score_mod=score, block_mask=blocks), qkv)
    one = [x[-1, -1].float() for x in arrays]
    one_leaves, want = linearized(exact, one[:3])
    want = torch.autograd.grad(want, one_leaves, one[3]) if is_backward else [want.detach()]
    pairs = zip((x[-1, -1].float() for x in call()), want, strict=True)
    error = max(float((x - y).norm() / y.norm()) for x, y in pairs)
    if not error <= TOLERANCE:
        return dict(error=f"wrong result: relative error {error:.1e}")
    return clocks(torch, call, rounds) | dict(relative_error=error)


if __name__ == "__main__":
    sys.exit(serve(measure))
