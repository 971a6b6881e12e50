"""What programs for CUDA have in them: their custom calls and other operations, as text."""

import re

import jax

DEFAULTS = {  # the options of a call
    "scale": "1.250000e-01 : f32",
    "window_left": "1073741824 : i32",
    "window_right": "1073741824 : i32",
    "query_offset": "0 : i32",
    "rescale_threshold": "8.000000e+00 : f32",
    "softcap": "0.000000e+00 : f32",
    "sm_margin": "0 : i32",
    "deterministic": "false",
}
QKV = "query", "key", "value"
CHOICE = {"case", "constant", "return"}  # of the platform, with a constant index: XLA drops it


def operands(
    dtype="bfloat16", batch=2, seqlen_q=40, seqlen_k=48, heads_q=4, heads_kv=2, head_dim=64
):
    query = jax.ShapeDtypeStruct((batch, seqlen_q, heads_q, head_dim), dtype)
    key = jax.ShapeDtypeStruct((batch, seqlen_k, heads_kv, head_dim), dtype)
    return query, key, key


def lower(function, *args, platform="cuda"):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def operations(text):
    """Names of the StableHLO operations in a program, the choice of the platform aside."""
    return sorted(name for name in re.findall(r"\bstablehlo\.(\w+)", text) if name not in CHOICE)


def custom_calls(text):
    """[(target, attributes, operand types, result types)] of our custom calls, in order; names of
    operands and results are tuples."""
    found = []
    for line in text.splitlines():
        call = re.search(r"custom_call @(jax_fa3_\w+)\(.*?\) \{(.*)\} : \((.*?)\) -> (.*)$", line)
        if call:
            target, body, operand_types, results = call.groups()
            config = re.search(r"mhlo\.backend_config = \{((?:[^{}]|\{.*?\})*)\}", body).group(1)
            attributes = dict(re.findall(r"(\w+) = (true|false|\"[\w ]+\"|[^,{}]+)", config))
            for side in ("operands", "results"):
                attributes[side] = tuple(attributes[side].strip('"').split())
            found.append(
                (
                    target,
                    attributes,
                    re.findall(r"tensor<(.*?)>", operand_types),
                    re.findall(r"tensor<(.*?)>", results),
                )
            )
    return found


def forward_attributes(*others, max_logits=False):
    """Of a call with default options, and these operands behind query, key and value."""
    results = "out", "lse", *["max_logits"] * max_logits, "tile_counter"
    return DEFAULTS | dict(operands=(*QKV, *others), results=results)


def backward_attributes(*others, dlse=False, gradients=()):
    """The same; `gradients`: those behind dquery, dkey and dvalue."""
    operands = *QKV, "out", "lse", "dout", *["dlse"] * dlse, *others
    results = "dquery", "dkey", "dvalue", *gradients, "workspace"
    return DEFAULTS | dict(operands=operands, results=results)
