"""Random problems with sinks, largest logits, a cap or slopes, for every implementation; the checks
are those of dense.py."""

import dense
from dense import Dense
from draws import Draws

KINDS = ("plain", "softcap", "alibi")  # the kernels have one of the latter two at a time
UP_TO_128 = (  # head dims of query and key, and of value
    (8, 8), (16, 16), (32, 32), (40, 40), (64, 64), (72, 72), (96, 96), (128, 128), (32, 16),
    (24, 64), (40, 72), (64, 128), (128, 96),
)  # fmt: skip
HEAD_DIMS = {
    "plain": dense.HEAD_DIMS,
    "softcap": (*UP_TO_128, (200, 200), (256, 256), (248, 200)),
    "alibi": UP_TO_128,
}
CAPS = (0.7, 5.0, 20.0, 30.0, 50.0)
NUMBERS = 3 * 312  # of random problems


def random_case(number):
    """The same for the same number; neighbours are of different kinds. A plain one has both sinks
    and largest logits, and most of them a bias, a mask or both."""
    draws = Draws([7, number])
    pick, fold = draws.pick, draws.fold
    kind = KINDS[number % 3]
    head_dims = HEAD_DIMS[kind][number // 3 % len(HEAD_DIMS[kind])]
    heads_kv = pick(1, 2)
    options = draws.visibility()
    if kind == "plain":
        bias, mask = pick(*dense.BIAS_DIMS, None, None), pick(*dense.MASK_DIMS, None, None)
        if fold:
            bias, mask = (x and x.replace("b", pick("b", "g")) for x in (bias, mask))
        options |= dict(bias=bias, bias_values=pick(*dense.BIAS_VALUES))
        options |= dict(mask=mask, mask_values=pick(*dense.MASK_VALUES))
    elif kind == "softcap":
        options |= dict(softcap=pick(*CAPS))
    else:
        options |= dict(alibi=pick("powers", "any"))
    is_plain = kind == "plain"
    return Dense(
        **draws.fields(heads_kv, head_dims, scales=(*[None] * 5, 0.05, -0.3, 1.0)),
        sinks=pick("small", "large", *[None] * (0 if is_plain else 2)),
        max_logits=is_plain or pick(False, True),
        own_heads=fold if fold and pick(False, True) else 1,
        wants_dbias=pick(True, True, False),
        fold=fold,
        **options,
    )
