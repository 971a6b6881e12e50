"""The kernels' options and their C++ mirror are one list: names, order and widths, read from the
text."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from jax_fa3 import ffi, options

SRC = Path(__file__).parents[1] / "src"
NOT_FOR_KERNELS = {  # Python's own choice
    "routes",
    "sequence_parallel",
    "forward_dtype",
    "out_dtype",
    "return_residual",
    "return_max_logits",
    "dear_gradients",
    "functions",
}
WIDTHS = {np.float32: "float", np.int32: "int32_t", bool: "bool"}
ATTRIBUTES = ffi.attributes(options.AttentionOptions(scale=0.5))


def struct_fields(text, name):
    """[(name, type)] of the data members of a C++ struct."""
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.DOTALL).group(1)
    members = re.findall(
        r"^\s*(?:std::)?(\w+)\s+(\w+)\s*(?:=[^;]*|\{[^;]*\})?;", body, re.MULTILINE
    )
    return [(name, kind) for kind, name in members]


@pytest.fixture(scope="module")
def header():
    return (SRC / "ffi/options.h").read_text()


def test_dataclass_and_dictionary_have_the_same_fields():
    fields = {field.name for field in dataclasses.fields(options.AttentionOptions)}
    assert fields - NOT_FOR_KERNELS == ATTRIBUTES.keys()


def test_dictionary_and_struct_have_the_same_names_order_and_widths(header):
    python = [(name, WIDTHS[type(value)]) for name, value in ATTRIBUTES.items()]
    assert python == struct_fields(header, "Options")


def decoded_fields(text, name):
    """[(name, type)] of what a struct's decoding from attributes lists."""
    decoding = re.search(rf"STRUCT_ATTR_DECODING\(\s*jax_fa3::{name},(.*?)\);", text, re.DOTALL)
    members = re.findall(r"StructMember<\s*(?:\w+::)*(\w+)\s*>\(\"(\w+)\"\)", decoding.group(1))
    return [(name, kind) for kind, name in members]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("ffi/options.h", "Options"),
        ("ffi/options.h", "CallAttributes"),
        ("kernels/quantize/call.h", "QuantizeAttributes"),
        ("kernels/visibility/call.h", "VisibilityAttributes"),
        ("kernels/forward_cached/call.h", "CachedOptions"),
        ("kernels/forward_cached/call.h", "ForwardCachedAttributes"),
        ("kernels/append/call.h", "AppendAttributes"),
        ("kernels/dense_mask/call.h", "DenseMaskAttributes"),
    ],
)
def test_decoder_lists_every_field(path, name):
    text = (SRC / path).read_text()
    assert decoded_fields(text, name) == struct_fields(text, name)


def test_a_struct_that_is_not_decoded_whole_is_found():
    text = (SRC / "ffi/options.h").read_text().replace("bool deterministic;", "bool deterministc;")
    assert decoded_fields(text, "Options") != struct_fields(text, "Options")


def test_values_reach_the_dictionary():
    fields = dict(
        scale=0.25,
        window_left=3,
        window_right=5,
        query_offset=-7,
        deterministic=True,
        rescale_threshold=0.0,
        softcap=30.0,
        sm_margin=8,
    )
    assert ffi.attributes(options.AttentionOptions(**fields)) == fields


def test_a_tables_choices_are_the_attributes_of_its_call():
    text = (SRC / "kernels/visibility/call.h").read_text()
    fields = struct_fields(text, "VisibilityAttributes")
    names = [name for name, kind in fields if kind != "Names"]
    assert names == [field.name for field in dataclasses.fields(options.VisibilityOptions)]


def test_options_are_hashable_values():
    one, other = (options.AttentionOptions(scale=0.5, window_left=left) for left in (3, 4))
    assert hash(one) == hash(dataclasses.replace(other, window_left=3)) and one != other


@pytest.mark.parametrize(
    ("python", "cpp"), [("UNBOUNDED", "kUnbounded"), ("MAX_SEQLEN", "kMaxSeqlen")]
)
def test_limits_are_the_same_number(python, cpp):
    text = (SRC / "call/types.h").read_text()
    base, shift = re.search(rf"\b{cpp} = (\d+) << (\d+);", text).groups()
    assert getattr(options, python) == int(base) << int(shift)
