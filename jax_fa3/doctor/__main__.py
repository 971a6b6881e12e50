"""Command line of the doctor: `python -m jax_fa3.doctor --seqlen 4096 --heads 16 --causal`."""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

from jax_fa3.doctor import doctor


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jax_fa3.doctor",
        description="What jax_fa3 finds here, and whether its kernels would run a described call.",
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seqlen", type=int, help="describes a call: rows of the query")
    parser.add_argument("--seqlen-k", type=int, help="rows of key and value; default: --seqlen")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="default: --heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"))
    parser.add_argument("--deterministic", action="store_true", default=None)
    args = parser.parse_args()
    try:
        _run(args)
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def _run(args: argparse.Namespace) -> None:
    if args.seqlen is None:
        doctor()
        return

    for name in ("batch", "seqlen", "seqlen_k", "heads", "kv_heads", "head_dim"):
        n = getattr(args, name)
        if n is not None and n < 0:
            raise ValueError(f"--{name.replace('_', '-')} is {n}; expected at least 0")

    def shape(seqlen: int, heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (args.batch, seqlen, heads, args.head_dim), jnp.dtype(args.dtype)
        )

    seqlen_k = args.seqlen if args.seqlen_k is None else args.seqlen_k
    key = shape(seqlen_k, args.heads if args.kv_heads is None else args.kv_heads)
    doctor(
        shape(args.seqlen, args.heads),
        key,
        key,
        is_causal=args.causal,
        local_window_size=tuple(args.window) if args.window else None,
        deterministic=args.deterministic,
    )


if __name__ == "__main__":
    main()
